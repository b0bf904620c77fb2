"""The damage script's figures, compared with the same arithmetic in NumPy and a file of the same type."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from granite4v.clip_projector import VisionEncoder, load_image
from scripts import vision_damage
from tests.helpers.pictures import noise_picture
from tests.toy.checkpoint import PRESETS


def test_errors_by_hand() -> None:
    expected = np.array([[[3.0, 4.0]], [[0.0, 1.0]]], dtype=np.float32)
    found = expected + np.array([[[0.0, 0.5]], [[0.0, 0.5]]], dtype=np.float32)
    assert vision_damage.errors(found, expected) == {
        "error": pytest.approx((0.5 / 26) ** 0.5),
        "worst_stream": pytest.approx(0.5),
    }


def test_a_run_reports_every_type_and_leaves_no_files(
    make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, work = make_model(PRESETS["tiny"], "F32", "F32"), tmp_path / "work"
    noise_picture((150, 100)).save(tmp_path / "page.png")
    arguments = ["", str(folder), str(tmp_path / "page.png"), "--work", str(work), "--types", "F32,Q4_K,int8 Q8_0"]
    monkeypatch.setattr(sys, "argv", arguments)
    vision_damage.main()
    types = json.loads(capsys.readouterr().out.splitlines()[-1])["types"]
    assert [row["type"] for row in types] == ["F32", "Q4_K", "int8 Q8_0"]
    assert types[0]["error"] == 0.0 and list(work.iterdir()) == []
    streams = []
    for kind in ("F32", "Q4_K"):
        path = make_model(PRESETS["tiny"], "F32", kind) / f"mmproj-{kind}.gguf"
        with VisionEncoder(path, "cpu") as encoder:
            streams.append(encoder.encode([load_image(tmp_path / "page.png")])[0].streams.copy())
    expected = np.linalg.norm(streams[1] - streams[0]) / np.linalg.norm(streams[0])
    assert types[1]["error"] == pytest.approx(float(expected), rel=1e-5)
    assert 0 < types[2]["error"] < types[1]["error"]
