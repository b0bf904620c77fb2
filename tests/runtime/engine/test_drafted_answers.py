"""Tests of answers with drafts, on logits that depend on the preceding tokens alone: the same as without, in fewer
steps."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from granite4v.runtime.answer import Answer
from granite4v.runtime.engine.draft import Draft, Drafter, DraftSource
from granite4v.runtime.engine.sampler import Sampling
from granite4v.runtime.engine.sequence import Scoring
from granite4v.runtime.engine.sequence import Sequence as AnswerSequence
from granite4v.runtime.grammar.grammar_state import GrammarState
from tests.helpers.constrained import Noise, compiler, end_of_text, generated, tokenizer
from tests.helpers.drive import verify
from tests.helpers.grammars import TASKS, task_grammar


def sequence_of(
    kind: str, task: str, drafter: Drafter | None, *, max_tokens: int = 250, temperature: float = 0.0, seed: int = 0
) -> AnswerSequence:
    return AnswerSequence(
        Answer(),
        tokenizer(kind).text_stream(),
        sampling=Sampling(temperature=temperature, seed=seed),
        stop_tokens=frozenset({end_of_text(kind)}),
        max_tokens=max_tokens,
        grammar=compiler(kind).begin(task_grammar(task)),
        drafter=drafter,
    )


def drafted(kind: str, task: str, seed: int, source: DraftSource, *, most: int = 8, **options: float) -> Answer:
    """Generates an answer from noise. Steps decode drafts as a model would, including the rows after a wrong token."""
    noise = Noise(kind, seed, task, patience=30)
    sequence = sequence_of(kind, task, Drafter((), [source]), seed=seed, **options)  # type: ignore[arg-type]
    step, answer = sequence.advance(noise.first()), sequence.answer
    known, n_known = compiler(kind).begin(task_grammar(task)), 0  # follows the accepted tokens
    while not step.finish:
        draft = sequence.draft(most)
        for token in answer.tokens[n_known:]:
            known.accept(token)
        n_known = len(answer.tokens)
        check(known.copy(), draft)
        rows = [noise.next([*answer.tokens, *draft.tokens[:n]]) for n in range(len(draft.tokens) + 1)]
        answer.timings.n_steps += 1
        step = verify(sequence, draft, rows)
    return answer


def check(state: GrammarState, draft: Draft) -> None:
    """Asserts that the grammar allows each token of the draft, and that none of them completes the answer."""
    for token in draft.tokens:
        assert state.allowed()[token]
        state.accept(token)
        assert not state.is_final


def mangled(tokens: Sequence[int], seed: int, n_vocab: int) -> list[int]:
    """Returns the tokens with some left out, doubled or replaced by random ones."""
    rng, found = random.Random(seed), list[int]()
    for token in tokens:
        found += rng.choice([[token]] * 20 + [[], [token, token], [rng.randrange(n_vocab)]])
    return found


@pytest.mark.parametrize("kind", ["toy", "nano"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_are_the_same_with_drafts_of_any_quality(kind: str, task: str, temperature: float) -> None:
    n_accepted = 0
    for seed in range(4):
        for max_tokens in (40, 250):
            plain = generated(kind, task_grammar(task), seed, max_tokens=max_tokens, temperature=temperature)
            source = DraftSource()
            source.predict(mangled(plain.tokens, seed, compiler(kind).index.n_vocab))
            source.add_answer(generated(kind, task_grammar(task), seed + 100).tokens)
            answer = drafted(kind, task, seed, source, max_tokens=max_tokens, temperature=temperature)
            assert (answer.tokens, answer.text) == (plain.tokens, plain.text)
            assert (answer.finish_reason, answer.closing) == (plain.finish_reason, plain.closing)
            assert answer.timings.n_forced == plain.timings.n_forced
            n_accepted += answer.timings.n_accepted
    assert n_accepted > 0


def test_a_perfect_prediction_takes_a_few_steps() -> None:
    plain = generated("nano", task_grammar("tables_html"), 5, temperature=0.0)
    source = DraftSource()
    source.predict(plain.tokens)
    answer = drafted("nano", "tables_html", 5, source, most=1000)
    assert answer.tokens == plain.tokens and answer.timings.n_steps <= plain.timings.n_steps / 8
    assert answer.timings.n_accepted > len(plain.tokens) / 2


def test_no_draft_reaches_the_limit() -> None:
    """The last token is sampled from the logits before it and never decoded."""
    source = DraftSource()
    source.predict([ord(c) for c in "abcdefghij"])
    sequence = AnswerSequence(
        Answer(),
        tokenizer("toy").text_stream(),
        sampling=Sampling(),
        stop_tokens=frozenset({end_of_text("toy")}),
        max_tokens=5,
        drafter=Drafter((), [source]),
    )
    logits = np.zeros(compiler("toy").index.n_vocab, dtype=np.float32)
    logits[ord("a")] = 1
    assert sequence.advance(logits).tokens == (ord("a"),)
    assert sequence.draft(8).tokens == tuple(map(ord, "bcd"))


def test_no_draft_contains_what_ends_the_answer() -> None:
    source = DraftSource()
    source.predict([5, 6, end_of_text("toy"), 7])
    sequence = AnswerSequence(
        Answer(),
        tokenizer("toy").text_stream(),
        sampling=Sampling(),
        stop_tokens=frozenset({end_of_text("toy")}),
        max_tokens=50,
        drafter=Drafter((), [source]),
    )
    assert sequence.draft(8).tokens == (5, 6)


def test_no_draft_without_a_drafter_and_none_for_scores() -> None:
    sequence = sequence_of("toy", "tables_html", None)
    sequence.advance(Noise("toy", 0, "tables_html", 30).first())
    assert sequence.draft(8) == Scoring([1, 2, 3]).draft(8) == Draft()
