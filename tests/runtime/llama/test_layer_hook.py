"""Tests of computing between llama.cpp's layers: which rows the hook gets, and how errors are raised."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from granite4v.errors import DeviceError
from granite4v.ggml.backend import Aborted, Backend
from granite4v.ggml.compiled import between_layers
from granite4v.ggml.compiled.between_layers import InPlace
from granite4v.ggml.compiled.nodes import NO_KERNELS, NodeKernels
from granite4v.ggml.graph import Graph
from granite4v.runtime.llama.abort import AbortFlag
from granite4v.runtime.llama.context import BatchRows, LlamaContext, node_callback
from granite4v.runtime.llama.layer_hook import LayerHook
from granite4v.runtime.llama.model import LlamaModel
from tests.toy.checkpoint import PRESETS

SPEC = PRESETS["tiny-mllama"]  # its text file is a plain llama, of five layers
N_LAYERS = SPEC.text_layers - len(SPEC.cross_layers)
TOKENS = np.arange(3, 23, dtype=np.int32)


@pytest.fixture(scope="module")
def text(make_model: Callable[..., Path]) -> Iterator[LlamaModel]:
    with LlamaModel(make_model(SPEC) / "text-F32.gguf") as model:
        yield model


class Seen:
    """Records the rows before each layer and returns them scaled."""

    def __init__(self, points: Mapping[int, float]) -> None:
        """`points`: the factor of the rows, by the number of layers before."""
        self.rows: dict[int, np.ndarray] = {}
        self.n_threads: set[int] = set()
        self.hook = LayerHook(N_LAYERS, {point: self.at(point, factor) for point, factor in points.items()})
        self.hook.is_wanted = True

    def at(self, point: int, factor: float) -> Callable[[np.ndarray, int], np.ndarray]:
        def compute(rows: np.ndarray, n_threads: int) -> np.ndarray:
            self.rows[point] = rows.copy()
            self.n_threads.add(n_threads)
            return rows * np.float32(factor)

        return compute


def context(text: LlamaModel, hook: LayerHook | None, **options: Any) -> LlamaContext:
    return LlamaContext(text, 64, 64, 1, exact=True, hook=hook, **options)


def logits(context: LlamaContext, data: np.ndarray = TOKENS) -> np.ndarray:
    context.truncate(0, 0)
    context.decode(BatchRows.of(data, 0, 0, output=True))
    return context.logits(len(data) - 1)


def test_rows_that_come_back_as_they_were_change_nothing(text: LlamaModel) -> None:
    seen = Seen(dict.fromkeys(range(N_LAYERS + 1), 1.0))
    with context(text, None) as plain, context(text, seen.hook) as hooked:
        assert np.array_equal(logits(hooked), logits(plain))
    assert [len(seen.rows[point]) for point in range(N_LAYERS + 1)] == [*[len(TOKENS)] * N_LAYERS, 1]
    assert len({rows[-1].tobytes() for rows in seen.rows.values()}) == N_LAYERS + 1
    assert seen.n_threads == {1}


def test_what_is_written_is_what_the_next_layer_takes(text: LlamaModel) -> None:
    """The final norm removes scale: scaling rows after the last layer keeps the logits, scaling earlier does not."""
    with context(text, None) as plain:
        expected = logits(plain)
    for point, is_same in ((N_LAYERS, True), (N_LAYERS - 1, False), (0, False)):
        with context(text, Seen({point: 3.0}).hook) as hooked:
            assert bool(np.abs(logits(hooked) - expected).max() < 1e-3) == is_same, point


def test_rows_of_embeddings_are_computed_beforehand(text: LlamaModel) -> None:
    rows = np.random.default_rng(1).standard_normal((6, text.n_embd)).astype(np.float32)
    seen = Seen({0: 2.0, 1: 1.0})
    with context(text, None) as plain, context(text, seen.hook) as hooked:
        assert np.array_equal(logits(hooked, rows), logits(plain, 2 * rows))
    assert np.array_equal(seen.rows[0], rows)


def test_nothing_comes_by_unless_it_is_wanted(text: LlamaModel) -> None:
    seen = Seen({0: 2.0, 2: 2.0})
    seen.hook.is_wanted = False
    with context(text, None) as plain, context(text, seen.hook) as hooked:
        assert np.array_equal(logits(hooked), logits(plain))
        assert not seen.rows
        seen.hook.is_wanted = True
        assert not np.array_equal(logits(hooked), logits(plain))


def test_a_batch_without_outputs_has_no_rows_after_the_last_layer(text: LlamaModel) -> None:
    seen = Seen({N_LAYERS: 1.0, 1: 1.0})
    with context(text, seen.hook) as hooked:
        hooked.decode(BatchRows.of(TOKENS, 0, 0, output=False))
    assert set(seen.rows) == {1}


class Scaled:
    """Scales the rows after layer 1: by a graph for `n_rows` rows, or by Python, which is noted in `by_python`."""

    def __init__(self, width: int, n_rows: int, factor: float, abort: AbortFlag | None = None) -> None:
        addresses = None if abort is None else (abort.callback_address, abort.data_address)
        self.backend, self.factor, self.n_rows = Backend("cpu", 1, addresses), factor, n_rows
        self.graph = Graph(self.backend, 4)
        self.graph.output("rows", self.graph.scale(self.graph.input("rows", "F32", width, n_rows), factor))
        self.graph.run(rows=np.zeros((n_rows, width), np.float32))
        self.by_python: list[int] = []
        self.hook = LayerHook(N_LAYERS, {2: self.compute}, self.find)
        self.hook.is_wanted = True

    def find(self, n_layers_before: int, n_rows: int, n_threads: int) -> InPlace | None:
        assert (n_layers_before, n_threads) == (2, 1)
        return self.graph.in_place("rows", "rows")

    def compute(self, rows: np.ndarray, _: int) -> np.ndarray:
        self.by_python.append(len(rows))
        found = rows * np.float32(self.factor)
        if not np.isfinite(found).all():
            raise ValueError("not finite")
        return found

    def close(self) -> None:
        self.graph.close()
        self.backend.close()


@pytest.fixture
def scaled(text: LlamaModel) -> Iterator[Callable[..., Scaled]]:
    made: list[Scaled] = []

    def make(n_rows: int = len(TOKENS), factor: float = 3.0, abort: AbortFlag | None = None) -> Scaled:
        made.append(Scaled(text.n_embd, n_rows, factor, abort))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("kernels", [NodeKernels.available((16, 1), ["Q4_0"]), NO_KERNELS], ids=["compiled", "ggml"])
def test_graphs_are_computed_without_python(
    kernels: NodeKernels, text: LlamaModel, scaled: Callable[..., Scaled]
) -> None:
    by_graph, by_python = scaled(), Seen({2: 3.0})
    callback = {"node_callback": node_callback(kernels)}
    with context(text, by_python.hook, **callback) as slow, context(text, by_graph.hook, **callback) as fast:
        for _ in range(3):
            assert np.array_equal(logits(fast), logits(slow))
    assert not by_graph.by_python and by_python.rows


def test_graphs_for_other_rows_are_left_to_python(text: LlamaModel, scaled: Callable[..., Scaled]) -> None:
    one, reference = scaled(n_rows=4), Seen({2: 3.0})
    with context(text, reference.hook) as slow, context(text, one.hook) as fast:
        assert np.array_equal(logits(fast), logits(slow))
        assert one.by_python == [len(TOKENS)]
        assert np.array_equal(logits(fast, TOKENS[:4]), logits(slow, TOKENS[:4]))
    assert one.by_python == [len(TOKENS)]


@pytest.mark.parametrize("factor", [np.inf, np.nan, -np.inf])
def test_numbers_that_are_not_finite_are_left_to_python(
    factor: float, text: LlamaModel, scaled: Callable[..., Scaled]
) -> None:
    one = scaled(factor=factor)
    with context(text, one.hook) as hooked:
        with pytest.raises(ValueError, match="not finite"):
            logits(hooked)
        assert one.by_python == [len(TOKENS)]
        one.hook.is_wanted = False
        with context(text, None) as plain:
            assert np.array_equal(logits(hooked), logits(plain))


def test_large_numbers_are_looked_at_by_python(text: LlamaModel, scaled: Callable[..., Scaled]) -> None:
    """Their squares are not finite, but they are."""
    one, reference = scaled(factor=1e30), Seen({2: 1e30})
    with context(text, one.hook) as fast, context(text, reference.hook) as slow:
        assert np.array_equal(logits(fast), logits(slow), equal_nan=True)
    assert one.by_python == [len(TOKENS)]


def test_graphs_that_are_aborted_are_left_to_python(text: LlamaModel, scaled: Callable[..., Scaled]) -> None:
    flag = AbortFlag()
    one = scaled(abort=flag)
    flag.raise_()
    with context(text, one.hook) as hooked:  # llama.cpp itself is not aborted
        logits(hooked)
    assert one.by_python == [len(TOKENS)]


def test_without_llvm_python_computes(
    text: LlamaModel, scaled: Callable[..., Scaled], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(between_layers, "llvm", lambda: None)
    between_layers.address.cache_clear()
    one, reference = scaled(), Seen({2: 3.0})
    between_layers.address.cache_clear()
    monkeypatch.undo()
    with context(text, one.hook) as fast, context(text, reference.hook) as slow:
        assert np.array_equal(logits(fast), logits(slow))
    assert one.by_python == [len(TOKENS)]


@pytest.mark.parametrize("error", [ValueError("between"), Aborted(), KeyboardInterrupt()])
def test_errors_wait_for_the_end_of_the_batch(error: BaseException, text: LlamaModel) -> None:
    seen, failing = Seen({}), True

    def fail(rows: np.ndarray, _: int) -> np.ndarray:
        if failing:
            raise error
        return rows

    hook = LayerHook(N_LAYERS, {1: seen.at(1, 1.0), 3: fail, 4: seen.at(4, 1.0)})
    hook.is_wanted = True
    with context(text, None) as plain, context(text, hook) as hooked:
        with pytest.raises(type(error)):
            logits(hooked)
        assert set(seen.rows) == {1}
        failing = False
        assert np.array_equal(logits(hooked), logits(plain))


def test_a_raised_abort_flag_is_an_abort(text: LlamaModel) -> None:
    flag, seen = AbortFlag(), Seen({1: 1.0})
    with context(text, seen.hook, abort=flag) as hooked:
        flag.raise_()
        with pytest.raises(Aborted):
            logits(hooked)


def test_a_layer_that_does_not_come_by_is_an_error(text: LlamaModel) -> None:
    """As with a llama.cpp that names its tensors differently."""
    hook = LayerHook(N_LAYERS + 2, {N_LAYERS + 1: lambda rows, _: rows})
    hook.is_wanted = True
    with context(text, hook) as hooked, pytest.raises(DeviceError, match=f"'l_out-{N_LAYERS}'"):
        logits(hooked)
