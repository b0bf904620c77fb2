"""Tests of the scheduler on a fake context: each answer is the same as alone, whatever other requests do."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from granite4v.errors import DeviceError
from granite4v.runtime.engine.draft import Draft
from granite4v.runtime.engine.sequence import Step
from granite4v.runtime.engine.stream import Channel
from granite4v.runtime.prompt.spans import ImageSpan, Span, TextSpan
from tests.helpers.fake_context import FakeEngine, expected, read

PAGE = (TextSpan((1, 2, 3)), ImageSpan(0, 40, b"a page"))


def asked(*tokens: int, page: Sequence[Span] = PAGE) -> tuple[Span, ...]:
    return (*page, TextSpan(tokens))


def test_one_request_runs_in_one_sequence_and_in_its_own_chunks() -> None:
    engine = FakeEngine()
    channel = engine.submit(*asked(7, 8), max_tokens=5)
    engine.run()
    assert read(channel) == expected(asked(7, 8), 5) and channel.is_done
    assert [context.n_seq_max for context in engine.contexts] == [1]
    sizes = [len(rows) for rows in engine.contexts[0].batches]
    assert sizes[:5] == [3, 16, 16, 8, 2] and set(sizes[5:]) == {1}
    timings = channel.answer.timings
    assert (timings.n_reused, timings.n_steps) == (0, len(sizes) - 5)


@pytest.mark.parametrize(
    ("n_question", "n_ctx", "n_rows"),
    [(40, 256, 64), (63, 256, 64), (32, 256, 32), (64, 256, 64), (70, 256, 70), (40, 100, 40)],  # the last: no room
)
def test_a_question_is_filled_up_where_more_rows_take_less_time(n_question: int, n_ctx: int, n_rows: int) -> None:
    spans = asked(*(i % 60 for i in range(n_question)), page=(TextSpan(tuple(range(45))),))
    for fills in (True, False):
        engine = FakeEngine(n_ctx=n_ctx, n_ubatch=128, fills_questions=fills)
        channel = engine.submit(*spans, max_tokens=5)
        engine.run()
        assert read(channel) == expected(spans, 5)
        assert [len(rows) for rows in engine.contexts[0].batches][:2] == [45, n_rows if fills else n_question]
        assert engine.scheduler.counters.n_prefilled == 45 + n_question


def test_requests_side_by_side_are_decoded_in_one_batch() -> None:
    engine = FakeEngine()
    requests = [asked(7, i) for i in range(4)]
    channels = [engine.submit(*spans, max_tokens=12) for spans in requests]
    engine.run()
    assert [read(channel) for channel in channels] == [expected(spans, 12) for spans in requests]
    assert max(len(rows) for rows in engine.contexts[-1].batches if rows.outputs.all()) == 4
    longest = max(len(channel.answer.tokens) for channel in channels)
    assert engine.scheduler.counters.n_steps <= longest + 3  # they start one after another


def test_a_shared_page_is_computed_once() -> None:
    engine = FakeEngine()
    requests = [asked(7, i) for i in range(3)]
    channels = [engine.submit(*spans, max_tokens=3) for spans in requests]
    engine.run()
    assert [read(channel) for channel in channels] == [expected(spans, 3) for spans in requests]
    later = engine.submit(*asked(9), max_tokens=3)
    engine.run()
    assert read(later) == expected(asked(9), 3) and later.answer.timings.n_reused == 43
    assert engine.n_encoded == 1


def test_a_page_that_is_being_computed_between_answers_is_shared() -> None:
    engine = FakeEngine()
    short = [60, 2, 60, 3]  # the second sequence becomes free first, between two in use
    beside = [asked(7, i) for i in range(4)]
    channels = [engine.submit(*spans, max_tokens=n) for spans, n in zip(beside, short, strict=True)]
    while not (channels[1].is_done and channels[3].is_done):
        engine.scheduler.step()
    n_prefilled, n_encoded = engine.scheduler.counters.n_prefilled, engine.n_encoded
    requests = [asked(5, i, page=(ImageSpan(0, 100, b"other"),)) for i in range(2)]
    others = [engine.submit(*requests[0], max_tokens=5)]
    engine.scheduler.step()  # prefills one chunk of it; the next step decodes the other answers
    engine.scheduler.step()
    others.append(engine.submit(*requests[1], max_tokens=5))
    engine.run()
    assert [read(channel) for channel in others] == [expected(spans, 5) for spans in requests]
    assert others[1].answer.timings.n_reused == 100
    assert engine.scheduler.counters.n_prefilled - n_prefilled == 102 + 2
    assert engine.n_encoded - n_encoded == 1


def test_interleaved_readers_cost_no_second_prefill() -> None:
    engine = FakeEngine()
    requests = [asked(5), asked(6, page=(ImageSpan(0, 50, b"other"),))]
    channels = [engine.submit(*spans, max_tokens=20, size=1) for spans in requests]
    texts = ["", ""]
    while not all(channel.is_done for channel in channels):
        engine.run()
        for i, channel in enumerate(channels):
            texts[i] += read(channel, 1)
    texts = [text + read(channel) for text, channel in zip(texts, channels, strict=True)]
    assert texts == [expected(spans, 20) for spans in requests]
    # the first request began in a context with one sequence and was moved to one with several
    assert engine.scheduler.counters.n_prefilled == sum(span.n_tokens for spans in requests for span in spans)
    assert engine.scheduler.counters.n_preempted == 0


def test_a_reader_that_stops_slows_nobody_and_gets_all_in_the_end() -> None:
    engine = FakeEngine()
    slow = engine.submit(*asked(1), max_tokens=60, size=2)
    others = [engine.submit(*asked(2, i), max_tokens=30) for i in range(6)]  # more requests than sequences
    engine.run()
    assert [read(channel) for channel in others] == [expected(asked(2, i), 30) for i in range(6)]
    assert all(channel.is_done for channel in others) and not slow.is_done
    text = ""
    while not slow.is_done:
        text += read(slow)
        engine.run()
    assert text + read(slow) == expected(asked(1), 60)


def test_one_sequence_serves_all_in_turn_even_if_the_first_is_not_read() -> None:
    engine = FakeEngine(n_seq_max=1)
    first, second = engine.submit(*asked(1), max_tokens=40, size=2), engine.submit(*asked(2), max_tokens=9)
    engine.run()
    assert read(second) == expected(asked(2), 9) and second.is_done
    assert engine.scheduler.counters.n_preempted == 1
    text = ""
    while not first.is_done:
        text += read(first)
        engine.run()
    assert text + read(first) == expected(asked(1), 40)


def test_cancelling_one_leaves_the_others_as_they_are() -> None:
    engine = FakeEngine()
    channels = [engine.submit(*asked(3, i), max_tokens=25) for i in range(3)]
    for _ in range(12):
        engine.scheduler.step()
    channels[1].cancel()
    engine.run()
    assert channels[1].answer.finish_reason == "cancelled" and channels[1].is_done
    assert expected(asked(3, 1), 25).startswith(read(channels[1]))
    for i in (0, 2):
        assert read(channels[i]) == expected(asked(3, i), 25)
    assert engine.cache.n_in_use == 0


def test_requests_with_and_without_an_adapter_share_neither_steps_nor_prefixes() -> None:
    engine = FakeEngine()
    channels = {on: engine.submit(*asked(4), max_tokens=15, adapter=on) for on in (False, True)}
    engine.run()
    again = {on: engine.submit(*asked(4), max_tokens=15, adapter=on) for on in (True, False)}
    engine.run()
    for on in (False, True):
        assert read(channels[on]) == read(again[on]) == expected(asked(4), 15, on)
        assert again[on].answer.timings.n_reused == 44


def test_requests_that_lost_their_cells_to_a_larger_one_go_on() -> None:
    """The larger request finds no memory, and the running one loses its cells. It is recomputed, although no event
    triggers that."""
    engine = FakeEngine(n_ctx=4096, n_seq_max=2, most_cells=1024)
    running, ended = engine.submit(*asked(5, 1), max_tokens=200), engine.submit(*asked(5, 2), max_tokens=1)
    while not ended.is_done:
        engine.scheduler.step()
    assert not running.is_done and engine.cache.n_sequences == 2
    page = (TextSpan(tuple(i % 60 for i in range(900))),)
    large = engine.submit(*page, max_tokens=5)
    engine.run()
    assert engine.scheduler.is_idle
    assert read(running) == expected(asked(5, 1), 200) and read(large) == expected(page, 5)


def test_where_memory_ends_requests_take_turns() -> None:
    engine = FakeEngine(n_ctx=256, most_cells=300)
    channels = [engine.submit(*asked(5, i), max_tokens=10) for i in range(3)]
    engine.run()
    assert [read(channel) for channel in channels] == [expected(asked(5, i), 10) for i in range(3)]
    assert max(context.n_seq_max for context in engine.contexts) == 1
    broken = FakeEngine(most_cells=10)
    channel = broken.submit(*asked(5))
    broken.run()
    with pytest.raises(DeviceError, match="no memory for"):
        read(channel)


class Broken:
    """Raises at the first logits."""

    def advance(self, logits: np.ndarray) -> Step:
        raise ValueError("of its own")

    def cancel(self) -> Step:
        return Step(finish="cancelled")

    def draft(self, most: int) -> Draft:
        return Draft()


def test_an_error_of_one_request_ends_no_other() -> None:
    engine = FakeEngine()
    bad, good = engine.submit(*asked(1), advances=Broken()), engine.submit(*asked(2))
    engine.run()
    assert read(good) == expected(asked(2), 20) and bad.is_done
    with pytest.raises(ValueError, match="of its own"):
        read(bad)
    assert engine.cache.n_in_use == 0


@pytest.mark.parametrize("room", [512, 1])
def test_random_orders_of_submitting_reading_cancelling_and_dropping(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each answer is the one that the request gets alone, or the beginning of it. No sequence stays in use, and the
    cache's records match the contents of each. Also where sequences start with almost no room for answers and grow."""
    monkeypatch.setattr("granite4v.runtime.engine.kv_cache.MIN_ANSWER", room)
    monkeypatch.setattr("granite4v.runtime.engine.kv_cache.SEQUENCE_STEP", min(room, 256))
    for seed in range(500):
        rng = random.Random(seed)
        engine = FakeEngine(
            n_ctx=rng.choice((128, 256)),
            n_seq_max=rng.randint(1, 5),
            most_cells=rng.choice((128, 256, 600, 10_000)) if seed % 3 == 0 else 10_000,
            budget=rng.choice((50, 200, 500)) if seed % 3 == 1 else None,
        )
        dropped: set[Channel] = set()
        requests: list[tuple[Channel, tuple[Span, ...], int, bool, list[str]]] = []
        for _ in range(rng.randint(5, 60)):
            action = rng.random()
            if action < 0.25:
                spans = random_request(rng)
                max_tokens, adapter = rng.randint(0, 30), rng.random() < 0.2
                channel = engine.submit(*spans, max_tokens=max_tokens, adapter=adapter, size=rng.choice((1, 3, 256)))
                requests.append((channel, spans, max_tokens, adapter, []))
            elif action < 0.35 and requests:
                channel = rng.choice(requests)[0]
                if rng.random() < 0.5:
                    channel.cancel()
                else:
                    channel.drop()
                    dropped.add(channel)
            elif action < 0.6 and requests:
                channel, _, _, _, texts = rng.choice(requests)
                texts.append(read_or_nothing(channel, rng.randint(1, 5)))
            else:
                engine.scheduler.step()
        for _ in range(10_000):
            if engine.scheduler.is_idle:
                break
            engine.scheduler.step()
            for channel, _, _, _, texts in requests:
                texts.append(read_or_nothing(channel))
        assert engine.scheduler.is_idle and engine.cache.n_in_use == 0, seed
        for channel, spans, max_tokens, adapter, texts in requests:
            text, alone = "".join(texts) + read_or_nothing(channel), expected(spans, max_tokens, adapter)
            assert channel.is_done, seed
            if channel.answer.finish_reason == "cancelled":
                assert alone.startswith(channel.answer.text) and channel.answer.text.startswith(text), seed
            elif channel.answer.finish_reason:
                assert text == alone or channel in dropped, seed
                assert channel.answer.text == alone, seed
        if engine.cache.n_cells:
            context = engine.contexts[-1]
            for number in range(engine.cache.n_sequences):
                known = [key for batch in engine.cache.sequence(number).batches for key in batch.keys]
                held = [value for value, _ in context.content[number]]
                assert len(known) == len(held), seed
                assert all(isinstance(key, tuple) or key == value for key, value in zip(known, held, strict=True)), seed


def random_request(rng: random.Random) -> tuple[Span, ...]:
    """Returns a random prompt; many begin alike."""
    page = ImageSpan(0, rng.choice((5, 20)), bytes([rng.randint(1, 3)]))
    words = tuple(rng.randint(0, 3) for _ in range(rng.randint(1, 20)))
    return rng.choice([(TextSpan((1, 2)), page, TextSpan(words)), (TextSpan((1, 2, *words)),)])


def read_or_nothing(channel: Channel, most: int = 1 << 30) -> str:
    try:
        return read(channel, most)
    except DeviceError:
        return ""


def test_a_request_that_begins_again_does_not_count_its_own_rows_as_reused() -> None:
    engine = FakeEngine(n_seq_max=1)
    unread = engine.submit(*asked(5, 1), max_tokens=30, size=4)
    engine.run()
    engine.submit(*asked(6, 2), max_tokens=1)
    engine.run()
    assert engine.scheduler.counters.n_preempted == 1
    while not unread.is_done:
        unread.take(0)
        engine.run()
    assert read(unread) and unread.answer.timings.n_reused == 0
