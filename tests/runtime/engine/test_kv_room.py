"""Tests of the room in the KV cache: sequences are as long as answers usually are, and become larger, or fewer, when an
answer needs more.

Their contents are moved along, and each answer is the same as if it were generated alone.
"""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from granite4v.runtime.engine import kv_cache
from granite4v.runtime.engine.cached_sequence import Batch, CachedSequence
from granite4v.runtime.engine.kv_cache import MIN_ANSWER, SEQUENCE_STEP, KvCache
from granite4v.runtime.engine.moved_states import MovedStates
from granite4v.runtime.prompt.spans import ImageSpan, TextSpan
from tests.helpers.fake_context import FakeContext, FakeEngine, expected, read

PAGE = ImageSpan(0, 40, b"a page")


def asked(*tokens: int) -> tuple[Any, ...]:
    return (TextSpan((1, 2)), PAGE, TextSpan(tokens))


def long_question(n_tokens: int, least: int = 0) -> tuple[Any, ...]:
    """Returns a question whose answer has at least `n_tokens`. `least`: where to start looking, for different ones."""
    return next(asked(50, i) for i in range(least, 10_000) if len(expected(asked(50, i), n_tokens)) == n_tokens)


def sizes(engine: FakeEngine) -> list[tuple[int, int]]:
    return [(context.n_seq_max, context.n_cells) for context in engine.contexts]


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets the expected length of answers to 16 tokens, and makes the length of sequences a multiple of 8."""
    monkeypatch.setattr(kv_cache, "MIN_ANSWER", 16)
    monkeypatch.setattr(kv_cache, "SEQUENCE_STEP", 8)


def test_one_request_has_room_for_all_it_may_need_and_several_for_what_is_usual() -> None:
    engine = FakeEngine(n_ctx=8192)
    engine.submit(*asked(7), max_tokens=4000)
    engine.run()
    for i in range(2):
        engine.submit(*asked(8, i), max_tokens=4000)
    engine.run()
    alone, among = 43 + 4000, 44 + MIN_ANSWER
    assert sizes(engine) == [(1, -(-alone // 512) * 512), (4, -(-among // SEQUENCE_STEP) * SEQUENCE_STEP)]


def test_the_answers_of_late_tell_how_much_room_is_made() -> None:
    cache = KvCache(FakeContext, 8192, 2)
    plan = (Batch(tuple(range(10))),)
    for n in (900, 1000, 1000, 1000, 1000, 1000, 1000, 1000, 1000, 4000):  # the longest of ten is ignored
        sequence = cache.acquire(plan, 5000, adapter=False)
        assert sequence is not None
        cache.append(sequence, Batch(tuple(range(10, 10 + n + 10 - sequence.n_tokens))))
        cache.release(sequence)
    cache.close()
    assert cache.acquire(plan, 5000, adapter=False, n_wanted=2) is not None
    assert cache.n_cells == -(-(10 + 1250) // SEQUENCE_STEP) * SEQUENCE_STEP


def test_questions_of_a_batch_stay_beside_each_other() -> None:
    """Idle sequences next to those in use are taken first, except the most recently used quarter, here two of eight.

    With 3 in use and 6 and 4 released last, the first choice is 2; 4 also lies next to 3, but was used last.
    """
    cache = KvCache(FakeContext, 4096, 8, opens_all=True)

    def ask(key: int) -> CachedSequence:
        sequence = cache.acquire((Batch((key,)),), 10, adapter=False)
        assert sequence is not None
        cache.append(sequence, Batch((key,)))
        return sequence

    sequences = [ask(key) for key in range(8)]
    assert [sequence.id for sequence in sequences] == list(range(8))
    for number in (5, 1, 0, 2, 7, 6, 4):
        cache.release(sequences[number])
    assert [ask(10 + i).id for i in range(7)] == [2, 1, 0, 5, 7, 6, 4]


def test_an_answer_that_needs_more_room_gets_it_and_nothing_is_computed_again(small_steps: None) -> None:
    engine = FakeEngine(n_ctx=512, n_seq_max=3)
    requests = [long_question(60), long_question(60, 500), asked(4, 4)]
    channels = [engine.submit(*spans, max_tokens=200) for spans in requests]
    engine.run()
    assert [read(channel) for channel in channels] == [expected(spans, 200) for spans in requests]
    widths, cells = zip(*sizes(engine)[1:], strict=True)
    assert set(widths) == {3} and len(cells) > 1 and list(cells) == sorted(set(cells))
    n_prompts = 42 + sum(spans[-1].n_tokens for spans in requests)  # the page is prefilled once
    assert engine.scheduler.counters.n_prefilled == n_prompts and engine.n_encoded == 1


def test_where_memory_ends_the_newest_wait_and_end_with_the_same_text(small_steps: None) -> None:
    engine = FakeEngine(n_ctx=512, n_seq_max=4, budget=4 * 80)
    requests = [long_question(100), *(long_question(30, least) for least in (1000, 2000, 3000))]
    channels = [engine.submit(*spans, max_tokens=200) for spans in requests]
    while not channels[0].is_done:
        engine.scheduler.step()
    assert sizes(engine)[1][0] == 4 and sizes(engine)[-1][0] < 3
    engine.run()
    assert [read(channel) for channel in channels] == [expected(spans, 200) for spans in requests]
    assert all(n * n_cells <= 4 * 80 for n, n_cells in sizes(engine) if n > 1)
    assert engine.cache.n_in_use == 0 and engine.scheduler.is_idle


def test_when_the_long_answer_is_done_there_are_all_sequences_again(small_steps: None) -> None:
    engine = FakeEngine(n_ctx=512, n_seq_max=4, budget=4 * 64)
    engine.submit(*long_question(100), max_tokens=200)
    engine.submit(*asked(1, 2), max_tokens=3)
    engine.run()
    assert engine.cache.n_sequences < 4
    for i in range(20):  # ordinary answers
        engine.submit(*asked(2, i), max_tokens=5)
    engine.run()
    assert engine.cache.n_sequences == 4


def test_no_memory_for_larger_sequences_is_noticed_too(small_steps: None) -> None:
    """llama.cpp fails to allocate; the cache was given no budget."""
    engine = FakeEngine(n_ctx=512, n_seq_max=4, most_cells=4 * 64)
    requests = [long_question(100), *(long_question(30, least) for least in (1000, 2000, 3000))]
    channels = [engine.submit(*spans, max_tokens=200) for spans in requests]
    engine.run()
    assert [read(channel) for channel in channels] == [expected(spans, 200) for spans in requests]
    n_rows = sum(span.n_tokens for spans in requests for span in spans)
    assert engine.scheduler.counters.n_prefilled < 2 * n_rows  # moving lost only the rows of the newest requests


def test_states_that_find_no_room_on_a_disk_are_computed_again(
    small_steps: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def seek(self, place: int) -> None: ...
        def close(self) -> None: ...
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("granite4v.runtime.engine.moved_states.IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Full())
    engine = FakeEngine(n_ctx=512, n_seq_max=3)
    requests = [long_question(60), long_question(60, 500), asked(4, 4)]
    channels = [engine.submit(*spans, max_tokens=200) for spans in requests]
    engine.run()
    assert [read(channel) for channel in channels] == [expected(spans, 200) for spans in requests]
    assert engine.scheduler.counters.n_prefilled > 2 * sum(spans[-1].n_tokens for spans in requests) + 42


@pytest.mark.parametrize("in_memory", [0, 250, 1 << 20])
def test_states_come_back_as_they_were(in_memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("granite4v.runtime.engine.moved_states.IN_MEMORY_BYTES", in_memory)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    rng = np.random.default_rng(0)
    states = {key: rng.integers(0, 256, n).astype(np.uint8) for key, n in (("a", 200), ("b", 300), ("c", 1))}
    with MovedStates() as moved:
        for key, state in states.items():
            moved.save(key, state)
        assert not list(tmp_path.iterdir())  # the file has no name
        for key in ("c", "a", "b"):
            found = moved.load(key)
            assert found is not None
            np.testing.assert_array_equal(found, states[key])
        assert moved.load("d") is None
