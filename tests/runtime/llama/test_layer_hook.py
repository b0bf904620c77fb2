"""Computing between llama.cpp's layers: which rows come by, and what happens to errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from granite4v.errors import DeviceError
from granite4v.ggml.backend import Aborted
from granite4v.runtime.llama.abort import AbortFlag
from granite4v.runtime.llama.context import BatchRows, LlamaContext
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
    """Notes the rows that come by before each layer, and gives them back changed."""

    def __init__(self, points: Mapping[int, float]) -> None:
        """`points`: what the rows are multiplied by, by the number of layers before."""
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
    """The last norm takes scale out: rows that are scaled after the last layer give the same logits, before it not."""
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
    """As with a llama.cpp that names its tensors otherwise."""
    hook = LayerHook(N_LAYERS + 2, {N_LAYERS + 1: lambda rows, _: rows})
    hook.is_wanted = True
    with context(text, hook) as hooked, pytest.raises(DeviceError, match=f"'l_out-{N_LAYERS}'"):
        logits(hooked)
