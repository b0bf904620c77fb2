"""The measuring scripts compute their figures correctly; the programs they run are tested elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from granite4v.converter import Options, convert
from granite4v.families.registry import read_vision
from granite4v.ggml.gguf_file import GgufFile
from scripts import convert_race, side_by_side
from scripts.limits import encode_gflop, prefill_gflop
from tests.helpers.pictures import noise_picture
from tests.peers.reference import Reference
from tests.toy.checkpoint import PRESETS, CheckpointSpec

SPEC = replace(PRESETS["tiny"], vision_head=False)


@pytest.fixture(scope="module")
def model(make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scripts") / "model"
    convert(make_checkpoint(SPEC), out, Options("F32", "F32"))
    return out


def test_counted_arithmetic_of_encoding_is_what_the_reference_multiplies(
    model: Path, load_reference: Callable[..., Reference]
) -> None:
    reference, picture = load_reference(SPEC), noise_picture((150, 90))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        reference.model.get_image_features(*reference.pixels(picture))
    with GgufFile.open(model / "mmproj-F32.gguf") as file:
        config = read_vision(file)[1]
    n_tiles = len(reference.tiles(picture))
    n_patches = (SPEC.tile_px // SPEC.patch_px) ** 2
    patches = 2 * n_tiles * n_patches * SPEC.vision_hidden * 3 * SPEC.patch_px**2  # torch does not count these
    counted = encode_gflop(config, SPEC.qformer_ffn, n_tiles) * 1e9
    assert counted == pytest.approx(counter.get_total_flops() + patches, rel=1e-12)


def test_counted_arithmetic_of_prefill(model: Path, load_reference: Callable[..., Reference]) -> None:
    reference, n = load_reference(SPEC), 40
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        reference.model.model.language_model(torch.arange(n)[None])
    with GgufFile.open(model / "text-F32.gguf") as file:
        counted = prefill_gflop(file, n) * 1e9
    causal_half = 2 * n * n * SPEC.text_hidden * SPEC.text_layers  # the reference computes the masked half as well
    assert counted + causal_half == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_medians_and_ratios_by_hand() -> None:
    runs = [{"encode_s": e, "prefill_s": 2.0, "decode_tok_s": 10.0, "peak_rss_gb": 1.0} for e in (1.0, 9.0, 2.0)]
    slower = [{**run, "encode_s": 4.0, "decode_tok_s": 5.0} for run in runs]
    summary = side_by_side.compare(runs, slower)
    assert summary["encode_s"] == {
        "ours": 2.0,
        "peer": 4.0,
        "ours_range": [1.0, 9.0],
        "peer_range": [4.0, 4.0],
        "ratio": 0.5,
    }
    assert summary["decode_tok_s"]["ratio"] == 2.0


def test_files_of_a_directory(model: Path, tmp_path: Path) -> None:
    assert side_by_side.find_files(model, None) == (model / "text-F32.gguf", model / "mmproj-F32.gguf")
    with pytest.raises(SystemExit, match="holds 0 text and 0 vision files"):
        side_by_side.find_files(tmp_path, None)
    with pytest.raises(SystemExit, match="--mmproj"):
        side_by_side.find_files(model / "text-F32.gguf", None)


def test_the_peer_gets_the_prompt_without_the_line_break_it_adds_itself(model: Path, tmp_path: Path) -> None:
    noise_picture((70, 70)).save(tmp_path / "picture.png")
    raw = side_by_side.render_prompt(*side_by_side.find_files(model, None), "What is it?", tmp_path / "picture.png")
    assert "<|end_of_role|>{media}What is it?<|end_of_text|>" in raw
    assert "<image>" not in raw


def test_a_step_is_timed_with_its_own_peak_memory(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; block = bytearray(150_000_000); time.sleep(0.2)"]
    seconds, rss_gb = convert_race.timed(command, tmp_path / "log")
    assert 0.2 <= seconds < 20
    assert 0.15 <= rss_gb < 2
    with pytest.raises(SystemExit, match="status 3"):
        convert_race.timed([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log")
