"""Tables under a constraint: every answer that ends is a table to docling-core, pandas, csv and our own readers, every
table that our writers write is allowed, and no way through a form comes to a place from which it cannot end."""

from __future__ import annotations

import csv
import io
import itertools
import json
import logging
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import granite4v
from granite4v.errors import AnswerError
from granite4v.runtime.formats import TASKS, Table, read_csv, read_html, read_otsl, read_tables_json, write
from granite4v.runtime.formats.task_grammar import grammar_for
from granite4v.runtime.grammar.automaton import Position, advance, ending, start
from scripts.nano import formats
from scripts.nano.contents import random_chart
from scripts.nano.contents import random_table as nano_table
from tests.helpers.constrained import KINDS, allows, compiler, end_of_text, generated, state_after
from tests.runtime.formats.test_parsers import ODD_TEXTS, random_table
from tests.toy.spec import PRESETS

OTSL, HTML = grammar_for("tables_otsl"), grammar_for("tables_html")
CELLS, CSV = grammar_for("tables_json"), grammar_for("chart2csv")
assert OTSL and HTML and CELLS and CSV
RULES = {task.name: task.rule for task in TASKS.values() if task.rule is not None}

CELLS_SCHEMA = {
    "$defs": {
        "table": {
            "type": "object",
            "properties": {
                "dimensions": {
                    "type": "object",
                    "properties": {
                        key: {"type": "integer", "minimum": 0}
                        for key in ("rows", "columns", "header_rows", "total_rows")
                    },
                    "required": ["rows", "columns", "header_rows", "total_rows"],
                    "additionalProperties": False,
                },
                "cells": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {
                            **{key: {"type": "integer", "minimum": 1} for key in ("row", "col", "colspan", "rowspan")},
                            "type": {"enum": ["header", "data"]},
                            "header_level": {"type": "integer", "minimum": 0},
                            "content": {"type": "string"},
                        },
                        "required": ["row", "col", "colspan", "rowspan", "type", "header_level", "content"],
                        "additionalProperties": False,
                    },
                },
            },
            "required": ["dimensions", "cells"],
            "additionalProperties": False,
        }
    },
    "anyOf": [{"$ref": "#/$defs/table"}, {"type": "array", "items": {"$ref": "#/$defs/table"}}],
}


# --- answers of noise: judged by others ---


def ended(kind: str, grammar: Any, seeds: range, **options: Any) -> Iterator[str]:
    """The answers that came to an end by themselves, each once."""
    answers = [generated(kind, grammar, seed, fast_forward=seed % 2 == 0, **options) for seed in seeds]
    texts = {answer.text for answer in answers if answer.finish_reason == "stop"}
    assert len(texts) >= 6
    assert {answer.finish_reason for answer in answers} <= {"stop", "length"}
    yield from texts


@pytest.mark.parametrize("kind", KINDS)
def test_otsl_is_what_docling_reads(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Its parser takes a '<' in a text for a tag, so it gets another sign for those."""
    from docling_core.types.doc.utils import parse_otsl_table_content

    n_tables = 0
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        for text in ended(kind, OTSL, range(60)):
            tables = read_otsl(text)
            parts = re.findall(r"<otsl>(.*?)</otsl>", text, flags=re.DOTALL)
            assert len(tables) == len(parts)
            for table, part in zip(tables, parts, strict=True):
                data = parse_otsl_table_content(re.sub(r"<(?![a-z/])", "‹", part))
                assert (data.num_rows, data.num_cols) == (table.n_rows, table.n_cols)
                found = [(c.start_row_offset_idx, c.start_col_offset_idx, c.row_span, c.col_span, c.text)
                         for c in data.table_cells]  # fmt: skip
                ours = [(c.row, c.col, c.rowspan, c.colspan, c.text.replace("<", "‹")) for c in table.cells]
                assert found == ours
                n_tables += 1
    assert not caplog.records and n_tables > 10


def slots_of(table: Any) -> tuple[Counter[tuple[int, int]], int, int]:
    """How often each slot is covered, rows and columns, by HTML's way of forming a table."""
    covered: Counter[tuple[int, int]] = Counter()
    rows = table.findall(".//tr")
    for i, row in enumerate(rows):
        j = 0
        for cell in row:
            while covered[i, j]:
                j += 1
            for down, right in itertools.product(
                range(int(cell.get("rowspan", 1))), range(int(cell.get("colspan", 1)))
            ):
                covered[i + down, j + right] += 1
    covered += Counter()
    return covered, len(rows), 1 + max(j for _, j in covered)


@pytest.mark.parametrize("kind", KINDS)
def test_html_is_a_rectangle_to_lxml(kind: str) -> None:
    import lxml.html

    n_spans = 0
    for text in ended(kind, HTML, range(60), max_tokens=400):
        found = [lxml.html.fromstring(part) for part in re.findall(r"<table>.*?</table>", text, flags=re.DOTALL)]
        for table, other in zip(read_html(text), found, strict=True):
            covered, n_rows, n_cols = slots_of(other)
            assert covered == Counter(itertools.product(range(n_rows), range(n_cols)))
            assert (table.n_rows, table.n_cols) == (n_rows, n_cols)
            texts = [" ".join(cell.text_content().split()) for cell in other.iter("td", "th")]
            assert texts == [" ".join(cell.text.split()) for cell in table.cells]
            n_spans += any(cell.rowspan > 1 or cell.colspan > 1 for cell in table.cells)
    assert n_spans


@pytest.mark.parametrize("kind", KINDS)
def test_html_is_well_formed(kind: str) -> None:
    from lxml import etree

    for text in ended(kind, HTML, range(60, 100), max_tokens=400):
        for part in re.findall(r"<table>.*?</table>", text, flags=re.DOTALL):
            strict = re.sub(r"<br/?>", "<br/>", part.replace("&", "&amp;"))
            strict = re.sub(r"<(?![a-zA-Z/])", "&lt;", strict)
            table = etree.fromstring(strict)
            assert {child.tag for child in table} <= {"thead", "tbody", "tr"}


@pytest.mark.parametrize("kind", KINDS)
def test_csv_rows_are_as_wide_as_the_header(kind: str) -> None:
    widths: Counter[int] = Counter()
    for text in ended(kind, CSV, range(100)):
        inner = re.fullmatch(r"```(?:csv)?\n(.*?)\n```", text, flags=re.DOTALL)
        rows = list(csv.reader(io.StringIO(inner[1] if inner else text, newline=""), strict=True))
        assert rows and {len(row) for row in rows} == {len(rows[0])}
        assert read_csv(text).texts() == rows
        widths[len(rows[0])] += len(rows) > 1
    assert widths.total() > 10 and len(widths) > 3


@pytest.mark.parametrize("kind", KINDS)
def test_cells_cover_their_table(kind: str) -> None:
    validator = jsonschema.Draft202012Validator(CELLS_SCHEMA)
    for text in ended(kind, CELLS, range(90), max_tokens=500, patience=6):
        found = json.loads(text)
        validator.validate(found)
        for table in found if isinstance(found, list) else [found]:
            size = table["dimensions"]
            slots = Counter(
                (row, column)
                for cell in table["cells"]
                for row in range(cell["row"], cell["row"] + cell["rowspan"])
                for column in range(cell["col"], cell["col"] + cell["colspan"])
            )
            every = itertools.product(range(1, size["total_rows"] + 1), range(1, size["columns"] + 1))
            assert slots == Counter(every)
        read_tables_json(text)


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path]) -> Iterator[granite4v.Model]:
    with granite4v.load(make_model(PRESETS["tiny"]), device="cpu", n_threads=1) as model:
        yield model


@pytest.mark.parametrize(
    ("grammar", "read"), [(OTSL, read_otsl), (HTML, read_html), (CELLS, read_tables_json), (CSV, read_csv)]
)
def test_a_models_answers_are_tables_where_they_end(model: granite4v.Model, grammar: Any, read: Any) -> None:
    """Random weights, drawn at temperature 1; most are cut."""
    for seed in range(40):
        most = 20 + 3 * seed
        answer = model.generate("What?", max_tokens=most, temperature=1.0, seed=seed, constraint=grammar)
        assert len(answer.tokens) <= most and answer.finish_reason in ("stop", "length", "repetition")
        assert (answer.closing is not None) == (answer.finish_reason == "length")
        if answer.finish_reason != "repetition":
            read(answer.text)


# --- what our writers write is allowed ---

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
            continue  # how the writer says that a row of <th> is no header row; models do not
        assert allows(kind, grammar, text), text
        several = write([table, random_table(seed + 500, texts)], form)
        assert allows(kind, grammar, several), several
        assert len(read(several)) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_every_csv_that_is_written_is_allowed(kind: str) -> None:
    for seed in range(25):
        table = random_table(seed, [text for text in ODD_TEXTS if "`" not in text], headers=False)
        text = write(table, "csv")
        assert allows(kind, CSV, text) and allows(kind, CSV, text + "\n") and allows(kind, CSV, f"```csv\n{text}\n```")


@pytest.mark.parametrize("kind", KINDS)
def test_the_answers_that_nano_is_taught_are_allowed(kind: str) -> None:
    for seed in range(15):
        table = nano_table(random.Random(seed), 1.0)
        for tag in ("<tables_html>", "<tables_json>", "<tables_otsl>"):
            assert allows(kind, grammar_for(tag), formats.answer_for(tag, table))
        chart = formats.chart_csv(random_chart(random.Random(seed), 1.0))
        assert allows(kind, CSV, chart), chart


# --- by hand ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<otsl><fcel>a<nl></otsl>", True),
        ("<otsl><ecel><nl></otsl><otsl><ecel><nl></otsl>", True),
        ("<otsl><ecel><nl></otsl>\n<otsl><ecel><nl></otsl>", True),
        ("[<otsl><ecel><nl></otsl>, <otsl><ecel><nl></otsl>]", True),
        ("[]", True),
        ("<otsl><fcel>p < 0.05<nl></otsl>", True),
        ("<otsl><fcel><LOQ<nl></otsl>", True),
        ("<otsl><fcel>a\nb<nl></otsl>", True),
        ("", False),
        ("<otsl></otsl>", False),
        ("<otsl><nl></otsl>", False),
        ("<otsl><fcel><nl></otsl>", False),  # an empty cell is <ecel>
        ("<otsl><fcel> \u3000<nl></otsl>", False),
        ("<otsl><ecel>a<nl></otsl>", False),
        ("<otsl><ecel><nl><ecel><ecel><nl></otsl>", False),
        ("<otsl><ecel><ecel><nl><ecel><nl></otsl>", False),
        ("<otsl><ecel><nl>", False),
        ("<otsl><lcel><nl></otsl>", False),
        ("<otsl><ucel><nl></otsl>", False),
        ("<otsl><xcel><nl></otsl>", False),
        ("<otsl><fcel>a<otsl><nl></otsl>", False),
        ("<otsl><fcel>a\x00<nl></otsl>", False),
        ("[<otsl><ecel><nl></otsl>", False),
        ("[<otsl><ecel><nl></otsl>]<otsl><ecel><nl></otsl>", False),
    ],
)
def test_otsl(text: str, expected: bool) -> None:
    assert [allows(kind, OTSL, text) for kind in KINDS] == [expected] * 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<tr><td>a</td></tr>", True),
        ("<thead><tr><th>a</th></tr></thead><tbody><tr><td></td></tr></tbody>", True),
        ("<thead><tr><th>a</th></tr></thead><tr><td></td></tr>", True),
        ('<tr><td colspan="2">a</td></tr><tr><td>b</td><td>c</td></tr>', True),
        ('<tr><td rowspan="2" colspan="2">a</td><td>b</td></tr><tr><td>c</td></tr>', True),
        ('<tr><td rowspan="2">a</td></tr><tr></tr>', True),
        ("<tr><td>AT&amp;T &lt; 1 & 2 < 3 > 2</td></tr>", True),
        ("<tr><td>a<br>b<br/>m<sup>2</sup></td></tr>", True),
        ("", False),
        ("<thead></thead><tr><td>a</td></tr>", False),
        ("<tr></tr>", False),
        ("<tr><td>a</td></tr><tr></tr>", False),
        ("<tr><td>a</td></tr><tr><td>b</td><td>c</td></tr>", False),
        ("<tr><td>a</td><td>b</td></tr><tr><td>c</td></tr>", False),
        ('<tr><td>a</td></tr><tr><td colspan="2">c</td></tr>', False),
        ('<tr><td colspan="0">a</td></tr>', False),
        ('<tr><td rowspan="2">a</td></tr>', False),
        ('<thead><tr><td rowspan="2">a</td><td>b</td></tr></thead><tr><td>c</td></tr>', False),
        ('<tr><td colspan="2" colspan="2">a</td></tr>', False),
        ("<tr><td>a</th></tr>", False),
        ("<tr><td>a<sup>b</td></tr>", False),
        ("<tr><td>a<script></td></tr>", False),
        ("<tr><td>a<b>x<i>y</i></b></td></tr>", False),
        ("<tbody><tr><td>a</td></tr>", False),
        ("<tbody><tr><td>a</td></tr></tbody><thead><tr><td>a</td></tr></thead>", False),
    ],
)
def test_html(text: str, expected: bool) -> None:
    assert [allows(kind, HTML, f"<table>{text}</table>") for kind in KINDS] == [expected] * 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", True),
        ("a,b\n1,2", True),
        ("a,b\n1,2\n", True),
        (",\n,", True),
        ('"a,""b""\n",b\n"","1\n2"', True),
        ('""\n""', True),
        ("Größe, ü\n東京, 1", True),
        ("```csv\na,b\n1,2\n```", True),
        ("```\na\n```", True),
        ("", False),
        ("\n", False),
        ("a\n\n", False),
        ("a,b\n1", False),
        ("a,b\n1,2,3", False),
        ("a,b\n1,2\n\n", False),
        ('a"b', False),
        ('"a', False),
        ('"a"b', False),
        ("a\r\nb", False),
        ("```csv\na\n", False),
        ("```csv\n```", False),
        ("```python\na", False),
        ("a,b\n```\n", False),
    ],
)
def test_csv(text: str, expected: bool) -> None:
    assert [allows(kind, CSV, text) for kind in KINDS] == [expected] * 2


def as_json(size: tuple[int, int, int, int], *cells: tuple[int, int, int, int, str]) -> str:
    names = ("rows", "columns", "header_rows", "total_rows")
    dimensions = ", ".join(f'"{name}": {value}' for name, value in zip(names, size, strict=True))
    written = (
        f'{{"row": {row}, "col": {col}, "colspan": {colspan}, "rowspan": {rowspan}, "type": "data", '
        f'"header_level": 0, "content": "{text}"}}'
        for row, col, colspan, rowspan, text in cells
    )
    return f'{{"dimensions": {{{dimensions}}}, "cells": [{", ".join(written)}]}}'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (as_json((1, 1, 0, 1), (1, 1, 1, 1, "a")), True),
        (as_json((0, 1, 1, 1), (1, 1, 1, 1, "")), True),
        (as_json((2, 1, 1, 2), (1, 1, 1, 2, 'é \\" \\\\ \\n')), True),  # `rows` counts all
        (as_json((1, 1, 1, 2), (1, 1, 1, 2, "a")), True),
        (as_json((2, 2, 0, 2), (1, 1, 1, 2, "a"), (1, 2, 1, 1, "b"), (2, 2, 1, 1, "c")), True),
        ("[" + as_json((1, 1, 0, 1), (1, 1, 1, 1, "a")) + "]", True),
        ("[]", True),
        (as_json((1, 1, 0, 2), (1, 1, 1, 2, "a")), False),
        (as_json((0, 1, 0, 0)), False),
        (as_json((1, 0, 0, 1)), False),
        (as_json((1, 1, 0, 1)), False),
        (as_json((1, 1, 0, 1), (1, 1, 2, 1, "a")), False),
        (as_json((1, 1, 0, 1), (1, 1, 1, 2, "a")), False),
        (as_json((1, 1, 0, 1), (0, 0, 1, 1, "a")), False),
        (as_json((1, 2, 0, 1), (1, 1, 1, 1, "a")), False),
        (as_json((1, 1, 0, 1), (1, 1, 1, 1, "a"), (1, 2, 1, 1, "b")), False),
        (as_json((1, 1, 0, 1), (1, 1, 1, 1, "a\n")), False),
        (as_json((1, 1, 0, 1), (1, 1, 1, 1, "\\ud800")), False),
        (as_json((1, 1, 0, 1), (1, 1, 1, 1, "a")).replace(": ", ":"), False),
        (as_json((1, 1, 0, 1), (1, 1, 1, 1, "a")) * 2, False),
        (as_json((1, 1, 0, 1), (1, 1, 1, 1, "a")).replace('"rows": 1', '"rows": 01'), False),
    ],
)
def test_cells(text: str, expected: bool) -> None:
    assert [allows(kind, CELLS, text) for kind in KINDS] == [expected] * 2


# --- the whole of small tables ---


def is_covered_by_rectangles(rows: list[list[str]]) -> bool:
    """By the definition of the tags, without looking at a row twice: cells grow, then each must fill its rectangle."""
    owner: dict[tuple[int, int], tuple[int, int]] = {}
    for i, row in enumerate(rows):
        for j, tag in enumerate(row):
            before = {"lcel": (i, j - 1), "ucel": (i - 1, j), "xcel": (i - 1, j - 1)}.get(tag)
            if before is not None and before not in owner:
                return False
            owner[i, j] = (i, j) if before is None else owner[before]
    for first in set(owner.values()):
        slots = {slot for slot, start_slot in owner.items() if start_slot == first}
        last = max(slots)
        for i, j in itertools.product(range(first[0], last[0] + 1), range(first[1], last[1] + 1)):
            expected = "ecel" if (i, j) == first else "lcel" if i == first[0] else "ucel" if j == first[1] else "xcel"
            if (i, j) not in slots or rows[i][j] != expected:
                return False
        if len(slots) != (last[0] - first[0] + 1) * (last[1] - first[1] + 1):
            return False
    return True


@pytest.mark.parametrize(("n_rows", "n_cols"), [(1, 3), (2, 2), (2, 3), (3, 2)])
def test_otsl_allows_the_grids_of_rectangles_and_no_others(n_rows: int, n_cols: int) -> None:
    n_allowed = 0
    for tags in itertools.product(("ecel", "lcel", "ucel", "xcel"), repeat=n_rows * n_cols):
        rows = [list(tags[i * n_cols : (i + 1) * n_cols]) for i in range(n_rows)]
        text = "".join("".join(f"<{tag}>" for tag in row) + "<nl>" for row in rows)
        position = advance(start(RULES["tables_otsl"]), f"<otsl>{text}</otsl>".encode())
        assert (position is not None) == is_covered_by_rectangles(rows), text
        n_allowed += position is not None
    assert n_allowed > 1


def test_html_allows_what_our_reader_reads_and_nothing_else() -> None:
    cells = ["", *(f"<td{a}{b}>x</td>" for a in ("", ' colspan="2"') for b in ("", ' rowspan="2"'))]
    rows = ["".join(pair) for pair in itertools.product(cells, repeat=2)]
    n_allowed = 0
    for chosen in itertools.product(rows, repeat=2):
        text = "<table>" + "".join(f"<tr>{row}</tr>" for row in chosen) + "</table>"
        try:
            read_html(text)
            expected = True
        except AnswerError:
            expected = False
        assert (advance(start(RULES["tables_html"]), text.encode()) is not None) == expected, text
        n_allowed += expected
    assert n_allowed > 10


# --- no way without an end ---


def options(position: Position) -> list[tuple[bytes, bytes]]:
    """What may come next: the literal and what is missing of it, or a character of text."""
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


def test_a_text_of_characters_in_pieces_stays_whole() -> None:
    """A character of several tokens can be ended, and only in one way."""
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


def test_special_tokens_are_no_text() -> None:
    for kind in KINDS:
        state = state_after(kind, OTSL, "<otsl><fcel>a")
        allowed = state.allowed([end_of_text(kind)])
        vocabulary = compiler(kind).index
        assert not any(allowed[i] for i, piece in enumerate(vocabulary.pieces) if not piece)
        assert allowed.sum() > 200


def test_tables_are_compared_whole() -> None:
    """The judges above would not notice an answer without tables."""
    assert all(isinstance(table, Table) for table in read_otsl("<otsl><ecel><nl></otsl>"))
