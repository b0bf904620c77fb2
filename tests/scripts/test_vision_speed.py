"""Measuring image encoding alone: every side encodes the same image, and errors are computed correctly."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from granite4v.converter import Options, convert
from scripts import vision_speed
from tests.helpers.pictures import noise_picture
from tests.toy.checkpoint import PRESETS, CheckpointSpec

SPEC = replace(PRESETS["tiny"], vision_head=False)


def test_all_sides_encode_the_same_image(
    make_checkpoint: Callable[[CheckpointSpec], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint, out = make_checkpoint(SPEC), tmp_path / "model"
    convert(checkpoint, out, Options("F32", "F32"))
    noise_picture((150, 90)).save(tmp_path / "page.png")
    words = ["--mmproj", out / "mmproj-F32.gguf", "--text", out / "text-F32.gguf", "--checkpoint", checkpoint]
    words += ["--torch", "bf16", "--image", tmp_path / "page.png", "--runs", "1", "--threads", "2"]
    reference = tmp_path / "reference.npy"
    monkeypatch.setattr(sys, "argv", ["vision_speed", *map(str, words), "--reference", str(reference)])
    vision_speed.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    ours, peer, torch = (result["sides"][name] for name in ("ours mmproj-F32", "libmtmd mmproj-F32", "torch bf16"))
    assert ours["image_tokens"] == peer["image_tokens"] == torch["image_tokens"] == np.load(reference).shape[1]
    assert ours["error"]["rms"] < 1e-4
    assert ours["error"]["rms"] < peer["error"]["rms"] < 0.05  # libmtmd's attention is in half precision
    assert ours["error"]["rms"] < torch["error"]["rms"] < 0.05
    seconds = {name: side["encode_s"]["median"] for name, side in result["sides"].items()}
    expected = round(seconds["ours mmproj-F32"] / seconds["torch bf16"], 4)
    assert result["ratios"]["ours mmproj-F32"]["torch bf16"] == expected


def test_errors_are_those_of_the_worst_stream() -> None:
    reference = np.array([[[3.0, 4.0]], [[10.0, 0.0]]], dtype=np.float32)  # two streams of one token
    found = np.array([[[3.0, 4.5]], [[10.0, 0.2]]], dtype=np.float32)
    assert vision_speed.errors(found, reference) == {"rms": 0.1, "largest": 0.125}
    rows = found.swapaxes(0, 1).reshape(1, 4)  # libmtmd's layout: a token's streams side by side
    assert vision_speed.errors(rows, reference) == {"rms": 0.1, "largest": 0.125}


def test_sizes_of_pages() -> None:
    assert vision_speed.page_size("1700x2200") == (1700, 2200)
    for text in ("1700", "0x5", "axb", "-3x4", "3x4x5"):
        with pytest.raises(SystemExit, match="WIDTHxHEIGHT"):
            vision_speed.page_size(text)
