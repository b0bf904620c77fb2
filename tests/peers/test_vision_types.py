"""Vision files of every weight type: the graph's results, compared with gguf's own dequantization, transformers and
stock libmtmd."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
import pytest

from granite4v.clip_projector import VisionEncoder, load_image
from granite4v.converter import policy
from granite4v.errors import ModelFileError
from granite4v.ggml import autotune, onednn
from granite4v.ggml.kernels import ATTENTION, Kernel
from tests.helpers.gguf_edit import copy_gguf
from tests.helpers.parity import STREAMS_F32
from tests.helpers.pictures import noise_picture
from tests.peers.reference import relative_l2
from tests.toy.checkpoint import PRESETS, CheckpointSpec

if TYPE_CHECKING:
    from tests.peers.reference import Reference

TINY = PRESETS["tiny"]  # rows of 192, 200 and 128
WHOLE = replace(TINY, vision_hidden=256, vision_heads=4, vision_ffn=512, qformer_ffn=256)
CLIP = PRESETS["tiny-clip-llama"]
K_QUANTS = ("Q6_K", "Q5_K", "Q4_K")
# Relative L2 of streams to transformers, 1.4 times the observed values; random weights are the worst case.
NEARNESS = {"Q8_0": 0.02, "Q6_K": 0.06, "Q5_K": 0.13, "Q4_K": 0.25}
PICTURE = noise_picture((150, 100))


def mmproj(folder: Path) -> Path:
    (path,) = folder.glob("mmproj-*.gguf")
    return path


def streams(path: Path) -> np.ndarray:
    with VisionEncoder(path, device="cpu", n_threads=2) as encoder:
        return encoder.encode([load_image(PICTURE)])[0].streams.copy()


def dequantized(path: Path, exact: Path, target: Path) -> Path:
    """Writes the file's values as a float32 file, with gguf's own routines and without the padding of rows."""
    shapes = {tensor.name: tuple(reversed(tensor.shape.tolist())) for tensor in gguf.GGUFReader(exact).tensors}
    values = {}
    for tensor in gguf.GGUFReader(path).tensors:
        rows = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        n_in = shapes[tensor.name][-1]
        if len(rows.shape) == 2 and tensor.tensor_type > 1:
            assert not rows[:, n_in:].any(), f"{tensor.name} is padded with values"
            rows = rows[:, : n_in if tensor.name.count("ffn_down") == 0 else None]
        values[tensor.name] = np.ascontiguousarray(rows, dtype=np.float32)
    return copy_gguf(path, target, tensors=values)


@pytest.mark.parametrize("kind", K_QUANTS)
def test_padded_rows_compute_what_their_dequantized_values_do(
    kind: str, make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With weights widened to float32 the products are exact; with quantized activations they are close."""
    for spec in (TINY, CLIP):
        path, exact = (mmproj(make_model(spec, "F32", name)) for name in (kind, "F32"))
        expected = streams(dequantized(path, exact, tmp_path / "exact.gguf"))
        monkeypatch.setattr(autotune, "vision_kernels", lambda *_, **__: {kind: Kernel("float32", widened="F32")})
        assert relative_l2(streams(path), expected) < STREAMS_F32
        monkeypatch.setattr(autotune, "vision_kernels", lambda *_, **__: {})
        assert STREAMS_F32 < relative_l2(streams(path), expected) < 2e-2


@pytest.mark.parametrize("kind", NEARNESS)
def test_quantized_towers_are_near_the_reference(
    kind: str, make_model: Callable[..., Path], load_reference: Callable[..., Reference]
) -> None:
    expected = load_reference(TINY).streams(PICTURE)
    found = streams(mmproj(make_model(TINY, "F32", kind)))
    assert relative_l2(found, np.stack([expected[layer] for layer in sorted(expected)])) < NEARNESS[kind]


@pytest.mark.skipif(not onednn.is_installed(), reason="the extra 'onednn' is for Linux on x86-64")
@pytest.mark.parametrize(("arithmetic", "kind"), [("F32", "F32"), ("F32", "F16"), ("BF16", "BF16"), ("BF16", "Q6_K")])
def test_towers_by_onednn_are_near_the_reference(
    arithmetic: str,
    kind: str,
    make_model: Callable[..., Path],
    load_reference: Callable[..., Reference],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both projectors, all activations; rounding to bfloat16 adds little to the rounding of the weights."""
    if arithmetic == "BF16" and not onednn.multiplies_bfloat16():
        pytest.skip("this CPU has no bfloat16 products")
    kernel = Kernel("onednn", arithmetic=arithmetic)
    monkeypatch.setattr(autotune, "vision_kernels", lambda *_, **__: dict.fromkeys((kind, ATTENTION), kernel))
    for spec in (TINY, CLIP):
        found = streams(mmproj(make_model(spec, "F32", kind)))
        by_layer = load_reference(spec).streams(PICTURE)
        expected = np.stack([by_layer[layer] for layer in sorted(by_layer)])
        limit = {"F32": STREAMS_F32, "F16": 2e-3, "BF16": 3e-2, "Q6_K": 1.2 * NEARNESS["Q6_K"]}[kind]
        assert relative_l2(found, expected) < limit


def stock_encodes(folder: Path, picture: Path) -> bool:
    """Whether libmtmd encodes an image with the model's files; in a child process, because ggml may end the process."""
    (text,) = folder.glob("text-*.gguf")
    arguments = [str(text), str(mmproj(folder)), str(picture), "--raw", "{media}", "--predict", "0", "--cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.peers.mtmd", *arguments, "--plain-weights", "--threads", "2"],
        capture_output=True,
        timeout=120,
        check=False,
    )
    return done.returncode == 0


@pytest.mark.parametrize(
    ("spec", "kind", "loads"),
    [(WHOLE, kind, True) for kind in K_QUANTS] + [(TINY, kind, False) for kind in K_QUANTS] + [(TINY, "Q8_0", True)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_stock_libmtmd_takes_whole_rows_of_k_quants_and_no_padded_ones(
    spec: CheckpointSpec, kind: str, loads: bool, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    PICTURE.save(tmp_path / "page.png")
    assert stock_encodes(make_model(spec, "F32", kind), tmp_path / "page.png") == loads


def test_rows_that_are_neither_exact_nor_whole_blocks_are_an_error(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    path = mmproj(make_model(TINY, "F32", "Q6_K"))
    other = copy_gguf(path, tmp_path / "other.gguf", change={"clip.vision.feed_forward_length": 700})
    expected = r"'v.blk.0.ffn_up.weight' with shape \(256, 256\), expected \(700, 192\) or \(700, 256\) by its metadata"
    with pytest.raises(ModelFileError, match=expected):
        VisionEncoder(other, device="cpu")
    rows = copy_gguf(path, tmp_path / "rows.gguf", tensors={"v.blk.0.attn_q.weight": np.zeros((192, 256), np.float32)})
    with pytest.raises(ModelFileError, match=r"with shape \(192, 256\), expected \(192, 192\) by its metadata"):
        VisionEncoder(rows, device="cpu")


def test_every_vision_type_has_a_number_of_llama_cpps() -> None:
    numbers = [policy.file_type(kind) for kind in policy.VISION_TYPES]
    assert numbers == [0, 1, 32, 7, 18, 16, 14, 2, 25]
