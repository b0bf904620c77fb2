"""Foreign text on a terminal: nothing in it can control the terminal, and the rest is unchanged."""

from __future__ import annotations

import time

import pytest

from granite4v.cli.terminal import clean, date


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, ümläut, 表, 🙂\tand\nlines", "plain, ümläut, 表, 🙂\tand\nlines"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("all is well\rgone", r"all is well\rgone"),
        ("\x9b2J", r"\x9b2J"),  # CSI as a single character
        ("a\x00b\x7fc", r"a\x00b\x7fc"),
        ("fdp.\u202egpj", r"fdp.\u202egpj"),  # shows as fdp.jpg
        ("\u2066a\u2069\u200f", r"\u2066a\u2069\u200f"),
        ("one\u2028two\u2029three\x85", r"one\u2028two\u2029three\x85"),
        ("caf\udce9", r"caf\udce9"),  # a byte of a file name that is not UTF-8
        ("back\\slash", "back\\slash"),
    ],
)
def test_what_could_act_on_a_terminal_is_shown_as_its_escape(text: str, shown: str) -> None:
    assert clean(text) == shown


def test_text_for_one_line_keeps_no_line_feed() -> None:
    assert clean("two\nlines\tand a tab", keep="") == r"two\nlines\tand a tab"


def test_dates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    assert date(1.7e9) == "2023-11-14 22:13"
    assert {date(seconds) for seconds in (1e30, -1e30, float("inf"), float("nan"))} == {"?"}
    monkeypatch.undo()
    time.tzset()
