"""Tests of llama.cpp's context as we use it: independent sequences, shared prefixes, and input refused before C."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from granite4v.errors import DeviceError
from granite4v.ggml.backend import Aborted
from granite4v.ggml.cpu import FreeThreads
from granite4v.runtime.llama.abort import AbortFlag
from granite4v.runtime.llama.context import BatchRows, LlamaContext
from granite4v.runtime.llama.library import llama
from granite4v.runtime.llama.model import LlamaModel
from tests.toy.spec import PRESETS

TOKENS = np.arange(3, 60, dtype=np.int32)


@pytest.fixture(scope="module")
def text(make_model: Callable[..., Path]) -> Iterator[LlamaModel]:
    with LlamaModel(make_model(PRESETS["tiny"]) / "text-F32.gguf") as model:
        yield model


def prefilled(context: LlamaContext, tokens: np.ndarray, sequence: int = 0) -> np.ndarray:
    context.decode(BatchRows.of(tokens, 0, sequence, output=True))
    return context.logits(len(tokens) - 1)


def step(context: LlamaContext, *rows: tuple[int, int, int]) -> list[np.ndarray]:
    """Decodes one token in each of some sequences, given as (token, position, sequence); returns the logits."""
    parts = [BatchRows.of(np.array([token], np.int32), position, s, output=True) for token, position, s in rows]
    context.decode(BatchRows.joined(parts))
    return [context.logits(i) for i in range(len(rows))]


def test_tokens_of_one_batch_and_one_by_one_give_the_same_logits(text: LlamaModel) -> None:
    """Up to rounding."""
    with LlamaContext(text, 256, 64, 1, exact=True) as context:
        together = prefilled(context, TOKENS)
        context.truncate(0, 0)
        for position, token in enumerate(TOKENS.tolist()):
            (last,) = step(context, (token, position, 0))
        np.testing.assert_allclose(last, together, atol=1e-4)


def test_each_batch_is_computed_with_the_threads_that_are_free(
    text: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    free, numbers = FreeThreads(3), iter((3, 1, 2))
    monkeypatch.setattr(free, "now", lambda: next(numbers))
    with LlamaContext(text, 256, 64, 3, free_threads=free) as context:
        for i, expected in enumerate((3, 1, 2)):
            step(context, (7, i, 0))
            lib = llama()
            assert (lib.llama_n_threads(context.handle), lib.llama_n_threads_batch(context.handle)) == (expected,) * 2


def test_a_sequence_alone_has_the_same_bits_whatever_others_hold(text: LlamaModel) -> None:
    with LlamaContext(text, 256, 64, 1) as alone, LlamaContext(text, 256, 64, 1, n_seq_max=4) as crowded:
        expected = prefilled(alone, TOKENS), step(alone, (7, len(TOKENS), 0))[0]
        for sequence in (0, 1, 3):
            prefilled(crowded, TOKENS[sequence:] + 1, sequence)
        found = prefilled(crowded, TOKENS, 2), step(crowded, (7, len(TOKENS), 2))[0]
        np.testing.assert_array_equal(found, expected)


def test_a_row_among_others_depends_on_nothing_but_their_number(text: LlamaModel) -> None:
    """With float32 weights it does not even depend on whether there are two rows or four."""
    n = len(TOKENS)
    with LlamaContext(text, 256, 64, 1, n_seq_max=4) as context:
        for sequence in range(4):
            prefilled(context, TOKENS + sequence, sequence)
        two = step(context, (7, n, 0), (9, n, 1))[0]
        for sequence in range(4):
            context.truncate(sequence, n)
        four = step(context, (7, n, 0), (9, n, 1), (11, n, 2), (13, n, 3))[0]
        np.testing.assert_array_equal(two, four)


def test_a_copied_prefix_goes_on_as_its_own_would(text: LlamaModel) -> None:
    n = len(TOKENS)
    with LlamaContext(text, 256, 64, 1, n_seq_max=2) as context:
        prefilled(context, TOKENS)
        expected = step(context, (7, n, 0))[0]
        prefilled(context, TOKENS + 5, 1)
        context.copy(0, 1, n)
        np.testing.assert_array_equal(step(context, (7, n, 1))[0], expected)
        context.copy(0, 1, 20)
        rest = BatchRows.of(TOKENS[20:], 20, 1, output=True)
        context.decode(rest)
        np.testing.assert_allclose(context.logits(len(rest) - 1), prefilled_again(context), atol=2e-2)


def prefilled_again(context: LlamaContext) -> np.ndarray:
    context.truncate(0, 0)
    return prefilled(context, TOKENS)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("before", "after"), [((2, 1), (2, 1)), ((4, 3), (1, 0)), ((1, 0), (4, 2)), ((4, 1), (3, 2))])
def test_a_state_moves_to_a_larger_context_with_any_sequences(
    text: LlamaModel, before: tuple[int, int], after: tuple[int, int], exact: bool
) -> None:
    """`before`, `after`: the number of sequences, and which one holds the state. Steps give the same bits before and
    after the move, whatever the other sequences hold."""
    n = len(TOKENS)
    with LlamaContext(text, 256, 64, 1, n_seq_max=before[0], exact=exact) as small:
        for other in range(before[0]):
            prefilled(small, TOKENS if other == before[1] else TOKENS[::-1], other)
        state = small.state(before[1])
        expected = step(small, (7, n, before[1]))[0]
    with LlamaContext(text, 512, 64, 1, n_seq_max=after[0], exact=exact) as large:
        large.restore(after[1], state)
        np.testing.assert_array_equal(step(large, (7, n, after[1]))[0], expected)
        assert large.truncate(after[1], n)
        np.testing.assert_array_equal(step(large, (7, n, after[1]))[0], expected)


def test_bytes_that_are_no_state_are_refused(text: LlamaModel) -> None:
    with LlamaContext(text, 256, 64, 1, n_seq_max=2) as context:
        prefilled(context, TOKENS, 1)
        state = context.state(1)
        with pytest.raises(DeviceError, match="cannot take over"):
            context.restore(0, state[:-100].copy())
    with LlamaContext(text, 256, 64, 1, n_seq_max=3) as context:
        for bytes_ in (state[:8], np.append(state, np.ones(4, np.uint8))):
            with pytest.raises(DeviceError, match="cannot take over"):
                context.restore(0, bytes_)


def test_a_raised_flag_ends_a_batch(text: LlamaModel) -> None:
    abort = AbortFlag()
    with LlamaContext(text, 256, 64, 1, abort=abort) as context:
        abort.raise_()
        with pytest.raises(Aborted):
            prefilled(context, TOKENS)
        abort.clear()
        context.truncate(0, 0)
        assert np.isfinite(prefilled(context, TOKENS)).all()


def test_what_would_end_the_process_is_refused(text: LlamaModel) -> None:
    with LlamaContext(text, 256, 96, 1, n_seq_max=2) as context:
        tokens = TOKENS[:4]
        cases = {
            "sequence 2: the context has 2": BatchRows.of(tokens, 0, 2, output=True),
            "sequence -1|sequence": BatchRows.of(tokens, 0, -1, output=True),
            "position 259: the sequence size is 256": BatchRows.of(tokens, 256, 0, output=True),
            "cannot decode 97 rows": BatchRows.of(np.zeros(97, np.int32), 0, 0, output=True),
            "cannot decode 0 rows": BatchRows.of(tokens[:0], 0, 0, output=True),
            "tokens are int64": BatchRows.of(tokens.astype(np.int64), 0, 0, output=True),
            "the model takes float32": BatchRows.of(np.zeros((4, 3), np.float32), 0, 0, output=True),
            "65 rows of logits": BatchRows(
                np.zeros(65, np.int32), np.arange(65, dtype=np.int32), np.zeros(65, np.int32), np.ones(65, bool)
            ),
        }
        for message, rows in cases.items():
            with pytest.raises(ValueError, match=message):
                context.decode(rows)
        with pytest.raises(ValueError, match="no logits of row"):
            prefilled(context, tokens)
            context.logits(1)
