"""How answers are shown: everything that the model wrote, and nothing that controls a terminal."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console, RenderableType
from rich.text import Text

from granite4v.cli.chat_render import Lines, complete_blocks, fields_or_table, markdown, rendered_table
from granite4v.runtime.formats import read_csv, read_html

SPANS = (
    "<table><thead><tr><th colspan='2'>Sales</th></tr><tr><th>North</th><th>South</th></tr></thead>"
    "<tbody><tr><td>1</td><td>2</td></tr></tbody></table>"
)


def shown(content: RenderableType, width: int = 60) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=True)
    console.print(content)
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_prose_keeps_what_was_written() -> None:
    text = "Total: **9.50**\nTax: 1.20 <b>net</b> &amp; [more](http://x.example/)"
    assert shown(markdown(text)) == ["Total: 9.50", "Tax: 1.20 <b>net</b> & more (http://x.example/)"]


def test_no_empty_lines_stand_around_a_block() -> None:
    assert shown(markdown("\n\n* one\n* two\n\n")) == [" • one", " • two"]
    assert shown(Lines(Text("a\nb\nc"), 2)) == ["b", "c"]


@pytest.mark.parametrize(
    ("text", "complete"),
    [
        ("one\ntwo", ""),
        ("one\n\n", ""),
        ("one\n\ntwo", "one\n\n"),
        ("one\n\n    still one\n\ntwo\n\n", "one\n\n    still one\n\n"),
        ("```\na\n\nb\n", ""),
        ("```\na\n\nb\n```\n\nafter", "```\na\n\nb\n```\n\n"),
        ("~~~\n```\n\nb\n~~~\n\nafter", "~~~\n```\n\nb\n~~~\n\n"),
        ("", ""),
    ],
)
def test_blocks_are_complete_once_the_next_one_begins(text: str, complete: str) -> None:
    assert text[: complete_blocks(text)] == complete


def test_tables_have_numbers_on_the_right() -> None:
    lines = shown(rendered_table(read_csv("Item,Price\nInk,4.50\nPaper,1 234.00\nGift,-\n".replace("-", "")), 60))
    assert lines[1].split("│")[1:3] == [" Item  ", "    Price "]
    assert lines[3].split("│")[1:3] == [" Ink   ", "     4.50 "]


def test_spanning_cells_are_shown_once() -> None:
    lines = " ".join(shown(rendered_table(read_html(SPANS)[0], 60)))
    assert lines.count("Sales") == 1 and lines.index("Sales") < lines.index("North") < lines.index("1")


def test_cells_control_no_terminal() -> None:
    table = read_csv("a,b\n\x1b]0;x\x07,\u202e[red]x[/red]\n")
    text = "\n".join(shown(rendered_table(table, 80)))
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", text)
    assert r"\x1b]0;x\x07" in text and r"\u202e[red]x[/red]" in text


def test_no_line_is_wider_than_the_terminal() -> None:
    header = ",".join(f"column {i}" for i in range(4))
    row = ",".join("a rather long text in every cell" for _ in range(4))
    assert max(map(len, shown(rendered_table(read_csv(f"{header}\n{row}\n"), 60)))) <= 60


def test_more_columns_than_fit_are_shown_row_by_row() -> None:
    n = 20
    text = ",".join(f"name{i}" for i in range(n)) + "\n" + ",".join(f"value{i}" for i in range(n)) + "\n"
    lines = shown(rendered_table(read_csv(text), 60))
    assert lines[0] == "row 1" and lines[1:] == [f"  name{i}: value{i}" for i in range(n)]
    narrow = ",".join("12" for _ in range(12)) + "\n"
    assert "│" in "".join(shown(rendered_table(read_csv(narrow * 2), 61)))


def test_of_a_growing_table_the_last_rows_are_shown() -> None:
    table = read_csv("n\n" + "".join(f"{i}\n" for i in range(50)))
    text = "\n".join(shown(rendered_table(table, 60, last_rows=3)))
    assert "... 47 more" in text and "49" in text and "46" not in text


def test_values_without_a_table() -> None:
    assert fields_or_table(None) is fields_or_table("text") is fields_or_table([]) is fields_or_table({}) is None
    table = read_csv("a\n1\n")
    assert fields_or_table(table) is table and fields_or_table([table]) is table
    assert fields_or_table({"a": 1}).texts() == [["field", "value"], ["a", "1"]]  # type: ignore[union-attr]
