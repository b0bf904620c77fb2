"""Tests of closing answers at their limit: wherever they were, the result is complete to jsonschema, docling-core, lxml
and csv."""

from __future__ import annotations

import json

import numpy as np
import pytest

from granite4v.runtime.answer import Answer
from granite4v.runtime.engine.sampler import Sampling
from granite4v.runtime.grammar.grammar import Grammar
from granite4v.runtime.grammar.json_closing import JsonPosition
from tests.acceptance.judges import judge
from tests.acceptance.schemas import SCHEMAS
from tests.helpers.constrained import KINDS, Noise, compiler, end_of_text, generated, grammar_of, state_after, tokenizer
from tests.helpers.drive import generate

NEVER = 10**9  # the patience of a model that does not want to end
TABLES = ("tables_otsl", "tables_html", "tables_json", "chart2csv")


def shortest(kind: str, grammar: Grammar) -> int:
    ending = compiler(kind).begin(grammar).ending(10_000)
    assert ending is not None
    return len(ending)


def check(kind: str, grammar: Grammar, schema: dict[str, object] | None, max_tokens: int, seed: int) -> bool:
    """Generates an answer, asserts that it is complete, and returns whether it had to be closed."""
    answer = generated(kind, grammar, seed, max_tokens=max_tokens, patience=NEVER, fast_forward=seed % 2 == 0)
    assert judge(grammar.task, answer.text, schema) is None, answer
    assert len(answer.tokens) <= max_tokens and answer.text.endswith(answer.closing or "")
    assert answer.finish_reason == ("stop" if answer.closing is None else "length")
    return answer.closing is not None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", TABLES)
def test_a_table_closed_at_any_length_is_valid(kind: str, task: str) -> None:
    grammar = grammar_of(task)
    least = shortest(kind, grammar) + 2
    assert sum(check(kind, grammar, None, least + 7 * seed, seed) for seed in range(25)) > 5


@pytest.mark.parametrize("name", list(SCHEMAS))
def test_an_instance_closed_at_any_length_is_valid(name: str) -> None:
    grammar = grammar_of("kvp", SCHEMAS[name])
    for kind in KINDS:
        least = shortest(kind, grammar) + 2
        for seed in range(6):
            check(kind, grammar, SCHEMAS[name], least + 11 * seed, seed)


@pytest.mark.parametrize(
    ("pattern", "most"),
    [(r"^[a-z]+@[a-z]+\.(de|com)$", 40), (r"^[^x]*x$", 100), (r"^(ab|cd)+-\d{3}$", 12), (r"^ü{2}\+49$", 12)],
)
def test_a_pattern_comes_to_an_end(pattern: str, most: int) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": pattern}}, "required": ["a"]}
    ending = compiler("toy").begin(grammar_of("kvp", schema)).ending(most + 20)
    assert ending is not None
    assert judge("kvp", compiler("toy").index.text(ending).decode(), schema) is None


@pytest.mark.parametrize("kind", KINDS)
def test_an_end_inside_a_character_finishes_it(kind: str) -> None:
    index = compiler(kind).index
    for task, before in (("tables_otsl", "<otsl><fcel>a"), ("kvp", '{"a": "')):
        schema = {"type": "object", "properties": {"a": {"type": "string"}}} if task == "kvp" else None
        for first in ("é".encode()[:1], "€".encode()[:2], "😀".encode()[:1]):
            state = state_after(kind, grammar_of(task, schema), before)
            for byte in first:
                state.accept(index.byte_tokens[byte])
            ending = state.ending(20)
            assert ending is not None
            assert judge(task, (before.encode() + first + index.text(ending)).decode(), schema) is None


def test_closing_uses_null_where_allowed_and_invents_nothing() -> None:
    schema = {
        "type": "object",
        "properties": {
            "a": {"type": ["string", "null"]},
            "b": {"type": ["number", "null"]},
            "c": {"type": "array", "items": {"type": "string"}},
            "d": {"type": "string"},
            "e": {"type": "integer"},
        },
        "required": ["a", "b", "c", "d"],
    }
    state = state_after("toy", grammar_of("kvp", schema), '{"a": "x')
    ending = state.ending(200)
    assert ending is not None
    text = '{"a": "x' + compiler("toy").index.text(ending).decode()
    assert json.loads(text) == {"a": "x", "b": None, "c": [], "d": ""}


def test_an_end_that_was_too_long_once_is_found_where_there_is_room() -> None:
    state = state_after("toy", grammar_of("tables_otsl"), "<otsl><fcel>a")
    assert state.ending(1) is None
    ending = state.ending(50)
    assert ending is not None and state.ending(len(ending)) == ending and state.ending(len(ending) - 1) is None


def test_too_little_room_for_any_answer_leaves_a_cut_one() -> None:
    grammar = grammar_of("kvp", SCHEMAS["forty fields"])
    answer = generated("toy", grammar, 1, max_tokens=30, patience=NEVER)
    assert (answer.finish_reason, answer.closing, len(answer.tokens)) == ("length", None, 30)


def test_far_from_the_limit_nothing_changes() -> None:
    """An answer that ends by itself is the same for every limit that is not near."""
    for task in TABLES:
        answers = [generated("nano", grammar_of(task), 3, max_tokens=most, patience=1) for most in (400, 4000)]
        assert answers[0].finish_reason == "stop" and answers[0].tokens == answers[1].tokens


def test_tokens_that_end_an_answer_cost_no_decode() -> None:
    class Counted(Noise):
        n = -1  # the prompt is not counted

        def next(self, tokens: list[int]) -> np.ndarray:  # type: ignore[override]
            self.n += 1
            return super().next(tokens)

    answer, source = Answer(), Counted("toy", 5, "tables_otsl", NEVER)
    list(
        generate(
            source,
            answer,
            tokenizer("toy").text_stream(),
            sampling=Sampling(temperature=0),
            stop_tokens=frozenset({end_of_text("toy")}),
            max_tokens=25,
            cancelled=lambda: False,
            grammar=compiler("toy").begin(grammar_of("tables_otsl")),
            fast_forward=False,
        )
    )
    assert answer.closing and answer.timings.n_forced > 0
    assert source.n == answer.timings.n_steps == len(answer.tokens) - answer.timings.n_forced


def test_a_place_in_json_knows_strings() -> None:
    assert JsonPosition().after(b'{"a": "b') == JsonPosition(True, False)
    assert JsonPosition().after(rb'{"a": "b\\') == JsonPosition(True, False)
    assert JsonPosition().after(b'{"a": "b\\') == JsonPosition(True, True)
    assert JsonPosition().after(rb'{"a": "\"b"').in_string is False
