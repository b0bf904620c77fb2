"""Tests of the log-probabilities of answers on synthetic logits: their values, and which tokens are forced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from granite4v.runtime.answer import Answer
from granite4v.runtime.engine.draft import Drafter, DraftSource
from granite4v.runtime.engine.logprobs import Logprobs
from granite4v.runtime.engine.sampler import Sampling
from granite4v.runtime.engine.sequence import Sequence as AnswerSequence
from granite4v.runtime.grammar.grammar import Grammar
from tests.helpers.constrained import Noise, checkpoint, compiler, end_of_text, grammar_of, tokenizer
from tests.helpers.drive import EOS, N_VOCAB, Letters, Script, generate, verify

TABLES = ("tables_otsl", "tables_html", "tables_json", "chart2csv")


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Computes the log-softmax by its definition, in long doubles."""
    wide = logits.astype(np.longdouble)
    return np.asarray(wide - wide.max() - np.log(np.exp(wide - wide.max()).sum()))


def scripted(text: str, *, n_top: int = 0, **options: Any) -> Answer:
    answer = Answer()
    pieces = [chr(code).encode() for code in range(N_VOCAB)]
    options = {"sampling": Sampling(), "stop_tokens": frozenset({EOS}), "max_tokens": 100, **options}
    source = Script([*map(ord, text), EOS])
    list(generate(source, answer, Letters(), logprobs=Logprobs(n_top, pieces), **options))
    return answer


def noisy(
    kind: str, grammar: Grammar | None, seed: int, *, task: str, n_top: int = 3, **options: Any
) -> tuple[Answer, list[np.ndarray]]:
    """Generates an answer from noise; returns it and the logits of each step."""
    answer, seen = Answer(), list[np.ndarray]()

    class Watched(Noise):
        def next(self, tokens: Sequence[int]) -> np.ndarray:
            seen.append(super().next(tokens))
            return seen[-1]

    settings: dict[str, Any] = {"sampling": Sampling(temperature=0.7, seed=seed), "max_tokens": 200, **options}
    list(
        generate(
            Watched(kind, seed, task, 30),
            answer,
            tokenizer(kind).text_stream(),
            stop_tokens=frozenset({end_of_text(kind)}),
            grammar=None if grammar is None else compiler(kind).begin(grammar),
            logprobs=Logprobs(n_top, compiler(kind).index.pieces),
            **settings,
        )
    )
    return answer, seen


def test_without_them_an_answer_has_none() -> None:
    answer = Answer()
    list(
        generate(Script([65, EOS]), answer, Letters(), sampling=Sampling(), stop_tokens=frozenset({EOS}), max_tokens=9)
    )
    assert answer.logprobs is None and answer.as_dict()["logprobs"] is None


def test_a_known_distribution() -> None:
    """One of 300 logits is 1, the others are 0."""
    answer = scripted("ab", n_top=2)
    assert answer.logprobs is not None
    expected = 1 - np.log(np.e + 299)
    for entry, token in zip(answer.logprobs, answer.tokens, strict=True):
        assert entry.token == token and entry.text == chr(token) and not entry.forced
        assert entry.logprob == pytest.approx(expected, abs=1e-12)
        assert [one for one, _ in entry.top] == [token, 0]  # the first of equals
        assert [value for _, value in entry.top] == pytest.approx([expected, expected - 1], abs=1e-12)


@pytest.mark.parametrize("kind", ["toy", "nano"])
@pytest.mark.parametrize("n_top", [0, 1, 20])
def test_they_are_the_log_softmax_before_temperature_and_filters(kind: str, n_top: int) -> None:
    sampling = Sampling(temperature=1.5, top_k=30, top_p=0.9, min_p=0.01, repeat_penalty=1.3, seed=4)
    answer, seen = noisy(kind, None, 4, task="kvp", n_top=n_top, sampling=sampling, max_tokens=60)
    assert answer.logprobs is not None and len(answer.logprobs) == len(answer.tokens) > 10
    for entry, token, logits in zip(answer.logprobs, answer.tokens, seen, strict=False):
        expected = log_softmax(logits)
        best = np.argsort(-expected, kind="stable")[:n_top]
        assert (entry.token, entry.forced) == (token, False)
        assert entry.logprob == pytest.approx(float(expected[token]), abs=1e-12)
        assert [one for one, _ in entry.top] == best.tolist()
        assert [value for _, value in entry.top] == pytest.approx(expected[best].tolist(), abs=1e-12)


@pytest.mark.parametrize("fast_forward", [True, False])
@pytest.mark.parametrize("task", TABLES)
def test_tokens_that_a_grammar_leaves_no_choice_about_are_forced(task: str, fast_forward: bool) -> None:
    """A second pass through the grammar shows what is forced: by its masks, and by the steps that computed logits."""
    n_forced = n_free = 0
    for seed in range(6):
        answer, seen = noisy("nano", grammar_of(task), seed, task=task, fast_forward=fast_forward)
        assert answer.logprobs is not None
        state, steps = compiler("nano").begin(grammar_of(task)), iter(seen)
        n_closing = len(answer.tokens) - len(tokens_before_closing(answer))
        for i, entry in enumerate(answer.logprobs[: len(answer.tokens) - n_closing]):
            is_only = np.count_nonzero(state.allowed([end_of_text("nano")])) == 1
            if not entry.forced:
                logits = next(one for one in steps if log_softmax(one)[entry.token] == pytest.approx(entry.logprob))
                assert logits is not None and not is_only
            elif not fast_forward:
                assert is_only
            assert entry.token == answer.tokens[i] and (entry.logprob == 0.0 and entry.top == ()) == entry.forced
            state.accept(entry.token)
        assert all(entry.forced for entry in answer.logprobs[len(answer.tokens) - n_closing :])
        n_forced += sum(entry.forced for entry in answer.logprobs)
        n_free += sum(not entry.forced for entry in answer.logprobs)
    assert n_free > 50 and (n_forced > 50 or not fast_forward or task == "chart2csv")  # CSV forces nothing


def tokens_before_closing(answer: Answer) -> list[int]:
    """Returns the tokens before the closing that was added at the limit."""
    text, kept = answer.text[: len(answer.text) - len(answer.closing or "")], list[int]()
    for token, entry in zip(answer.tokens, answer.logprobs or [], strict=True):
        if entry.end > len(text):
            break
        kept.append(token)
    return kept


def test_the_closing_of_an_answer_at_its_limit_is_forced() -> None:
    grammar = grammar_of("tables_html")
    answers = (noisy("nano", grammar, seed, task="tables_html", max_tokens=40)[0] for seed in range(50))
    answer = next(answer for answer in answers if answer.closing)
    assert answer.closing and answer.logprobs is not None and len(answer.logprobs) == len(answer.tokens)
    closing = [entry for entry in answer.logprobs if entry.end > len(answer.text) - len(answer.closing)]
    assert closing and all(entry.forced for entry in closing)
    assert b"".join(entry.utf8 for entry in closing).decode() == answer.closing


@pytest.mark.parametrize("kind", ["toy", "nano"])
@pytest.mark.parametrize("task", TABLES)
def test_drafts_change_no_logprob(kind: str, task: str) -> None:
    n_accepted = 0
    for seed in range(6):
        plain, _ = noisy(kind, grammar_of(task), seed, task=task)
        source, noise = DraftSource(), Noise(kind, seed, task, 30)
        source.add_answer(plain.tokens)
        sequence = AnswerSequence(
            Answer(),
            tokenizer(kind).text_stream(),
            sampling=Sampling(temperature=0.7, seed=seed),
            stop_tokens=frozenset({end_of_text(kind)}),
            max_tokens=200,
            grammar=compiler(kind).begin(grammar_of(task)),
            drafter=Drafter((), [source]),
            logprobs=Logprobs(3, compiler(kind).index.pieces),
        )
        step = sequence.advance(noise.first())
        while not step.finish:
            draft = sequence.draft(8)
            tokens = sequence.answer.tokens
            step = verify(sequence, draft, [noise.next([*tokens, *draft.tokens[:n]]) for n in range(9)])
        n_accepted += sequence.answer.timings.n_accepted
        assert sequence.answer.logprobs == plain.logprobs
    assert n_accepted > 30


def test_ends_are_places_in_the_text() -> None:
    """Also for characters of several tokens, and for text held back because it may become a stop string."""
    text, answer = "a 躮 naïve €5 -- 𝄞", Answer()
    tokens = [*tokenizer("nano").encode_plain(text), end_of_text("nano")]

    class Told(Script):
        def _logits(self, i: int) -> np.ndarray:
            return np.eye(checkpoint("nano").n_vocab, dtype=np.float32)[self.tokens[i]]

    list(
        generate(
            Told(tokens),
            answer,
            tokenizer("nano").text_stream(),
            sampling=Sampling(),
            stop_tokens=frozenset({end_of_text("nano")}),
            stop=["--|"],
            max_tokens=100,
            logprobs=Logprobs(0, compiler("nano").index.pieces),
        )
    )
    assert answer.text == text and answer.logprobs is not None and len(answer.logprobs) > len(text)
    written = b""
    for entry in answer.logprobs:
        written += entry.utf8
        assert entry.end == len(written.decode("utf-8", "ignore"))


def test_tokens_of_a_stop_string_have_entries_beyond_the_text() -> None:
    answer = scripted("one two", stop=["two"])
    assert answer.text == "one " and answer.logprobs is not None
    assert [entry.token for entry in answer.logprobs] == answer.tokens == list(map(ord, "one two"))
    assert [entry.end for entry in answer.logprobs] == [1, 2, 3, 4, 5, 6, 4]


def test_max_tokens_cuts_entries_as_tokens() -> None:
    for n in range(1, 30):
        answer, _ = noisy("nano", grammar_of("tables_json"), 2, task="tables_json", max_tokens=n)
        assert answer.logprobs is not None and [entry.token for entry in answer.logprobs] == answer.tokens
