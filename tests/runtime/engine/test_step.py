"""Tests of decode steps with drafts: what they compute, what they cost, and that answers do not change."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from granite4v.runtime.answer import Answer
from granite4v.runtime.engine.cached_sequence import CachedSequence
from granite4v.runtime.engine.draft import Draft
from granite4v.runtime.engine.sampler import Sampling
from granite4v.runtime.engine.sequence import Sequence as AnswerSequence
from granite4v.runtime.engine.sequence import Step
from granite4v.runtime.engine.step import Limits, joined, plan_step
from granite4v.runtime.engine.step_costs import AGE_EACH, N_KEPT, StepCosts
from granite4v.runtime.engine.stream import Channel
from granite4v.runtime.engine.task import Task
from granite4v.runtime.prompt.spans import ImageSpan, Span, TextSpan
from tests.helpers.fake_context import EOS, FakeEngine, Letters, expected, next_token, read

PAGE = (TextSpan((1, 2, 3)), ImageSpan(0, 40, b"a page"))
LIMITS = Limits(rows=64, outputs=64, cells=256)


class Guessing(AnswerSequence):
    """Drafts the tokens that will follow, with occasional mistakes."""

    def __init__(self, spans: Sequence[Span], max_tokens: int, rng: random.Random) -> None:
        super().__init__(Answer(), Letters(), sampling=Sampling(), stop_tokens=frozenset({EOS}), max_tokens=max_tokens)
        self._content = [
            (value, False)
            for span in spans
            for value in (
                [("image", float(span.digest[0]))] * span.n_tokens if isinstance(span, ImageSpan) else span.tokens
            )
        ]
        self._rng = rng
        self.n_drafted = 0

    def draft(self, most: int) -> Draft:
        content, tokens = [*self._content, *((token, False) for token in self.answer.tokens)], []
        for _ in range(self._rng.randint(0, most)):
            token = next_token(content) if self._rng.random() < 0.8 else self._rng.randrange(EOS)
            tokens.append(token)
            content.append((token, False))
        self.n_drafted += len(tokens)
        return Draft(tuple(tokens), tuple(0.9 ** (i + 1) for i in range(len(tokens))))


def test_answers_with_drafts_are_those_without() -> None:
    for seed in range(30):
        rng = random.Random(seed)
        engine = FakeEngine(n_seq_max=rng.randint(1, 4))
        requests = [(*PAGE, TextSpan((7, i))) for i in range(rng.randint(1, 6))]
        answers = [Guessing(spans, 40, rng) for spans in requests]
        channels = []
        for spans, answer in zip(requests, answers, strict=True):
            channel = Channel(answer.answer, lambda blocking=True: None)
            engine.scheduler.add(Task(spans, answer, channel, max_tokens=40))
            channels.append(channel)
            for _ in range(rng.randint(0, 5)):
                engine.scheduler.step()
        engine.run()
        texts = [expected(spans, 40) for spans in requests]
        assert [read(channel) for channel in channels] == texts
        counters = engine.scheduler.counters
        assert 0 < counters.n_accepted < counters.n_drafted
        timings = [answer.answer.timings for answer in answers]
        assert sum(t.n_accepted for t in timings) == counters.n_accepted
        assert sum(t.n_steps for t in timings) < sum(map(len, texts))
        # the cache's records match the contents of the context
        for number in range(engine.cache.n_sequences):
            assert engine.cache.sequence(number).n_tokens == len(engine.contexts[-1].content[number])


def test_forced_tokens_beside_other_answers_share_their_passes() -> None:
    class Forced:
        """Gives five tokens a step, whatever the logits are."""

        def __init__(self) -> None:
            self.n_left = 4

        def advance(self, logits: np.ndarray) -> Step:
            self.n_left -= 1
            return Step((5, 6, 7, 8, 9)) if self.n_left else Step((), finish="stop")

        def draft(self, most: int) -> Draft:
            return Draft()

        def cancel(self) -> Step:
            return Step((), finish="cancelled")

    engine = FakeEngine()
    spans = (*PAGE, TextSpan((7,)))
    engine.submit(*PAGE, TextSpan((8,)), advances=Forced(), max_tokens=20)
    other = engine.submit(*spans, max_tokens=25)
    engine.run()
    assert read(other) == expected(spans, 25)
    for rows in engine.contexts[-1].batches:
        counts = np.unique(rows.sequences, return_counts=True)[1]
        assert len(set(counts.tolist())) == 1  # with different counts llama.cpp would need several passes


def test_a_step_among_sequences_has_two_rows_where_it_must() -> None:
    engine = FakeEngine()
    engine.scheduler = type(engine.scheduler)(engine.cache, engine, 16, least_rows=2)
    spans = [(*PAGE, TextSpan((7, i))) for i in range(2)]
    channels = [engine.submit(*spans[0], max_tokens=3), engine.submit(*spans[1], max_tokens=20)]
    engine.run()
    assert [read(channel) for channel in channels] == [expected(spans[0], 3), expected(spans[1], 20)]
    decoded = [rows for rows in engine.contexts[-1].batches if rows.outputs[0]]
    assert decoded and all(len(rows) >= 2 and rows.outputs.sum() >= 2 for rows in decoded)


def _task(n_pending: int, draft: Draft = Draft(), sequence: int = 0) -> Task:  # noqa: B008
    class Fixed:
        def advance(self, logits: np.ndarray) -> Step:
            raise AssertionError

        def draft(self, most: int) -> Draft:
            return Draft(draft.tokens[:most], draft.chances[:most])

        def cancel(self) -> Step:
            raise AssertionError

    task = Task((), Fixed(), Channel(Answer(), lambda blocking=True: None), max_tokens=100)
    task.tokens, task.n_pending = list(range(10, 10 + n_pending)), n_pending
    task.sequence = CachedSequence(sequence)
    return task


def _costs(**seconds: float) -> StepCosts:
    costs = StepCosts()
    for rows, value in seconds.items():
        costs.note(int(rows[1:]), value)
    return costs


def test_a_draft_is_used_where_it_pays() -> None:
    good = Draft((1, 2, 3), (0.9, 0.8, 0.7))
    for seconds, n_rows in ((1.0, 4), (3.3, 4), (3.5, 1)):  # 3.4 tokens are expected: 1 + 0.9 + 0.8 + 0.7
        costs = _costs(_1=1.0, _2=seconds, _3=seconds, _4=seconds)
        (part,) = plan_step([_task(1, good)], [], costs, LIMITS)
        assert part.n_rows == n_rows and part.tokens == (10, *good.tokens[: n_rows - 1])
    # where additional rows cost little, a second sequence without a draft is padded with fillers
    costs = _costs(_2=1.0, _8=1.1)
    parts = plan_step([_task(1, good), _task(1, sequence=1)], [], costs, LIMITS)
    assert [(part.n_rows, part.tokens) for part in parts] == [(4, (10, 1, 2, 3)), (4, (10,))]
    rows, starts = joined(parts, 1)
    assert starts == [0, 4] and rows.outputs.tolist() == [True] * 5 + [False] * 3
    assert rows.positions.tolist() == [0, 1, 2, 3] * 2


def test_a_step_keeps_to_its_limits() -> None:
    draft = Draft(tuple(range(20)), (0.99,) * 20)
    free = _costs(_1=1.0, _64=1.0)
    limits = Limits(rows=64, outputs=64, cells=6)
    assert plan_step([_task(1, draft)], [], free, limits)[0].n_rows == 6
    limits = Limits(rows=64, outputs=5, cells=256)
    assert plan_step([_task(1, draft)], [], free, limits)[0].n_rows == 5
    limits = Limits(rows=16, outputs=64, cells=256)
    parts = plan_step([_task(1, draft), _task(1, draft, 2)], [CachedSequence(1)], free, limits)
    assert [part.n_rows for part in parts] == [5, 5, 5]
    uncut = Limits(rows=64, outputs=64, cells=256, can_cut=False)
    parts = plan_step([_task(3, draft), _task(1, draft, 2)], [], free, uncut)
    assert [part.tokens for part in parts] == [(10, 11, 12), (10,)]


def test_rows_fill_a_tile_of_attention_where_values_may_depend_on_it() -> None:
    free = _costs(_1=1.0, _32=1.2, _64=1.3)
    limits = Limits(rows=128, outputs=64, cells=256)
    good = Draft(tuple(range(40)), (0.99,) * 40)
    (part,) = plan_step([_task(1, good)], [], free, limits)
    assert (part.n_rows, part.n_drafted) == (64, 40)
    assert plan_step([_task(20)], [], free, limits)[0].n_rows == 20
    assert plan_step([_task(40)], [], free, limits)[0].n_rows == 64
    # no room for a tile; values that must not depend on what else is computed (`least` is 2)
    assert plan_step([_task(1, good)], [], free, Limits(rows=128, outputs=64, cells=50))[0].n_rows == 41
    exact = Limits(rows=128, outputs=64, cells=256, least=2)
    assert plan_step([_task(1, good)], [], free, exact)[0].n_rows == 41
    long = Draft(tuple(range(63)), (0.99,) * 63)
    assert plan_step([_task(1, long)], [], free, limits)[0].n_drafted == 63
    assert plan_step([_task(1, long)], [], free, exact)[0].n_rows == 63


def test_costs_follow_what_was_measured() -> None:
    costs = StepCosts()
    assert costs.seconds(1) < costs.seconds(4) < 4 * costs.seconds(1)
    costs.note(1, 2.0)
    assert costs.seconds(1) == 2.0 < costs.seconds(3) < 6.0
    for seconds in (4.0, 4.0, 90.0):  # the last was disturbed by other load
        costs.note(5, seconds)
    assert costs.seconds(5) == 4.0 and costs.seconds(3) == pytest.approx(3.0)
    costs.note(8, 3.0)
    assert costs.seconds(5) == 3.0  # five rows could be padded to eight
    costs.note(8, 7.0)
    for _ in range(AGE_EACH * N_KEPT):
        costs.note(1, 1.0)
    assert costs.seconds(5) < 3.0  # forgotten, so the size is tried again
