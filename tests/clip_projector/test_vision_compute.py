"""Matrices quantized in memory: the values equal those of a requantized file in every layout of the file, or there is a
message."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest

from granite4v.clip_projector import VisionEncoder, load_image
from granite4v.clip_projector import encoder as encoder_module
from granite4v.clip_projector.encoder import quantized_in_memory
from granite4v.converter import requantize
from granite4v.errors import DeviceError
from granite4v.ggml import autotune, onednn
from granite4v.ggml.backend import Aborted
from granite4v.ggml.gguf_file import GgufFile
from granite4v.ggml.kernel_timing import MANY
from granite4v.ggml.kernels import FLOAT32, PLAIN
from granite4v.ggml.quantize import quantize_rows
from tests.helpers.gguf_edit import copy_gguf, unpadded
from tests.helpers.pictures import noise_picture
from tests.peers.reference import relative_l2
from tests.toy.checkpoint import PRESETS

TINY = replace(PRESETS["tiny"], dtype="float16")
PICTURE = noise_picture((150, 100))


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel is measured, so each type is multiplied by its plain one."""
    monkeypatch.setattr(autotune, "times", lambda backend, wanted, *_: {trial.type_name: {} for trial in wanted})


def streams(path: Path, vision_compute: Any = "file") -> np.ndarray:
    with VisionEncoder(path, "cpu", 2, vision_compute=vision_compute) as encoder:
        assert encoder.quantized_as == (None if vision_compute == "file" else vision_compute)
        return encoder.encode([load_image(PICTURE)])[0].streams.copy()


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K"])
def test_the_values_are_those_of_a_requantized_file(kind: str, make_model: Callable[..., Path], tmp_path: Path) -> None:
    for own in ("F32", "BF16"):
        path = make_model(TINY, "F32", own) / f"mmproj-{own}.gguf"
        expected = streams(requantize(path, kind, tmp_path / f"{own}.gguf"))
        np.testing.assert_array_equal(streams(path, kind), expected)
    path = make_model(TINY, "F32", "F16") / "mmproj-F16.gguf"
    found = streams(path, kind)
    # patches stay in F16, which rounds pixels differently and so moves some activations to the next integer
    assert relative_l2(found, streams(requantize(path, kind, tmp_path / "F16.gguf"))) < 2e-2
    other = unpadded(path, tmp_path / "unpadded.gguf", TINY.vision_ffn)
    np.testing.assert_array_equal(streams(other, kind), found)


@pytest.mark.usefixtures("plain")
def test_quantized_matrices_stay_and_so_do_their_widths(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """Official Q8_0 files have the second feed-forward matrix in F16, because its rows of 4304 are not whole blocks."""
    source = make_model(TINY, "F32", "F16") / "mmproj-F16.gguf"
    half, mixed = unpadded(source, tmp_path / "half.gguf", TINY.vision_ffn), {}
    for tensor in gguf.GGUFReader(half).tensors:
        if ".attn_" in tensor.name and tensor.name.endswith("weight"):
            mixed[tensor.name] = quantize_rows(tensor.data.astype(np.float32), "Q8_0", 1), "Q8_0"
    path = copy_gguf(half, tmp_path / "mixed.gguf", tensors=mixed)
    found = streams(path, "Q8_0")
    assert 0 < relative_l2(found, streams(path)) < 2e-2
    # the zeros of a requantized file only change blocks that contain both zeros and values
    assert relative_l2(found, streams(half, "Q8_0")) < 1e-2


@pytest.mark.usefixtures("plain")
def test_a_file_without_float_matrices_is_left_as_it_is(make_model: Callable[..., Path]) -> None:
    path = make_model(TINY, "F32", "Q8_0") / "mmproj-Q8_0.gguf"
    with VisionEncoder(path, "cpu", 2, vision_compute="Q6_K") as encoder:
        assert encoder.quantized_as is None


@pytest.mark.skipif(not onednn.multiplies_bfloat16(), reason="needs the extra 'onednn' and a CPU with bfloat16")
def test_factors_are_rounded_to_bfloat16(make_model: Callable[..., Path]) -> None:
    """The file has float32 weights that are exact in bfloat16: only activations are rounded, by at most 2^-9."""
    exact = make_model(replace(TINY, dtype="bfloat16"), "F32", "F32") / "mmproj-F32.gguf"
    with VisionEncoder(exact, "cpu", 2, vision_compute="BF16") as encoder:
        assert {kernel.arithmetic for kernel in encoder.kernels.values()} == {"BF16"}
        assert encoder.quantized_as is None
        found = encoder.encode([load_image(PICTURE)])[0].streams.copy()
    assert 1e-4 < relative_l2(found, streams(exact)) < 2e-2


def test_bfloat16_is_refused_where_it_cannot_be_computed(
    make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "multiplies_bfloat16", lambda: False)
    with pytest.raises(DeviceError, match=r"needs a CPU with AVX-512 BF16 or AMX, and oneDNN .*'granite4v\[onednn\]'"):
        VisionEncoder(make_model(TINY, "F32", "F16") / "mmproj-F16.gguf", "cpu", 2, vision_compute="BF16")


def test_int8_is_the_faster_type_with_the_faster_kernel(
    make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels that widen weights to floats are not considered."""
    times = {"Q8_0": {PLAIN: {MANY: 1.0}, FLOAT32: {MANY: 0.1}}, "Q6_K": {PLAIN: {MANY: 0.5}}}
    monkeypatch.setattr(autotune, "times", lambda *_: times)
    monkeypatch.setattr(autotune, "vision_kernels", lambda *_, **__: {})
    path = make_model(TINY, "F32", "F16") / "mmproj-F16.gguf"
    with VisionEncoder(path, "cpu", 2, vision_compute="int8") as encoder:
        assert (encoder.quantized_as, encoder.kernels["Q6_K"].name) == ("Q6_K", PLAIN)
    times["Q8_0"][PLAIN][MANY] = 0.4
    with VisionEncoder(path, "cpu", 2, vision_compute="int8") as encoder:
        assert (encoder.quantized_as, encoder.kernels["Q8_0"].name) == ("Q8_0", PLAIN)


def test_a_gpu_and_a_wrong_word_are_refused(make_model: Callable[..., Path]) -> None:
    path = make_model(TINY, "F32", "F16") / "mmproj-F16.gguf"
    with GgufFile.open(path) as file:
        gpu: Any = SimpleNamespace(is_cpu=False, name="CUDA0")
        assert quantized_in_memory(file, gpu, "file") is None
        with pytest.raises(DeviceError, match="'int8' is for the CPU, but .* 'CUDA0'; leave it out, or use"):
            quantized_in_memory(file, gpu, "int8")
    wrong: Any = "int4"
    with pytest.raises(ValueError, match="vision_compute is 'int4'; expected one of"):
        VisionEncoder(path, "cpu", vision_compute=wrong)


@pytest.mark.usefixtures("plain")
def test_quantizing_can_be_aborted(make_model: Callable[..., Path]) -> None:
    path = make_model(TINY, "F32", "F16") / "mmproj-F16.gguf"
    callback = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)(lambda _: True)
    address = ctypes.cast(callback, ctypes.c_void_p).value
    assert address is not None
    with pytest.raises(Aborted):
        VisionEncoder(path, "cpu", 2, abort=(address, 0), vision_compute="Q8_0")


@pytest.mark.usefixtures("plain")
def test_a_closed_encoder_says_so(make_model: Callable[..., Path]) -> None:
    encoder = VisionEncoder(make_model(TINY, "F32", "F16") / "mmproj-F16.gguf", "cpu", 2)
    encoder.encode([load_image(PICTURE)])
    encoder.close()
    with pytest.raises(ValueError, match="closed"):
        encoder.encode([load_image(PICTURE)])
    encoder.release()
    encoder.close()


@pytest.mark.usefixtures("plain")
def test_small_graphs_stay_and_large_ones_go_with_the_same_features(
    make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[object] = []
    hidden_states = encoder_module.hidden_states

    def counted(graph: Any, *rest: Any, **options: Any) -> Any:
        built.append(graph)
        return hidden_states(graph, *rest, **options)

    monkeypatch.setattr(encoder_module, "hidden_states", counted)
    with VisionEncoder(make_model(TINY, "F32", "F16") / "mmproj-F16.gguf", "cpu", 2) as encoder:
        built.clear()  # the first graph is built to check the file
        features = []
        for least in (encoder_module.SMALL_NBYTES, encoder_module.SMALL_NBYTES, 0, 0):
            monkeypatch.setattr(encoder_module, "SMALL_NBYTES", least)
            features.append(encoder.encode([load_image(PICTURE)])[0].rows)
            assert encoder.release() == (least == 0)
    assert len(built) == 2
    for others in features[1:]:
        np.testing.assert_array_equal(others, features[0])
