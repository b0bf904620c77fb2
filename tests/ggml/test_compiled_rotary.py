"""The rotary embedding with transformers' angles, compared with float64 and torch, and the nodes that it leaves to
ggml."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.llama4.modeling_llama4 import apply_rotary_emb

from granite4v.ggml.backend import Arena, Backend
from granite4v.ggml.compiled import rotary as rotary_embedding
from granite4v.ggml.compiled.nodes import OP_ROPE, NodeKernels, replace
from granite4v.ggml.compiled.rotary import HALVES, LIBRARY, MAX_NUMBERS, MODE, NEIGHBOURS
from granite4v.ggml.graph import Graph
from granite4v.ggml.library import lib
from granite4v.ggml.types import TYPE_IDS

ROTARY = NodeKernels(rotary=True)
needs_llvm = pytest.mark.skipif(not NodeKernels.available(rotary=True), reason="needs llvmlite")
OPERATION = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
POSITIONS = np.array([0, 1, 8191, 100_000, 1_000_000], np.int32)
BOTH = pytest.mark.parametrize("mode", [NEIGHBOURS, HALVES])
Turn = Callable[..., np.ndarray]


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena(64)
    yield arena
    arena.close()


def node_of(
    arena: Arena,
    x: np.ndarray,
    positions: np.ndarray,
    *,
    factors: np.ndarray | None = None,
    n_dims: int | None = None,
    mode: int = HALVES,
    base: float = 1e4,
    scale: float = 1.0,
    extension: float = 0.0,
    magnitude: float = 1.0,
) -> Any:
    """Makes ggml's in-place operation on `x`, `(streams, positions, heads, head)`."""
    arrays = {"x": x, "positions": positions, **({} if factors is None else {"factors": factors})}
    tensors = {}
    for name, values in arrays.items():
        tensors[name] = arena.tensor("I32" if name == "positions" else "F32", *reversed(values.shape))
        tensors[name].contents.data = values.ctypes.data
        for i, stride in enumerate(reversed(values.strides)):
            tensors[name].contents.nb[i] = stride
    return lib().ggml_rope_ext_inplace(
        *(arena.context, tensors["x"], tensors["positions"], tensors.get("factors")),
        *(x.shape[-1] if n_dims is None else n_dims, mode, 4096, base, scale, extension, magnitude, 32.0, 1.0),
    )


@pytest.fixture
def turn(arena: Arena) -> Turn:
    """Returns a function that runs the compiled operation, for one thread after the other."""

    def computed(
        x: np.ndarray, positions: np.ndarray, *, n_threads: int = 1, in_place: bool = False, **options: Any
    ) -> np.ndarray:
        node = node_of(arena, x, positions, **options)
        assert replace(node, ROTARY)
        found = x if in_place else np.full(x.shape, np.nan, np.float32)
        node.contents.data = found.ctypes.data
        for i, stride in enumerate(reversed(found.strides)):
            node.contents.nb[i] = stride
        operation = OPERATION(int(np.frombuffer(node.contents.op_params, np.int64, 1)[0]))
        for ith in reversed(range(n_threads)):
            operation(ctypes.addressof(node.contents), ith, n_threads, None)
        return found

    return computed


def drawn(n_positions: int, *, n_heads: int = 3, head: int = 64, n_streams: int = 1) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.standard_normal((n_streams, n_positions, n_heads, head), dtype=np.float32)


def frequencies_of(n_dims: int, base: float) -> np.ndarray:
    """Computes each step in float32, with powers in float64."""
    exponents = np.arange(0, n_dims, 2, dtype=np.float32) / np.float32(n_dims)
    return np.float32(1) / (base ** exponents.astype(np.float64)).astype(np.float32)


def turned(x: np.ndarray, angles: np.ndarray, mode: int) -> np.ndarray:
    """Rotates `x` in float64. `angles`: `(positions, pairs)`."""
    n_pairs, found = angles.shape[1], x.astype(np.float64)
    first = np.arange(n_pairs) * (1 if mode == HALVES else 2)
    second = first + (n_pairs if mode == HALVES else 1)
    a, b = found[..., first], found[..., second]
    cosine, sine = (function(angles.astype(np.float64))[:, None] for function in (np.cos, np.sin))
    found[..., first], found[..., second] = a * cosine - b * sine, a * sine + b * cosine
    return found


def test_the_number_of_the_operation_is_that_of_the_library() -> None:
    assert lib().ggml_op_name(OP_ROPE) == b"ROPE"


@needs_llvm
@BOTH
@pytest.mark.parametrize(
    ("head", "n_dims", "base", "has_factors", "scale"),
    [
        (64, 64, 1e4, False, 1.0),
        (80, 80, 5e5, False, 1.0),
        (128, 128, 1e7, False, 1.0),
        (128, 128, 5e5, True, 1.0),
        (96, 32, 1e6, False, 1.0),
        (64, 62, 1e4, True, 0.25),
        (2, 2, 1e4, False, 1.0),
        (MAX_NUMBERS, MAX_NUMBERS, 1e4, False, 1.0),
    ],
)
def test_its_values_are_those_of_float64_at_float32_angles(
    turn: Turn, mode: int, head: int, n_dims: int, base: float, has_factors: bool, scale: float
) -> None:
    x = drawn(len(POSITIONS), head=head, n_streams=2)
    factors = np.linspace(1, 8, n_dims // 2, dtype=np.float32) if has_factors else None
    frequencies = frequencies_of(n_dims, base) * np.float32(scale)
    if factors is not None:
        frequencies = frequencies / factors
    expected = turned(x, POSITIONS.astype(np.float32)[:, None] * frequencies, mode)
    found = turn(x, POSITIONS, mode=mode, n_dims=n_dims, base=base, factors=factors, scale=scale)
    assert np.abs(found - expected).max() < 5e-7  # the last bit of the largest angle is 0.06
    assert (found[..., n_dims:] == x[..., n_dims:]).all() and (found[:, 0] == x[:, 0]).all()


@needs_llvm
@BOTH
@pytest.mark.parametrize("base", [1e4, 5e5, 1e6, 1e7])
@pytest.mark.parametrize("n_dims", [64, 80, 128])
def test_frequencies_are_torchs_to_the_bit(turn: Turn, n_dims: int, base: float, mode: int) -> None:
    """Except one in a hundred, for which torch's power is the second nearest float32, as with AVX.

    For inputs (1, 0) the results are the cosine and the sine. Ten angles at far positions include some that distinguish
    frequencies which differ only in the last bit.
    """
    plain = (1.0 / base ** (torch.arange(0, n_dims, 2, dtype=torch.int64).float() / n_dims)).numpy()
    positions = np.arange(999_983, 999_993, dtype=np.int32)
    ones = np.zeros((1, len(positions), 1, n_dims), np.float32)
    first = np.s_[0, :, 0, : n_dims // 2] if mode == HALVES else np.s_[0, :, 0, ::2]
    second = np.s_[0, :, 0, n_dims // 2 :] if mode == HALVES else np.s_[0, :, 0, 1::2]
    ones[first] = 1
    found = turn(ones, positions, base=base, mode=mode)
    angles = (positions.astype(np.float32)[:, None] * plain).astype(np.float64)
    expected = {np.cos: first, np.sin: second}
    is_theirs = [(function(angles).astype(np.float32) == found[part]).all(0) for function, part in expected.items()]
    n_others = np.count_nonzero(~(is_theirs[0] & is_theirs[1]))
    assert n_others <= 1 and is_theirs[0][: n_dims // 8].all()
    nearest = frequencies_of(n_dims, base)
    assert np.abs(nearest.view(np.int32) - plain.view(np.int32)).max() <= 1


@needs_llvm
@BOTH
@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0},
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_its_values_are_transformers(turn: Turn, scaling: dict[str, Any], mode: int) -> None:
    """As its decoders rotate queries: neighbours for Llama 4, halves for all others."""
    parameters = {**scaling, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    config = LlamaConfig(hidden_size=192, num_attention_heads=3, rope_parameters=parameters)
    x, rotary = drawn(len(POSITIONS)), LlamaRotaryEmbedding(config)
    queries, places = torch.from_numpy(x), torch.from_numpy(POSITIONS)[None]
    if mode == HALVES:
        expected = apply_rotary_pos_emb(queries, queries, *rotary(queries, places), unsqueeze_dim=2)[0]
    else:
        angles = places[..., None].float() * rotary.inv_freq
        expected = apply_rotary_emb(queries, queries, torch.polar(torch.ones_like(angles), angles))[0]
    is_long = 2 * np.pi * 10000.0 ** (np.arange(0, 64, 2) / 64) > 64
    factors = np.where(is_long, 16, 1).astype(np.float32) if scaling["rope_type"] == "llama3" else None
    scale = 0.25 if scaling["rope_type"] == "linear" else 1.0
    found = turn(x, POSITIONS, mode=mode, factors=factors, scale=scale)
    assert np.abs(found - expected.numpy()).max() < 1e-6


@needs_llvm
@BOTH
def test_threads_and_memory_change_no_bit(turn: Turn, mode: int) -> None:
    """More threads than positions; in place; and from strided memory, like queries next to keys."""
    wide = drawn(4, n_heads=5, head=72)
    x = np.ascontiguousarray(wide[:, :, 1:4, :64])
    positions = np.array([7, 0, 123_456, 3], np.int32)
    expected = turn(x, positions, mode=mode)
    for n_threads in (2, 3, 9):
        assert (turn(x, positions, mode=mode, n_threads=n_threads) == expected).all()
    assert (turn(wide[:, :, 1:4, :64], positions, mode=mode) == expected).all()
    before = wide.copy()
    turn(wide[:, :, 1:4, :64], positions, mode=mode, n_threads=2, in_place=True)
    assert (wide[:, :, 1:4, :64] == expected).all()
    wide[:, :, 1:4, :64] = before[:, :, 1:4, :64]
    assert (wide == before).all()


@needs_llvm
@pytest.mark.parametrize("n_threads", [1, 2])
def test_ggmls_threads_compute_it(turn: Turn, n_threads: int) -> None:
    """In a graph that is computed again with other positions, as llama.cpp does."""
    x, backend = drawn(5), Backend("cpu", n_threads)
    graph = Graph(backend, 16)
    try:
        places = graph.input("positions", "I32", len(POSITIONS))
        source = graph.scale(graph.input("x", "F32", *reversed(x.shape)), 1.0)
        node = graph.rotate_(source, places, 1e4)
        assert replace(node.ptr, ROTARY) and replace(node.ptr, ROTARY)  # the second time it is left unchanged
        graph.output("y", graph.scale(node, 1.0))
        for positions in (POSITIONS, POSITIONS[::-1].copy(), POSITIONS):
            expected = turn(x, positions, mode=NEIGHBOURS)
            assert (graph.run(x=x, positions=positions)["y"].reshape(x.shape) == expected).all()
    finally:
        graph.close()
        backend.close()


@needs_llvm
def test_what_it_cannot_compute_is_left_to_ggml(arena: Arena) -> None:
    def taken(mode: int = HALVES, kind: str = "F32", head: int = 64, **options: Any) -> bool:
        node = node_of(arena, drawn(1, head=head), POSITIONS[:1], **options)
        node.contents.op_params[MODE] = mode
        node.contents.src[0].contents.type = TYPE_IDS[kind]
        before = bytes(node.contents.op_params)
        is_taken = replace(node, ROTARY)
        assert is_taken or (node.contents.op == OP_ROPE and bytes(node.contents.op_params) == before)
        return is_taken

    assert taken() and taken(mode=NEIGHBOURS) and taken(scale=0.5, base=7.0, n_dims=32)
    assert not taken(mode=8) and not taken(mode=24) and not taken(mode=40)  # several positions for each token
    assert not taken(extension=1.0) and not taken(magnitude=0.5)  # YaRN
    assert not taken(kind="F16") and not taken(head=MAX_NUMBERS + 2)
    assert not replace(node_of(arena, drawn(1), POSITIONS[:1]), NodeKernels())


def test_a_process_without_cs_functions_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotary_embedding, "LIBRARY", {**LIBRARY, "no_such_function": 1})
    assert not rotary_embedding.is_available() and not NodeKernels.available(rotary=True)


FAILS = """
import warnings
from granite4v.ggml.compiled import nodes

def fail(*_):
    raise RuntimeError("no {such} CPU")

nodes.compiled = fail
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    assert not nodes.NodeKernels.available(rotary=True) and not nodes.NodeKernels.available(rotary=True)
print(*((warning.category.__name__, warning.message) for warning in said))
"""


@needs_llvm
def test_where_llvm_fails_there_is_none() -> None:
    """In a child process, because compiled kernels stay in memory."""
    said = subprocess.run([sys.executable, "-c", FAILS], capture_output=True, text=True, check=True).stdout
    assert said.count("cannot compile") == said.count("'UserWarning'") == 1
    assert "cannot compile kernels (no {such} CPU), so far positions differ more from transformers'; install" in said
