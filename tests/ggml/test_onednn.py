"""oneDNN's products and attention inside ggml graphs, compared with NumPy in double precision."""

from __future__ import annotations

import _ctypes
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from granite4v.errors import DeviceError
from granite4v.ggml import onednn
from granite4v.ggml.backend import Backend
from granite4v.ggml.graph import Graph, ShapeError
from granite4v.ggml.kernels import ATTENTION, ONEDNN, ONEDNN_BF16, PLAIN, available_kernels

installed = pytest.mark.skipif(not onednn.is_installed(), reason="the extra 'onednn' is for Linux on x86-64")
# bfloat16 has 8 significant bits: each factor is off by at most 2^-9
TOLERANCES = {"F32": 2e-6, "BF16": 2 * 2**-9}

erf = np.vectorize(math.erf)
ACTIVATIONS: dict[str | None, Callable[[np.ndarray], np.ndarray]] = {
    None: lambda z: z,
    "gelu": lambda z: z / 2 * (1 + erf(z / math.sqrt(2))),
    "gelu_pytorch_tanh": lambda z: z / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    "quick_gelu": lambda z: z / (1 + np.exp(-1.702 * z)),
}


@pytest.fixture
def backend() -> Iterator[Backend]:
    backend = Backend("cpu", 2)
    yield backend
    backend.close()


@pytest.fixture
def graph(backend: Backend) -> Iterator[Graph]:
    graph = Graph(backend, 200)
    yield graph
    graph.close()


def arithmetics() -> list[str]:
    return ["F32", "BF16"] if onednn.multiplies_bfloat16() else ["F32"]


def values(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@installed
@pytest.mark.parametrize("arithmetic", arithmetics())
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_products_are_numpys(graph: Graph, arithmetic: str, act: str | None) -> None:
    """Two groups of rows share one weight, whose rows are longer than the inputs; with a bias and without."""
    n, n_in, n_out = 37, 72, 50
    x, weight, bias = values(1, 2, n, n_in), values(2, n_out, n_in + 24), values(3, n_out)
    inputs = [graph.input(f"x{i}", "F32", n_in, n) for i in (0, 1)]
    w, b = graph.input("w", "F32", n_in + 24, n_out), graph.input("b", "F32", n_out)
    for i, given in enumerate((b, None)):
        y = graph.product(w, inputs[i], given, arithmetic=arithmetic, activation=act)
        graph.output(f"y{i}", y)
    found = graph.run(x0=x[0], x1=x[1], w=weight, b=bias)
    for i, added in enumerate((bias, 0.0)):
        exact = x[i].astype(np.float64) @ weight[:, :n_in].astype(np.float64).T + added
        size = np.abs(x[i]) @ np.abs(weight[:, :n_in]).T + 1
        assert (np.abs(found[f"y{i}"] - ACTIVATIONS[act](exact)) <= 1.2 * TOLERANCES[arithmetic] * size).all()


@installed
@pytest.mark.skipif(not onednn.multiplies_bfloat16(), reason="this CPU has no bfloat16 products")
def test_a_product_may_give_what_the_next_takes(graph: Graph) -> None:
    x, first, second = values(1, 20, 64), values(2, 96, 64) / 8, values(3, 32, 96) / 10
    inner = graph.product(
        graph.input("w1", "F32", 64, 96), graph.input("x", "F32", 64, 20), None, arithmetic="BF16", kind="BF16"
    )
    assert inner.type_name == "BF16"
    graph.output("y", graph.product(graph.input("w2", "F32", 96, 32), inner, None, arithmetic="BF16"))
    y = graph.run(x=x, w1=first, w2=second)["y"]
    exact = x.astype(np.float64) @ first.T.astype(np.float64) @ second.T.astype(np.float64)
    assert np.abs(y - exact).max() < 0.02 * exact.std()


@installed
@pytest.mark.parametrize("arithmetic", arithmetics())
@pytest.mark.parametrize(("n", "m", "n_heads", "head"), [(9, 9, 3, 8), (40, 600, 6, 24), (700, 700, 4, 72)])
def test_attention_is_numpys(graph: Graph, arithmetic: str, n: int, m: int, n_heads: int, head: int) -> None:
    """Including more scores than are kept at a time."""
    dim = n_heads * head
    arrays = {"q": 3 * values(1, n, dim), "k": values(2, m, dim), "v": values(3, m, dim)}
    q, k, v = (graph.input(name, "F32", *array.shape[::-1]) for name, array in arrays.items())
    graph.output("y", graph.cast(graph.product_attention(q, k, v, n_heads, arithmetic), "F32"))
    y = graph.run(**arrays)["y"]
    q64, k64, v64 = (a.astype(np.float64).reshape(-1, n_heads, head).transpose(1, 0, 2) for a in arrays.values())
    scores = np.exp(q64 @ k64.transpose(0, 2, 1) / math.sqrt(head))
    exact = (scores / scores.sum(axis=-1, keepdims=True) @ v64).transpose(1, 0, 2).reshape(n, dim)
    assert np.abs(y - exact).max() < (2e-5 if arithmetic == "F32" else 0.05)
    assert np.sqrt(((y - exact) ** 2).mean()) < (1e-6 if arithmetic == "F32" else 0.005)


@installed
def test_progress_does_not_change_values(graph: Graph) -> None:
    x, weight = values(1, 30, 64), values(2, 64, 64)
    w, h = graph.input("w", "F32", 64, 64), graph.input("x", "F32", 64, 30)
    for _ in range(5):
        h = graph.normalize(graph.product(w, h, None, arithmetic="F32"), 1e-6)
    graph.output("y", h)
    seen: list[tuple[int, int]] = []
    with_progress = graph.run(lambda done, of: seen.append((done, of)), x=x, w=weight)["y"]
    assert np.array_equal(with_progress, graph.run(x=x, w=weight)["y"])
    assert seen[-1][0] == seen[-1][1] and [done for done, _ in seen] == sorted({done for done, _ in seen})


@installed
def test_shapes_that_do_not_fit_are_errors(graph: Graph) -> None:
    w, x, b = graph.input("w", "F32", 64, 32), graph.input("x", "F32", 80, 5), graph.input("b", "F32", 31)
    with pytest.raises(ShapeError, match=r"cannot multiply F32\[64, 32, 1, 1\] with F32\[80, 5, 1, 1\]"):
        graph.product(w, x, None, arithmetic="F32")
    with pytest.raises(ShapeError, match="cannot multiply"):
        graph.product(w, graph.input("y", "F32", 64, 5), b, arithmetic="F32")
    with pytest.raises(ShapeError, match="attention does not fit"):
        graph.product_attention(x, x, x, 3, "F32")


def test_kernels_are_offered_where_they_can_run(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "is_installed", lambda: True)
    monkeypatch.setattr(onednn, "multiplies_bfloat16", lambda: False)
    assert ONEDNN in available_kernels(backend, "F16") and ONEDNN_BF16 not in available_kernels(backend, "F16")
    monkeypatch.setattr(onednn, "multiplies_bfloat16", lambda: True)
    assert list(available_kernels(backend, ATTENTION)) == [PLAIN, ONEDNN, ONEDNN_BF16]
    monkeypatch.setattr(onednn, "is_installed", lambda: False)
    monkeypatch.setattr(onednn, "multiplies_bfloat16", lambda: False)
    assert list(available_kernels(backend, ATTENTION)) == [PLAIN]


def test_a_missing_library_is_an_error_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "library", lambda: None)
    with pytest.raises(DeviceError, match=r"pip install 'granite4v\[onednn\]'"):
        onednn.OneDnn(1)


@pytest.mark.parametrize("content", [b"no library", None])
def test_a_file_that_is_not_onednn_counts_as_not_installed(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a damaged file nor another library is accepted."""
    path = tmp_path / "libdnnl.so.3"
    if content is None:
        path.write_bytes(Path(_ctypes.__file__).read_bytes())
    else:
        path.write_bytes(content)
    monkeypatch.setattr(onednn, "find_library", lambda: str(path))
    assert onednn.library.__wrapped__() is None
