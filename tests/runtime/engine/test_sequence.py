"""Tests of the generation loop on synthetic logits: how answers end, when text is shown, and how tokens are sampled."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from granite4v.runtime.answer import Answer
from granite4v.runtime.engine.sampler import Sampler, Sampling
from tests.helpers.drive import EOS, Letters, Script, generate


def run(
    text: str,
    *,
    stop: Sequence[str] = (),
    max_tokens: int = 100,
    cancel_after: int = 1000,
    aborts_at: int | None = None,
) -> tuple[Answer, list[str], Script]:
    source, answer, checks = Script([*map(ord, text), EOS], aborts_at), Answer(), 0

    def cancelled() -> bool:
        nonlocal checks
        checks += 1
        return checks > cancel_after

    pieces = generate(
        source,
        answer,
        Letters(),
        sampling=Sampling(),
        stop_tokens=frozenset({EOS}),
        stop=stop,
        max_tokens=max_tokens,
        cancelled=cancelled,
    )
    return answer, list(pieces), source


def test_the_stop_token_ends_the_answer_and_is_not_part_of_it() -> None:
    answer, pieces, _ = run("hello")
    assert (answer.text, answer.finish_reason, answer.tokens) == ("hello", "stop", list(map(ord, "hello")))
    assert pieces == list("hello")
    assert (answer.timings.n_generated, answer.timings.n_steps) == (5, 5)


def test_max_tokens_ends_the_answer_without_a_useless_step() -> None:
    answer, _, source = run("hello", max_tokens=3)
    assert (answer.text, answer.finish_reason, source.asked) == ("hel", "length", 3)


def test_an_answer_of_no_tokens_is_possible() -> None:
    answer, pieces, _ = run("hello", max_tokens=0)
    assert (answer.text, answer.finish_reason, pieces) == ("", "length", [])


@pytest.mark.parametrize(
    ("text", "stop", "shown", "reason"),
    [
        ("one two three", ["two"], "one ", "stop"),
        ("one two three", ["three", "two"], "one ", "stop"),
        ("aab", ["ab"], "a", "stop"),
        ("abcabd", ["abd"], "abc", "stop"),
        ("no stop here st", ["stop!"], "no stop here st", "stop"),
        ("x", [""], "x", "stop"),
    ],
)
def test_stop_strings_across_tokens(text: str, stop: list[str], shown: str, reason: str) -> None:
    answer, pieces, _ = run(text, stop=stop)
    assert (answer.text, "".join(pieces), answer.finish_reason) == (shown, shown, reason)


def test_what_may_become_a_stop_string_is_held_back() -> None:
    _, pieces, _ = run("ab--c", stop=["--|"])
    assert pieces == ["a", "b", "--c"]


def test_what_was_held_back_comes_out_at_the_end() -> None:
    answer, pieces, _ = run("ab--", stop=["--|"])
    assert pieces == ["a", "b", "--"] and answer.text == "ab--"


def test_cancelling_between_tokens() -> None:
    answer, _, _ = run("hello", cancel_after=2)
    assert (answer.text, answer.finish_reason) == ("he", "cancelled")


@pytest.mark.parametrize(("aborts_at", "text"), [(0, ""), (3, "hel")])
def test_cancelling_inside_a_computation(aborts_at: int, text: str) -> None:
    answer, _, _ = run("hello", aborts_at=aborts_at)
    assert (answer.text, answer.finish_reason) == (text, "cancelled")


# --- sampling ---


def draws(sampling: Sampling, logits: Sequence[float], n: int = 400) -> np.ndarray:
    """Returns the share of draws of each token."""
    sampler, scores = Sampler(sampling), np.asarray(logits, dtype=np.float32)
    return np.bincount([sampler.pick(scores, []) for _ in range(n)], minlength=len(logits)) / n


LOGITS = [1.0, 3.0, 2.0, -5.0, 2.5]


def test_greedy_takes_the_likeliest_and_the_first_of_equals() -> None:
    assert Sampler(Sampling()).pick(np.float32([1, 3, 3, 2]), []) == 1


def test_the_same_seed_draws_the_same() -> None:
    one, two, other = (draws(Sampling(temperature=1.0, seed=seed), LOGITS) for seed in (7, 7, 8))
    np.testing.assert_array_equal(one, two)
    assert (one != other).any()


def test_shares_follow_the_softmax() -> None:
    weights = np.exp(np.asarray(LOGITS) / 0.8)
    found = draws(Sampling(temperature=0.8, seed=1), LOGITS, 4000)
    np.testing.assert_allclose(found, weights / weights.sum(), atol=0.03)


@pytest.mark.parametrize(
    ("sampling", "possible"),
    [
        (Sampling(temperature=2.0, top_k=2, seed=1), {1, 4}),
        (Sampling(temperature=2.0, top_k=9, seed=1), {0, 1, 2, 3, 4}),
        (Sampling(temperature=1.0, top_p=0.6, seed=1), {1, 4}),  # shares 0.46, 0.28, 0.17, 0.06, 0.0002
        (Sampling(temperature=1.0, top_p=0.01, seed=1), {1}),
        (Sampling(temperature=2.0, min_p=0.5, seed=1), {1, 4}),  # e^-0.5 = 0.61, e^-1 = 0.37
        (Sampling(temperature=5.0, top_k=3, min_p=0.5, seed=1), {1, 4}),
    ],
)
def test_filters_leave_these_tokens(sampling: Sampling, possible: set[int]) -> None:
    assert set(np.flatnonzero(draws(sampling, LOGITS, 600))) == possible


def test_repeat_penalty_lowers_what_was_said_lately() -> None:
    sampler = Sampler(Sampling(repeat_penalty=2.0, repeat_last_n=2))
    logits = np.float32([3.0, 2.0, -1.0])
    assert sampler.pick(logits, [0]) == 1
    assert sampler.pick(logits, [0, 2, 2]) == 0  # token 0 is too far back
    assert logits.tolist() == [3.0, 2.0, -1.0]


def test_repeat_penalty_makes_negative_logits_more_so() -> None:
    assert Sampler(Sampling(repeat_penalty=2.0)).pick(np.float32([-1.0, -1.5]), [0]) == 1


@pytest.mark.parametrize("penalty", [1e-300, 1e-42, 1e300])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_penalty_beyond_what_floats_hold_still_gives_a_token(penalty: float, temperature: float) -> None:
    sampler = Sampler(Sampling(repeat_penalty=penalty, temperature=temperature, seed=0))
    for logits in ([3.0, 2.0, 0.0, -1.0], [-3.0, -2.0, -4.0, -1.0]):
        found = sampler.pick(np.float32([*logits, -np.inf]), [0, 1, 2, 3, 4], np.array([True] * 3 + [False] * 2))
        assert found in (range(2) if penalty < 1 and logits[0] > 0 else range(3))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", math.nan),
        ("min_p", 1.0),
        ("min_p", math.nan),
        ("repeat_penalty", 0.0),
        ("repeat_penalty", math.inf),
        ("seed", -1),
    ],
)
def test_values_out_of_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field} is {value}; expected"):
        Sampling(**{field: value})
