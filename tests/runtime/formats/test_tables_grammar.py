"""Tests of the automata of all formats: written tables are allowed, and every answer can be completed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import granite4v
from granite4v.runtime.formats import TASKS, read_csv, read_html, read_otsl, read_tables_json, write
from granite4v.runtime.formats.task_grammar import grammar_for
from granite4v.runtime.grammar.automaton import Position, advance, ending, start
from scripts.nano import formats
from scripts.nano.contents import random_chart
from scripts.nano.contents import random_table as nano_table
from tests.helpers.constrained import KINDS, allows, compiler, end_of_text, grammar_of, state_after
from tests.helpers.tables import ODD_TEXTS, random_table
from tests.toy.spec import PRESETS

OTSL, HTML = grammar_of("tables_otsl"), grammar_of("tables_html")
CELLS, CSV = grammar_of("tables_json"), grammar_of("chart2csv")
RULES = {task.name: task.rule for task in TASKS.values() if task.rule is not None}


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path]) -> Iterator[granite4v.Model]:
    with granite4v.load(make_model(PRESETS["tiny"]), device="cpu", n_threads=1) as model:
        yield model


@pytest.mark.parametrize(
    ("grammar", "read"), [(OTSL, read_otsl), (HTML, read_html), (CELLS, read_tables_json), (CSV, read_csv)]
)
def test_a_models_answers_are_tables_where_they_end(model: granite4v.Model, grammar: Any, read: Any) -> None:
    """Random weights, sampled at temperature 1; most answers are cut."""
    for seed in range(40):
        most = 20 + 3 * seed
        answer = model.generate("What?", max_tokens=most, temperature=1.0, seed=seed, constraint=grammar)
        assert len(answer.tokens) <= most and answer.finish_reason in ("stop", "length", "repetition")
        assert (answer.closing is not None) == (answer.finish_reason == "length")
        if answer.finish_reason != "repetition":
            read(answer.text)


WRITTEN = [("otsl", OTSL, read_otsl), ("html", HTML, read_html), ("json", CELLS, read_tables_json)]

TEXTS = [text for text in ODD_TEXTS if not text.startswith(("<td>", "<loc", "</")) and "<b>" not in text]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("form", "grammar", "read"), WRITTEN, ids=["otsl", "html", "json"])
def test_every_table_that_is_written_is_allowed(kind: str, form: str, grammar: Any, read: Any) -> None:
    texts = TEXTS if form == "otsl" else ODD_TEXTS
    for seed in range(25):
        table = random_table(seed, texts)
        text = write(table, form)
        if form == "html" and "<thead></thead>" in text:
            continue  # our writer marks a row of <th> that is no header row like this; models do not
        assert allows(kind, grammar, text), text
        several = write([table, random_table(seed + 500, texts)], form)
        assert allows(kind, grammar, several), several
        assert len(read(several)) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_answers_that_nano_is_taught_are_allowed(kind: str) -> None:
    for seed in range(15):
        table = nano_table(random.Random(seed), 1.0)
        for tag in ("<tables_html>", "<tables_json>", "<tables_otsl>"):
            assert allows(kind, grammar_for(tag), formats.answer_for(tag, table))
        chart = formats.chart_csv(random_chart(random.Random(seed), 1.0))
        assert allows(kind, CSV, chart), chart


def options(position: Position) -> list[tuple[bytes, bytes]]:
    """Returns what may come next: pairs of a literal and its missing part, or a character of text."""
    return [*position.remainders(), *([(b"5", b"5")] if position.in_text else [])]


@pytest.mark.parametrize("task", list(RULES))
def test_an_answer_can_be_ended_from_everywhere(task: str) -> None:
    for seed in range(40):
        rng, position = random.Random(seed), start(RULES[task])
        for _ in range(rng.randrange(60)):
            if not options(position):
                break
            rests = [rest for _, rest in options(position)]
            if task == "tables_json":  # one digit is enough for a number
                rests = [rest for rest in rests if not rest.isdigit()] or rests
            rest = rng.choice(rests)
            following = advance(position, rest[: rng.randint(1, len(rest))])
            assert following is not None
            position = following
            assert options(position) or position.is_accepting
        pieces = ending(position, 5_000)
        assert pieces is not None, position
        behind = advance(position, b"".join(pieces))
        assert behind is not None and behind.is_accepting
        assert not pieces or ending(position, len(pieces) - 1) is None


def test_a_character_split_into_tokens_is_completed() -> None:
    """After the first byte of a character only its continuation is allowed."""
    for kind in KINDS:
        state = state_after(kind, OTSL, "<otsl><fcel>a")
        index = compiler(kind).index
        [lead] = [i for i, piece in enumerate(index.pieces) if piece == "é".encode()[:1]]
        state.accept(lead)
        allowed = state.allowed([end_of_text(kind)])
        assert allowed.any() and not state.is_accepting
        for i, piece in enumerate(index.pieces):
            if allowed[i]:
                assert 0x80 <= piece[0] <= 0xBF


def test_special_tokens_are_not_text() -> None:
    for kind in KINDS:
        state = state_after(kind, OTSL, "<otsl><fcel>a")
        allowed = state.allowed([end_of_text(kind)])
        vocabulary = compiler(kind).index
        assert not any(allowed[i] for i, piece in enumerate(vocabulary.pieces) if not piece)
        assert allowed.sum() > 200
