"""Tests of loop detection: looping answers are detected; legitimate tables, forms, code and prose are not."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from granite4v.runtime.answer import Answer
from granite4v.runtime.engine.sampler import Sampling
from granite4v.runtime.formats import TASKS, Cell, Table, salvage, write
from granite4v.runtime.formats.repetition import (
    LONGEST_CYCLE,
    MOST_BLANK_ROWS,
    MOST_CHARACTERS,
    MOST_ROUNDS,
    MOST_ROWS,
    Repetition,
    period,
    without_loop,
)
from granite4v.runtime.formats.rows import LINES
from granite4v.runtime.formats.tasks import task_or_question
from scripts.nano import formats
from scripts.nano.contents import random_chart, random_form, random_table
from tests.helpers.constrained import tokenizer
from tests.helpers.drive import generate
from tests.helpers.tables import ODD_TEXTS
from tests.helpers.tables import random_table as random_output

FORMS = {"tables_otsl": "otsl", "tables_html": "html", "tables_json": "json", "chart2csv": "csv"}


def rows_until_noticed(task: str, row: Callable[[int], str], most: int = 300) -> int | None:
    """Pushes rows in pieces of a few characters; returns how many it takes until the loop is detected, or None."""
    watch = Repetition(task_or_question(task).rows)
    for i in range(most):
        text = row(i)
        for at in range(0, len(text), 5):
            if watch.push(text[at : at + 5]):
                return i + 1
    return None


def says(task: str, text: str) -> bool:
    watch = Repetition(task_or_question(task).rows)
    return any(watch.push(text[at : at + 3]) for at in range(0, len(text), 3))


ROWS: dict[str, Callable[[int, Sequence[str]], str]] = {
    "tables_otsl": lambda i, texts: "".join(f"<fcel>{t}" if t else "<ecel>" for t in texts) + "<nl>",
    "tables_html": lambda i, texts: "<tr>" + "".join(f"<td>{t}</td>" for t in texts) + "</tr>",
    "tables_json": lambda i, texts: "".join(
        f'{{"row": {i + 1}, "col": {j + 1}, "colspan": 1, "rowspan": 1, "type": "data", "header_level": 0, '
        f'"content": "{t}"}}, '
        for j, t in enumerate(texts)
    ),
    "kvp": lambda i, texts: "{" + ", ".join(f'"{"abc"[j]}": "{t}"' for j, t in enumerate(texts)) + "}, ",
    "chart2csv": lambda i, texts: ",".join(texts) + "\n",
    "chart2code": lambda i, texts: "plt.text(" + ", ".join(texts) + ")\n",
    "": lambda i, texts: " ".join(texts) + "\n",
}


@pytest.mark.parametrize("task", list(ROWS))
def test_one_row_again_and_again(task: str) -> None:
    n_rows = rows_until_noticed(task, lambda i: ROWS[task](i, ["Paper", "12.50", "1"]))
    assert n_rows is not None and MOST_ROWS <= n_rows <= MOST_ROWS + 2


@pytest.mark.parametrize("task", list(ROWS))
def test_a_short_cycle_of_rows(task: str) -> None:
    for cycle in range(2, LONGEST_CYCLE + 1):

        def row(i: int, cycle: int = cycle) -> str:
            return ROWS[task](i, [f"item {i % cycle}", "x", "y"])

        n_rows = rows_until_noticed(task, row)
        assert n_rows is not None and n_rows <= max(MOST_ROWS, MOST_ROUNDS * cycle) + 2, f"cycle of {cycle} rows"


@pytest.mark.parametrize("task", list(ROWS))
def test_after_an_honest_beginning(task: str) -> None:
    n_rows = rows_until_noticed(task, lambda i: ROWS[task](i, [f"item {min(i, 20)}", "x", "y"]))
    assert n_rows is not None and 20 + MOST_ROWS <= n_rows <= 22 + MOST_ROWS


@pytest.mark.parametrize("task", ["tables_otsl", "tables_html", "tables_json", "kvp", "chart2csv"])
def test_rows_with_nothing_in_them_may_be_more(task: str) -> None:
    n_rows = rows_until_noticed(task, lambda i: ROWS[task](i, ["", "", ""]))
    assert n_rows is not None and MOST_BLANK_ROWS <= n_rows <= MOST_BLANK_ROWS + 2


@pytest.mark.parametrize("task", list(ROWS))
def test_rows_that_differ_a_little_are_honest(task: str) -> None:
    rng = random.Random(1)
    assert rows_until_noticed(task, lambda i: ROWS[task](i, [str(i), "0", "0"])) is None
    assert rows_until_noticed(task, lambda i: ROWS[task](i, ["Paper", "0.00", str(rng.randint(0, 999))])) is None
    assert rows_until_noticed(task, lambda i: ROWS[task](i, ["Paper", "0.00", "-" if i % 30 else "sum"])) is None
    assert rows_until_noticed(task, lambda i: ROWS[task](i, ["0", "0", "0"]), most=MOST_ROWS - 1) is None


@pytest.mark.parametrize("task", list(FORMS))
def test_tables_that_repeat_cells_are_honest(task: str) -> None:
    for seed in range(60):
        texts = ODD_TEXTS if seed % 2 else ["0", "-", ""]
        if task == "tables_otsl":
            texts = [text for text in texts if "<" not in text]
        table = random_output(seed, texts, most=12)
        assert not says(task, write(table, FORMS[task]))
    blank = Table(40, 12, 0, tuple(Cell(i, j, "") for i in range(40) for j in range(12)))
    zeros = Table(30, 12, 0, tuple(Cell(i, j, "0.00") for i in range(30) for j in range(12)))
    assert not says(task, write(blank, FORMS[task])) and not says(task, write(zeros, FORMS[task]))


def test_the_answers_of_generated_documents_are_not_loops() -> None:
    for seed in range(40):
        rng = random.Random(seed)
        table, chart, form = random_table(rng, 1.0), random_chart(rng, 1.0), random_form(rng, 1.0)
        for tag in ("<tables_html>", "<tables_json>", "<tables_otsl>"):
            assert not says(tag.strip("<>"), formats.answer_for(tag, table))
        for tag in ("<chart2csv>", "<chart2code>", "<chart2summary>"):
            assert not says(tag.strip("<>"), formats.answer_for(tag, chart))
        assert not says("kvp", formats.form_json(form))


@pytest.mark.parametrize(
    ("task", "before", "text"),
    [
        ("tables_otsl", "<otsl><fcel>", "0"),
        ("tables_otsl", "<otsl><fcel>a", "<ecel>"),
        ("tables_html", "<table><tr><td>", "no no "),
        ("tables_json", '{"dimensions": {"rows": ', "1"),
        ("kvp", '{"numbers": [', "0, "),
        ("kvp", '{"text": "', "and so on and so forth, "),
        ("chart2csv", "a,b\n1,", "0"),
        ("chart2code", "x = [", "1.5, "),
        ("", "It says that ", "it says that "),
        ("", "", "\n"),
        ("", "word", " "),
    ],
)
def test_one_row_that_does_not_end(task: str, before: str, text: str) -> None:
    watch, n = Repetition(task_or_question(task).rows), 0
    assert not watch.push(before)
    while not watch.push(text):
        n += len(text)
        assert n < MOST_CHARACTERS + 400
    assert n > 60


@pytest.mark.parametrize(
    "text",
    [
        "Chapter one " + "." * 150 + " 12\n",
        "Name: " + "_" * 150,
        "<table><tr>" + "<td></td>" * 52 + "</tr>",
        "x = [" + "0, " * 120 + "1]\n",
        "The quick brown fox jumps over the lazy dog. " * 3,
        "\n" * 20,
    ],
)
def test_leaders_blanks_and_lists_are_not_loops(text: str) -> None:
    assert not any(says(task, text) for task in ROWS)


@pytest.mark.parametrize("length", [1, 2, 7, 50])
def test_a_period_is_found(length: int) -> None:
    rng = random.Random(length)
    part = "".join(rng.choice("abcdefgh") for _ in range(length))
    text = (part * MOST_CHARACTERS)[:MOST_CHARACTERS]
    assert period(text) == period_by_trying(text) and period(text[1:]) is None
    assert period(text[:300] + "X" + text[301:]) is None
    long = "".join(chr(200 + i) for i in range(MOST_CHARACTERS // MOST_ROUNDS + 1))
    assert period((long * MOST_ROUNDS)[:MOST_CHARACTERS]) is None


def period_by_trying(text: str) -> int:
    return next(n for n in range(1, len(text) + 1) if text[n:] == text[:-n])


@pytest.mark.parametrize("cycle", [1, 3, LONGEST_CYCLE])
@pytest.mark.parametrize("n_before", [1, 5])
@pytest.mark.parametrize("task", list(ROWS))
def test_of_a_loop_the_first_round_is_kept(task: str, n_before: int, cycle: int) -> None:
    def row(i: int) -> str:
        return ROWS[task](i, [f"own {i}" if i < n_before else f"item {(i - n_before) % cycle}", "x", "y"])

    rows = task_or_question(task).rows
    text = "".join(row(i) for i in range(n_before + 2 * MOST_ROUNDS * LONGEST_CYCLE))
    first_round = "".join(row(i) for i in range(n_before + cycle))
    for piece in (1, 5, 1000):
        watch = Repetition(rows)
        end = next(at for at in range(piece, len(text), piece) if watch.push(text[at - piece : at]))
        kept = without_loop(text[:end], rows)
        assert kept.rstrip(", ") == first_round.rstrip(", ")
        assert end - watch.n_repeated == len(kept)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("It says: " + "so it goes, " * 60, "It says: so it goes,"),
        ("a,b\n1," + "0" * 700, "a,b\n1,0"),
        ("", ""),
        ("one\ntwo\n" * 17, "one\ntwo\n" * 17),
    ],
)
def test_of_a_row_that_loops_the_first_round_is_kept(text: str, kept: str) -> None:
    assert without_loop(text, LINES) == kept


def test_a_table_has_the_rows_of_the_first_round() -> None:
    begun = "<otsl><ched>Name<ched>Value<nl><fcel>Foo<fcel>42<nl>"
    found = salvage("tables_otsl", begun + "<fcel>x<fcel>y<nl>" * MOST_ROWS)
    assert found is not None and found.cut
    [table] = found.value
    assert [cell.text for cell in table.cells] == ["Name", "Value", "Foo", "42", "x", "y"]
    found = salvage("tables_otsl", begun + "<fcel>x<fcel>y<nl>" * (MOST_ROWS - 1))
    assert found is not None and found.value[0].n_rows == MOST_ROWS + 1


def test_its_memory_does_not_grow() -> None:
    """It keeps the last few rows, not the answer."""
    watch, n_bytes = Repetition(TASKS["tables_otsl"].rows), []
    for i in range(1000, 4000):
        watch.push(f"<fcel>{i}<nl>")
        n_bytes.append(len(pickle.dumps(watch)))
    assert max(n_bytes[2 * LONGEST_CYCLE :]) == n_bytes[2 * LONGEST_CYCLE]


# --- in the generation loop ---


class Again:
    """Logits that give the same tokens again and again."""

    def __init__(self, text: str) -> None:
        self.tokens = tokenizer("nano").encode_plain(text)

    def first(self) -> np.ndarray:
        return self.next(())

    def next(self, tokens: Sequence[int]) -> np.ndarray:
        logits = np.zeros(512, dtype=np.float32)
        logits[self.tokens[len(tokens) % len(self.tokens)]] = 1
        return logits


def answer_of(text: str, repetition: Repetition | None, max_tokens: int = 2000) -> Answer:
    answer = Answer()
    pieces = generate(
        Again(text),
        answer,
        tokenizer("nano").text_stream(),
        sampling=Sampling(),
        stop_tokens=frozenset(),
        max_tokens=max_tokens,
        cancelled=lambda: False,
        repetition=repetition,
    )
    assert "".join(pieces) == answer.text
    return answer


def test_an_answer_that_runs_on_is_ended() -> None:
    answer = answer_of("<fcel>a<ecel><nl>", Repetition(TASKS["tables_otsl"].rows))
    assert answer.finish_reason == "repetition"
    assert answer.text == "<fcel>a<ecel><nl>" * MOST_ROWS
    assert len(answer.tokens) == answer.timings.n_generated == 4 * MOST_ROWS


def test_it_can_be_switched_off() -> None:
    answer = answer_of("<fcel>a<ecel><nl>", None)
    assert (answer.finish_reason, len(answer.tokens)) == ("length", 2000)
