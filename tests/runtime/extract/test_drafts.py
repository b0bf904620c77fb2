"""Tests of drafts from answers: which questions wait for others, and what finished answers predict for later ones."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from granite4v.runtime.engine.draft import Drafter, DraftSource
from granite4v.runtime.extract.drafts import Drafts, chains
from granite4v.runtime.extract.questions import Question
from granite4v.runtime.formats import read
from scripts.nano import formats
from scripts.nano.contents import random_table
from scripts.nano.truth import Table
from tests.helpers.constrained import tokenizer


def question(task: str) -> Question:
    return Question(task, f"<{task}>")


JSON, HTML, OTSL, KVP = map(question, ("tables_json", "tables_html", "tables_otsl", "kvp"))
WRITERS = {"tables_json": formats.tables_json, "tables_html": formats.html, "tables_otsl": formats.otsl}


@pytest.fixture
def drafts() -> Drafts:
    model: Any = SimpleNamespace(prompts=SimpleNamespace(tokenizer=lambda: tokenizer("nano")))
    return Drafts(model)


def tokens_of(text: str) -> list[int]:
    return tokenizer("nano").encode_plain(text)


def proposed(sources: Sequence[DraftSource], answer: str, most: int = 10_000) -> str:
    draft = Drafter((), sources).propose(tokens_of(answer), most)
    return tokenizer("nano").decode(draft.tokens)


def test_tables_in_several_formats_form_a_chain() -> None:
    assert chains([JSON, KVP, HTML, question("chart2csv"), OTSL]) == ((0, 2, 4), (1,), (3,))
    assert chains([question("chart2csv"), question("chart2code"), question("prompt")]) == ((0,), (1,), (2,))
    assert chains([]) == ()


@pytest.mark.parametrize("first", [JSON, HTML, OTSL])
@pytest.mark.parametrize("second", [JSON, HTML, OTSL])
def test_a_table_in_one_format_predicts_it_in_the_others(drafts: Drafts, first: Question, second: Question) -> None:
    for seed in range(10):
        table = plain_table(seed)
        text = WRITERS[first.task](table)
        page = f"page {seed}"
        drafts.add(page, first, tokens_of(text), read(first.task, text))
        sources = drafts.sources(page, second)
        predicted = [
            cursor.text.tokens for source in sources for cursor in source.cursors() if cursor.kind == "predicted"
        ]
        assert predicted == [tokens_of(WRITERS[second.task](table))]


def plain_table(seed: int) -> Table:
    """Returns a table that all formats express equally: all header cells are in header rows, and no cell is empty."""
    while True:
        table = random_table(Random(seed), 1.0)
        seed += 1000
        if all(cell.header == (cell.row < table.n_header_rows) and cell.text for cell in table.cells):
            return table


def test_a_page_predicts_nothing_for_another_and_nothing_after_it_is_forgotten(drafts: Drafts) -> None:
    text = "<table><tbody><tr><td>Valve</td></tr></tbody></table>"
    drafts.add("a", HTML, tokens_of(text), read("tables_html", text))
    assert proposed(drafts.sources("a", OTSL), "").startswith("<otsl>")
    assert proposed(drafts.sources("b", OTSL), "") == ""
    drafts.forget("a")
    assert proposed(drafts.sources("a", OTSL), "") == ""


def test_cells_of_a_table_are_drafts_for_fields(drafts: Drafts) -> None:
    text = "<table><tbody><tr><td>Rotterdam</td></tr></tbody></table>"
    drafts.add("a", HTML, tokens_of(text), read("tables_html", text))
    assert proposed(drafts.sources("a", KVP), '{"city": "Rott', 5) == "erdam"
    assert proposed(drafts.sources("b", KVP), '{"city": "Rott', 5) == ""


def test_answers_about_earlier_pages_are_drafts_for_the_same_question(drafts: Drafts) -> None:
    drafts.add("a", KVP, tokens_of('{"name": "Ada", "city": "Paris"}'), {"name": "Ada", "city": "Paris"})
    assert proposed(drafts.sources("b", KVP), '{"name": "Bob', 4).startswith('"')
    other = Question("kvp", "other fields")
    assert proposed(drafts.sources("b", other), '{"name": "Bob', 4) == ""


@pytest.mark.parametrize(
    ("asked", "value"), [(HTML, None), (HTML, []), (question("chart2code"), "text"), (KVP, {"a": 1})]
)
def test_answers_without_tables_predict_nothing(drafts: Drafts, asked: Question, value: Any) -> None:
    drafts.add("a", asked, tokens_of("<table>"), value)
    assert [cursor.kind for cursor in drafts.sources("a", OTSL)[-1].cursors()] == ["piece"]


def test_what_a_format_cannot_hold_is_no_prediction(drafts: Drafts) -> None:
    text = "<table><tbody><tr><td>a &lt;nl&gt; tag</td></tr></tbody></table>"
    drafts.add("a", HTML, tokens_of(text), read("tables_html", text))
    assert proposed(drafts.sources("a", OTSL), "") == ""
    assert proposed(drafts.sources("a", JSON), "") != ""
