"""Damaged model answers: read, salvaged, written in every format, read again, and put into a record and a report."""

from __future__ import annotations

import csv
import io
import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.toy.language import OTSL_TAGS

from .. import edits
from ..case import Case, Result
from ..records import problems, strict_json

name = "output"
ANSWER = "answer.txt"
_WORDS = re.compile(r'<[^<>]*>|"[^"\n]*"|-?\d+(?:\.\d+)?|null|true|false|[,\n]')
TEXTS = (
    "Total",
    "12.50",
    "",
    "a, b",
    'say "hi"',
    "x|y",
    "p < 0.05",
    "&amp;",
    "é",
    "日本語",
    "two\nlines",
    "<td>",
    "[1]",
    "50 %",
)
HTML = (
    "<table>", "</table>", "<tr>", "</tr>", "<td>", "</td>", "<th>", "<td colspan=2>", '<td rowspan="3">', "<thead>",
    "</thead>", "<tbody>", "<caption>", "<br>", "<td/>", "<!--", "-->", "<!", "<![CDATA[", "]]>", "<?php", "</",
    "<!DOCTYPE html [", "&#x110000;", "&#0;", "&", "<", "<a b='", "<script>", "</script>", "<textarea>", "<ul><li>",
    "<td colspan=1000>", "<td rowspan=65534>",
)  # fmt: skip
OTSL = (*OTSL_TAGS, "<loc_5>")
JSON = (
    "{", "}", "[", "]", ":", ",", '"', "null", "true", "NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1E+999", "0",
    "-0", "01", "1.", ".5", "\\", "\\u0000", "\\ud800", '"\\ud83d"', '"\\udc00\\ud800"', "\0", "//", "'", "9" * 400,
    "9" * 5000, "1" + "0" * 10000, '{"a":1,"a":2}', '"a":', '"cells":', '"rowspan":', '"row": 0',
)  # fmt: skip
CSV = (",", ";", "\n", "\r\n", "\r", '"', '""', "\t", "\0", ",,,,", "\n\n", "=1+1", "'", "\x0b", "\u2028", "a\rb")


def prepare(bases: Path) -> None:
    """Does nothing: answers are made in each case."""


def build(rng: random.Random, bases: Path, folder: Path) -> Case:
    from granite4v.runtime.formats import TASKS

    task = rng.choice(list(TASKS))
    text = _answer(rng, task)
    done = []
    marks = {"tables_html": HTML, "tables_otsl": OTSL, "chart2csv": CSV}.get(task, JSON)
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        edit = rng.choice(
            (_insert, _exchange, _exchange, _exchange, _nest, _remove, _cut, _repeat, _wrap, _odd_characters)
        )
        text, what = edit(rng, text, marks)
        done.append(what)
    (folder / ANSWER).write_bytes(text.encode("utf-8", "surrogatepass"))
    reason = rng.choice(("stop", "stop", "length", "repetition"))
    return Case([task, *done, text[:200].encode("utf-8", "replace").decode()], [[task, reason]])


def run(command: list[str]) -> int | None:
    """Runs an answer through all the steps of a page's answer, and asserts what must hold."""
    from granite4v.errors import AnswerError
    from granite4v.runtime.extract.parsed_answer import parse_answer
    from granite4v.runtime.extract.record import Record, decode, encode
    from granite4v.runtime.extract.report import write_report
    from granite4v.runtime.formats import Table, read, salvage

    task, reason = command
    text = Path(ANSWER).read_bytes().decode("utf-8", "surrogatepass")
    values = []
    try:
        values.append(read(task, text))
    except AnswerError as error:
        _need(len(str(error)) < 2000, "a message of more than 2,000 characters")
    salvaged = salvage(task, text)
    if salvaged is not None:
        values.append(salvaged.value)
        _need(salvaged.cut or not values[:-1] or values[0] == salvaged.value, "salvage has another value than read")
    for value in values:
        _check_json(task, value)
        for table in [value] if isinstance(value, Table) else value if task.startswith("tables") else ():
            _check_table(table)
    reading = parse_answer(task, text, reason, None)
    record = Record(
        source="page.png", page=1, n_pages=1, task=task, text=text, value=reading.value, valid=reading.valid
    )
    record = replace(record, validity_error=reading.validity_error, salvaged=reading.salvaged, finish_reason=reason)
    line = encode(record)
    strict_json(line)
    _need(decode(line) == record, "a record that does not come back as it was written")
    write_report(Path("report.html"), [record])
    Path("report.html").read_text("utf-8")
    return 0


def check(folder: Path, case: Case, results: list[Result]) -> list[str]:
    return problems(folder)


def _need(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)


def _check_json(task: str, value: Any) -> None:
    if task == "kvp":
        strict_json(json.dumps(value))


def _check_table(table: Any) -> None:
    """Checks that each format reads back, CSV also with Python's own reader."""
    from granite4v.errors import AnswerError
    from granite4v.runtime.formats import read_csv, read_html, read_otsl, read_tables_json, write

    strict_json(write(table, "json"))
    _need(read_tables_json(write(table, "json")) == [table], "JSON that reads back otherwise")
    texts = table.texts()
    lines = write(table, "csv")
    # Python's reader has a limit for fields, and before 3.11 it does not take NUL
    if "\0" not in lines and all(len(cell.text) <= csv.field_size_limit() for cell in table.cells):
        _need(list(csv.reader(io.StringIO(lines, newline=""), strict=True)) == texts, "CSV that reads back otherwise")
        _need(read_csv(lines).texts() == texts, "our CSV that reads back otherwise")
    html = read_html(write(table, "html"))
    _need(len(html) == 1 and (html[0].n_rows, html[0].n_cols) == (table.n_rows, table.n_cols), "HTML of another shape")
    rows = write(table, "markdown").split("\n")
    _need(len(rows) == table.n_rows - max(1, table.n_header_rows) + 2, "Markdown with another number of lines")
    try:
        otsl = write(table, "otsl")
    except AnswerError:
        return
    back = read_otsl(otsl)
    _need(
        [cell.strip() for row in texts for cell in row] == [c for row in back[0].texts() for c in row],
        "OTSL that reads otherwise",
    )


# --- answers ---


def _answer(rng: random.Random, task: str) -> str:
    from granite4v.runtime.formats import Cell, Table, write

    if task == "kvp":
        fields = edits.edit_json(rng, _fields(rng))[0] if rng.random() < 0.5 else _fields(rng)
        return edits.dump_json(fields).decode("utf-8", "surrogatepass")
    if task in ("chart2code", "chart2summary"):
        return "import math\nprint(1)\n" * rng.randint(0, 4) + "The chart shows sales."
    n_rows, n_cols = rng.randint(1, 5), rng.randint(1, 5)
    grid = [Cell(i, j, rng.choice(TEXTS)) for i in range(n_rows) for j in range(n_cols)]
    table = Table(n_rows, n_cols, rng.randint(0, 1), tuple(grid))
    if task == "chart2csv":
        return write(table, "csv")
    form = "markdown" if task == "page_md" else task.removeprefix("tables_")
    text = write([table] * rng.randint(1, 2), form) if rng.random() < 0.3 else write(table, form)
    if form == "json" and rng.random() < 0.5:
        return edits.dump_json(edits.edit_json(rng, json.loads(text))[0]).decode("utf-8", "surrogatepass")
    return text


def _fields(rng: random.Random) -> Any:
    return {
        "total": "12.50",
        "n": rng.randint(0, 99),
        "items": [{"a": 1.5, "b": None}] * rng.randint(0, 3),
        "x": {"y": ["é"]},
    }


def _insert(rng: random.Random, text: str, marks: tuple[str, ...]) -> tuple[str, str]:
    at, mark, times = rng.randint(0, len(text)), rng.choice(marks), rng.choice((1, 1, 1, 2, 50))
    return text[:at] + mark * times + text[at:], f"{mark!r:.30} x {times} at {at}"


def _exchange(rng: random.Random, text: str, marks: tuple[str, ...]) -> tuple[str, str]:
    """Replaces a word: a tag, a JSON value or a separator."""
    found = list(_WORDS.finditer(text))
    if not found:
        return _insert(rng, text, marks)
    word, mark = rng.choice(found), rng.choice(marks)
    return text[: word.start()] + mark + text[word.end() :], f"{mark!r:.30} for {word[0]!r:.30} at {word.start()}"


def _nest(rng: random.Random, text: str, marks: tuple[str, ...]) -> tuple[str, str]:
    """Nests a word, or the whole text, in many levels of the same wrapper."""
    before, after = rng.choice(
        (("[", "]"), ('{"a":', "}"), ("<table><tr><td>", "</td></tr></table>"), ("<ul><li>", "</ul>"))
    )
    n = rng.choice((10, 60, 90, 110, 300, 600, 990, 5000, 20_000))
    found = list(_WORDS.finditer(text))
    start, end = rng.choice([(0, len(text)), *(word.span() for word in found)])
    return text[:start] + before * n + text[start:end] + after * n + text[end:], f"{n} levels of {before!r} at {start}"


def _remove(rng: random.Random, text: str, marks: tuple[str, ...]) -> tuple[str, str]:
    at, n = rng.randint(0, len(text)), rng.choice((1, 1, 5, 30))
    return text[:at] + text[at + n :], f"{n} removed at {at}"


def _cut(rng: random.Random, text: str, marks: tuple[str, ...]) -> tuple[str, str]:
    at = rng.randint(0, len(text))
    return text[:at], f"cut at {at}"


def _repeat(rng: random.Random, text: str, marks: tuple[str, ...]) -> tuple[str, str]:
    """Repeats a piece, up to 100,000 characters: run time must grow no faster than the answer."""
    n = rng.choice((1, 3, 20, 300))
    at = rng.randint(0, max(0, len(text) - n))
    piece = text[at : at + n] if rng.random() < 0.5 else "".join(rng.choices(marks, k=rng.randint(1, 4)))
    times = rng.choice((2, 40, 100_000 // max(1, len(piece))))
    return text[: at + n] + piece * times + text[at + n :], f"{piece!r:.40} x {times} at {at}"


_WRAPPINGS = (
    ("```json\n", "\n```"),
    ("```\n", "```"),
    ("Here is it:\n```html\n", ""),
    ("```csv\n", "\n```\nDone."),
    ('["', '"]'),
    ('["<table></table>", "', ""),
    ("[", "]"),
    ("'", "'"),
    ("\ufeff", ""),
    (" \n", " \n"),
)


def _wrap(rng: random.Random, text: str, marks: tuple[str, ...]) -> tuple[str, str]:
    before, after = rng.choice(_WRAPPINGS)
    return before + text + after, f"inside {before!r}"


def _odd_characters(rng: random.Random, text: str, marks: tuple[str, ...]) -> tuple[str, str]:
    at, odd = rng.randint(0, len(text)), edits.text(rng)
    return text[:at] + odd + text[at:], f"{odd!r:.30} at {at}"
