"""Tests of the confidences of cells and fields, compared with sums by hand."""

from __future__ import annotations

import math

import pytest

from granite4v.runtime import Answer, TokenLogprob
from granite4v.runtime.confidence import Confidence, confidence, confidence_as_json
from granite4v.runtime.formats.place import Key


def answer_of(*pieces: tuple[str, float | None], finish: str = "stop") -> Answer:
    """Builds an answer from the texts and probabilities of its tokens; None for a forced token."""
    answer = Answer(finish_reason=finish, logprobs=[])
    for token, (text, chance) in enumerate(pieces):
        answer.text += text
        answer.tokens.append(token)
        assert answer.logprobs is not None
        logprob = math.log(chance) if chance is not None else 0.0
        entry = TokenLogprob(token, text.encode(), logprob, forced=chance is None, end=len(answer.text))
        answer.logprobs.append(entry)
    return answer


def figures(found: dict[Key, Confidence]) -> dict[Key, tuple[float, float, int]]:
    return {key: (pytest.approx(one.mean), pytest.approx(one.least), one.n_tokens) for key, one in found.items()}


def test_cells_of_a_table() -> None:
    answer = answer_of(
        ("<table><tr><td>", None), ("1", 0.9), ("2.", 0.5), ("</td>", 0.8), ("<td>", 0.7), ("</td><td>x", 0.6),
        ("</td>", 0.25), ("</tr></table>", None),
    )  # fmt: skip
    assert figures(confidence(answer, "tables_html")) == {
        (0, 0, 0): (2.2 / 3, 0.5, 3),
        (0, 0, 1): (0.6, 0.6, 1),  # an empty cell: the token that ends it, and begins the next
        (0, 0, 2): (0.85 / 2, 0.25, 2),
    }


def test_otsl_cells_begin_with_their_tag() -> None:
    answer = answer_of(("<ched>", 0.5), ("a", 0.75), ("<ecel>", 0.4), ("<nl>", 1.0))
    assert figures(confidence(answer, "tables_otsl")) == {
        (0, 0, 0): (1.65 / 3, 0.4, 3),
        (0, 0, 1): (0.7, 0.4, 2),
    }


def test_fields() -> None:
    answer = answer_of(
        ('{"a": "', None), ("x", 0.5), ('y", "b": ', 0.8), ("1", 0.9), ("2", 0.3), (', "c": ', 0.6),
        ("null", 0.2), ("}", None),
    )  # fmt: skip
    found = confidence(answer, "kvp")
    assert figures(found) == {"/a": (0.65, 0.5, 2), "/b": (0.6, 0.3, 3), "/c": (0.2, 0.2, 1)}
    assert confidence_as_json(found)["/b"] == {"mean": pytest.approx(0.6), "least": pytest.approx(0.3)}
    assert confidence_as_json({(1, 2, 0): Confidence(0.5, 0.25, 2)}) == {"1/2/0": {"mean": 0.5, "least": 0.25}}


def test_a_field_that_was_forced_has_none() -> None:
    answer = answer_of(('{"a": 1, "b": ', None), ("true", 0.5), (', "c": "fixed"}', None))
    assert figures(confidence(answer, "kvp")) == {"/b": (0.5, 0.5, 1)}


def test_a_character_of_several_tokens_counts_them_all() -> None:
    answer = Answer(text="é,b\n", tokens=[1, 2, 3, 4], finish_reason="stop")
    parts = [(b"\xc3", 0.5, 0), (b"\xa9", 0.7, 1), (b",", 0.9, 2), (b"b\n", 0.8, 4)]
    answer.logprobs = [TokenLogprob(i, part, math.log(p), end=end) for i, (part, p, end) in enumerate(parts)]
    assert figures(confidence(answer, "chart2csv")) == {(0, 0, 0): (0.7, 0.5, 3), (0, 0, 1): (0.8, 0.8, 1)}


def test_an_answer_that_was_cut_has_its_whole_rows() -> None:
    answer = answer_of(("a,", 0.5), ("b\n", 0.6), ("1", 0.7), (",", 0.8), ("2", 0.9), finish="length")
    assert confidence(answer, "chart2csv").keys() == {(0, 0, 0), (0, 0, 1)}


def test_text_is_one_field() -> None:
    assert figures(confidence(answer_of(("It", 0.5), (" rose.", 0.25)), "prompt")) == {"": (0.375, 0.25, 2)}


def test_what_is_no_answer_to_the_task_has_none() -> None:
    assert confidence(answer_of(("nothing", 0.5)), "tables_html") == {}
    assert confidence(Answer(finish_reason="cancelled", logprobs=[]), "prompt") == {}


def test_an_answer_without_log_probabilities_is_an_error() -> None:
    with pytest.raises(ValueError, match="logprobs=0"):
        confidence(Answer(text="x"), "prompt")
