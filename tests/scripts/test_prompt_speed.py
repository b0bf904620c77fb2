"""Measuring a whole prompt: both sides read the same one, and the ratios match the measurements."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from granite4v.converter import Options, convert
from scripts import prompt_speed
from tests.helpers.pictures import noise_picture
from tests.toy.checkpoint import PRESETS, CheckpointSpec


@pytest.mark.parametrize(("preset", "n_frames"), [("tiny", 0), ("tiny-onevision", 0), ("tiny-onevision", 3)])
def test_both_sides_read_the_same_prompt(
    preset: str,
    n_frames: int,
    make_checkpoint: Callable[[CheckpointSpec], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint, out = make_checkpoint(PRESETS[preset]), tmp_path / "model"
    convert(checkpoint, out, Options("F32", "F32"))
    noise_picture((100, 60)).save(tmp_path / "page.png")
    words: list[Any] = [out, checkpoint, "--torch", "f32", "--runs", 1, "--threads", 1, "--ctx", 2048]
    words += ["--frames", n_frames] if n_frames else ["--image", tmp_path / "page.png"]
    monkeypatch.setattr(sys, "argv", ["prompt_speed", *map(str, words)])
    prompt_speed.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["prompt_tokens"] > result["image_tokens"] > 0
    assert result["logits_relative_l2"] < 1e-4
    if n_frames:
        assert result["image_tokens"] == n_frames * 4 + 1
    for figure in prompt_speed.FIGURES:
        ours, torch = (result[side][figure]["median"] for side in ("ours", "torch"))
        assert ours > 0 and torch > 0 and result["ratios"][figure] == round(ours / torch, 4)
