"""Measuring the tiled tower: every side computes the same states."""

from __future__ import annotations

import json
import sys

import pytest

from scripts import tiled_tower_speed


def test_all_sides_compute_the_same(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = [
        "--layers",
        "3",
        "--global-layers",
        "1",
        "--width",
        "64",
        "--ffn",
        "128",
        "--heads",
        "4",
        "--tile-px",
        "56",
    ]
    words += ["--text-width", "64", "--runs", "1", "--threads", "1", "--kinds", "F32", "Q8_0"]
    monkeypatch.setattr(sys, "argv", ["tiled_tower_speed", *words])
    tiled_tower_speed.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    sides, ratios = result["sides"], result["ratios"]
    assert sides["F32"]["rms"] < 2e-5 < sides["Q8_0"]["rms"] < 0.05
    assert 1e-3 < sides["bfloat16"]["rms"] < 0.1
    assert sides["Q8_0"]["n_tiles"] == 4
    seconds = {name: side["encode_s"]["median"] for name, side in sides.items()}
    assert ratios["Q8_0"]["bfloat16"] == round(seconds["Q8_0"] / seconds["bfloat16"], 4)
