"""Tests of workbooks, read back by openpyxl: each cell has the text that was written, and none is a formula."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import openpyxl
import pytest

from granite4v.errors import AnswerError
from granite4v.runtime.extract.workbook import MAX_CELL, MAX_COLUMNS, Workbook, number_of

FORMULAS = ("=1+1", "+A1", "-1+2", "@SUM(A1)", "-cmd|' /C calc", "=", "-", "\t=1", '=HYPERLINK("http://x","y")')
TEXTS = (
    "#N/A",
    "#REF!",
    "007",
    "1.50",
    "1,234",
    "+5",
    "-5",
    "-0.25",
    "1e5",
    "123456789012",
    "true",
    "2020-01-02",
    " lead ",
    "a\nb",
    "é𝔘",
)
NUMBERS = ("0", "5", "12.5", "0.0001", "99999999999")


def read_back(path: Path) -> dict[str, list[list[object]]]:
    return {sheet.title: [[cell.value for cell in row] for row in sheet.rows] for sheet in openpyxl.load_workbook(path)}


def test_every_cell_says_what_was_written(tmp_path: Path) -> None:
    rows = [["", *FORMULAS], ["", *TEXTS], [*NUMBERS, "", "", ""]]
    width = max(map(len, rows))
    rows = [[*row, *[""] * (width - len(row))] for row in rows]
    book = Workbook(tmp_path / "a.xlsx")
    book.add("p1 tables_html", rows)
    book.save()
    (sheet,) = openpyxl.load_workbook(tmp_path / "a.xlsx")
    for row, cells in zip(rows, sheet.iter_rows(), strict=True):
        assert ["" if cell.value is None else str(cell.value) for cell in cells] == row
    kinds = [{cell.data_type for cell in row if cell.value is not None} for row in sheet.iter_rows()]
    assert kinds == [{"s"}, {"s"}, {"n"}]
    assert all(cell.quotePrefix for cell in sheet[1] if cell.value is not None)
    assert sheet.freeze_panes == "A2" and sheet["B1"].font.bold and not sheet["B2"].font.bold


def test_what_openpyxl_takes_for_formulas_is_seen_by_this_test(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    book.active.append(["=1+1", "#N/A"])
    assert [cell.data_type for cell in book.active[1]] == ["f", "e"]


@pytest.mark.parametrize("text", [*TEXTS, *FORMULAS, "", "-0", "00", "1.0", ".5", "5.", "٣", "1_000", "0.00001", "nan"])
def test_what_another_text_would_be_shown_for_is_no_number(text: str) -> None:
    assert number_of(text) is None


def test_a_number_is_shown_as_it_was_written() -> None:
    rng = random.Random(1)
    many = [f"{rng.random() * 10 ** rng.randint(-6, 12):.{rng.randint(0, 6)}f}" for _ in range(500)]
    for text in (*NUMBERS, *many):
        number = number_of(text)
        assert f"{number:.11g}" == text if number is not None else text not in NUMBERS


def test_what_xml_cannot_hold_is_replaced(tmp_path: Path) -> None:
    book = Workbook(tmp_path / "a.xlsx")
    book.add("a", [["a\0b", "\x1f", "\ud800", "\uffff", "x\r\ny\rz"]], 0)
    book.save()
    assert read_back(tmp_path / "a.xlsx") == {"a": [["a\ufffdb", "\ufffd", "\ufffd", "\ufffd", "x\ny\nz"]]}


def test_what_no_sheet_can_hold_leaves_the_others(tmp_path: Path) -> None:
    book = Workbook(tmp_path / "a.xlsx")
    book.add("first", [["1"]], 0)
    with pytest.raises(AnswerError, match="a cell of 32,768 characters; a spreadsheet's hold 32,767"):
        book.add("long", [["a"], ["x" * (MAX_CELL + 1)]])
    with pytest.raises(AnswerError, match="more than 1,048,576 rows or 16,384 columns"):
        book.add("wide", [["x"] * (MAX_COLUMNS + 1)])
    book.add("second", [["x" * MAX_CELL]], 0)
    book.save()
    assert read_back(tmp_path / "a.xlsx") == {"first": [[1]], "second": [["x" * MAX_CELL]]}
    assert [path.name for path in tmp_path.iterdir()] == ["a.xlsx"]


def test_a_document_without_tables_has_a_workbook_that_opens(tmp_path: Path) -> None:
    Workbook(tmp_path / "a.xlsx").save()
    assert read_back(tmp_path / "a.xlsx") == {"no tables": []}


def test_names_of_sheets_are_cut(tmp_path: Path) -> None:
    book = Workbook(tmp_path / "a.xlsx")
    for letter, _ in zip("ab", itertools.count()):
        book.add(letter + "x" * 40, [["1"]])
    book.save()
    assert [len(name) for name in read_back(tmp_path / "a.xlsx")] == [31, 31]
