"""Tests of drafts on short histories: what is proposed, how a prediction is resumed, and what is learned."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence

import pytest

from granite4v.runtime.engine.draft import MOST_ANSWERS, Chances, Draft, Drafter, DraftSource


def letters(text: str) -> list[int]:
    return list(map(ord, text))


def text_of(draft: Draft) -> str:
    return "".join(map(chr, draft.tokens))


def proposed(answer: str, most: int = 4, *, prompt: str = "", sources: Sequence[DraftSource] = ()) -> str:
    return text_of(Drafter(letters(prompt), sources).propose(letters(answer), most))


def predicting(text: str) -> DraftSource:
    source = DraftSource()
    source.predict(letters(text))
    return source


# --- where a draft comes from ---


def test_what_followed_before_in_the_answer() -> None:
    assert proposed("abcdefg--ab") == "cdef"
    assert proposed("abX abY abZ ab", most=1) == "Z", "the latest of several"
    assert proposed("abcdX-bcdY-abcd") == "X-bc", "the longest agreement comes before the latest"
    assert proposed("abcdefgh") == ""


def test_what_repeats_itself_goes_on_repeating() -> None:
    assert proposed("<><><>", most=7) == "<><><><"


def test_what_the_prompt_says() -> None:
    assert proposed("{'in", prompt="fields: invoice_number, date") == "voic"


def test_text_of_sources_is_found_by_its_first_token_and_ends_at_its_end() -> None:
    source = DraftSource()
    source.add(letters("Total"))
    source.add(letters("Amount due"))
    assert proposed("x: A", sources=[source], most=1) == "m"
    assert proposed("x: Tot", sources=[source], most=20) == "al"


def test_a_prediction_is_followed_from_the_first_token() -> None:
    assert proposed("", sources=[predicting("<table><tr>")], most=20) == "<table><tr>"
    assert proposed("<tab", sources=[predicting("<table><tr>")]) == "le><"


@pytest.mark.parametrize(
    ("real", "expected"),
    [
        ("[1][2][X", "][4]"),  # one token replaced
        ("[1][2][XYZ][", "4][5"),  # one token replaced by three
        ("[1][2][", "3][4"),
        ("[1][2][][", "4][5"),  # one token missing
        ("[1][2][3][3][4", "][5]"),  # one cell more
    ],
)
def test_a_prediction_finds_its_place_again(real: str, expected: str) -> None:
    assert proposed(real, sources=[predicting("[1][2][3][4][5][6]")]) == expected


def test_a_prediction_is_found_again_after_much_that_it_does_not_have() -> None:
    prediction = "".join(chr(0x4E00 + i) for i in range(400))
    real = prediction[:50] + "Z" * 100 + prediction[300:320]
    assert proposed(real, sources=[predicting(prediction)]) == prediction[320:324]


def test_never_more_than_asked_for() -> None:
    source = predicting("abcdefgh")
    assert [len(Drafter((), [source]).propose(letters("a"), most).tokens) for most in range(4)] == [0, 1, 2, 3]


# --- chances ---


def test_chances_fall_and_are_as_many_as_tokens() -> None:
    draft = Drafter((), [predicting("abcdefghijkl")]).propose(letters("abc"), 9)
    assert text_of(draft) == "defghijkl" and len(draft.chances) == 9
    assert all(0 < b <= a < 1 for a, b in zip(draft.chances, draft.chances[1:], strict=False))


def test_a_wrong_prediction_loses_its_chances_and_a_right_one_gains_them_back() -> None:
    rng = random.Random(0)
    right = [rng.randrange(1000) for _ in range(600)]
    wrong = [token + 5000 for token in right[:300]] + right[300:]
    source = DraftSource()
    source.predict(wrong)
    drafter = Drafter((), [source])
    n_at = {n: sum(drafter.propose(right[:n], 8).chances) for n in (0, 1, 250, 310, 599)}
    assert n_at[250] < 0.2 < n_at[0]
    assert n_at[310] > 4, "found again, though it was wrong for 300 tokens"


def test_chances_become_those_that_are_observed() -> None:
    """Two kinds of tokens, one right in 9 of 10 cases and one in 1 of 10, are distinguished."""
    rng, chances = random.Random(1), Chances()
    for _ in range(2000):
        chances.observe("answer", 5, 1, rng.random() < 0.9)
        chances.observe("answer", 5, 2, rng.random() < 0.1)
    assert chances.of("answer", 5, 1) == pytest.approx(0.9, abs=0.15)
    assert chances.of("answer", 5, 2) == pytest.approx(0.1, abs=0.15)
    assert chances.of("own", 5, 1) == Chances().of("own", 5, 1)


def test_what_is_learned_stays_with_the_source() -> None:
    source = predicting("abcdefgh" * 20)
    before = sum(Drafter((), [source]).propose([], 8).chances)
    Drafter((), [source]).propose(letters("z" * 100), 8)
    assert sum(Drafter((), [source]).propose([], 8).chances) < before


# --- bounds and threads ---


def test_sources_are_bounded() -> None:
    source = DraftSource(most_tokens=100)
    for i in range(1000):
        source.add([i, i + 1, i + 2])
    assert Drafter((), [source]).propose([999], 4).tokens == (1000, 1001)
    assert Drafter((), [source]).propose([0], 4).tokens == ()
    many = DraftSource()
    for i in range(MOST_ANSWERS + 1):
        many.add_answer([1000 + i, 1, 2, 3])
    tokens = {cursor.text.tokens[0] for cursor in many.cursors() if cursor.kind == "answer"}
    assert tokens == set(range(1001, 1001 + MOST_ANSWERS))
    source.add([7] * 1000)
    assert len(source.cursors()[0].text.tokens) <= 100


def test_pieces_that_are_added_meanwhile_are_used() -> None:
    source = DraftSource()
    drafter = Drafter((), [source])
    assert drafter.propose(letters("x"), 4).tokens == ()
    source.add(letters("Total"))
    assert text_of(drafter.propose(letters("xTo"), 4)) == "tal"


def test_sources_are_filled_by_any_thread() -> None:
    source, errors = DraftSource(most_tokens=500), list[BaseException]()

    def fill(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(300):
                source.add([rng.randrange(20) for _ in range(10)])
                source.add_answer([rng.randrange(20) for _ in range(50)])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=fill, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    rng, answer = random.Random(9), list[int]()
    while any(thread.is_alive() for thread in threads):
        drafter, answer = Drafter((), [source]), []
        for _ in range(50):
            answer.append(rng.randrange(20))
            draft = drafter.propose(answer, 5)
            assert len(draft.tokens) == len(draft.chances) <= 5 and -1 not in draft.tokens
    for thread in threads:
        thread.join()
    assert not errors
