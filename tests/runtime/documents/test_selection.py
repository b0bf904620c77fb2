"""Tests of page ranges, crops and passwords: what the user writes, and how it is understood or refused."""

from __future__ import annotations

from typing import Any

import pytest

from granite4v.runtime.documents import (
    SelectionError,
    open_pages,
    parse_crop,
    parse_pages,
)
from tests.helpers.page_tests import GOOD


@pytest.mark.parametrize(
    ("text", "n_pages", "expected"),
    [
        ("1-3,7,10-", 12, [1, 2, 3, 7, 10, 11, 12]),
        ("7, 1 - 3 ,2", 9, [1, 2, 3, 7]),
        ("2-4,3-6,7", 9, [2, 3, 4, 5, 6, 7]),
        ("5-,2-", 6, [2, 3, 4, 5, 6]),
        ("01", 1, [1]),
    ],
)
def test_page_ranges_are_ascending_and_give_each_page_once(text: str, n_pages: int, expected: list[int]) -> None:
    ranges = parse_pages(text)
    assert list(ranges.of(n_pages)) == [(page, page) for page in expected]
    assert ranges.count(n_pages) == len(expected)


@pytest.mark.parametrize(
    ("text", "missing"),
    [("4", (4, 4)), ("2-9", (4, 9)), ("5-7", (5, 7)), ("7-", (7, None)), ("1-1000000000", (4, 1000000000))],
)
def test_pages_that_a_document_does_not_have_are_one_piece(text: str, missing: tuple[int, int | None]) -> None:
    ranges = parse_pages(text)
    pairs = list(ranges.of(3))
    assert pairs[-1] == missing
    assert all(first <= 3 for first, _ in pairs[:-1])
    assert ranges.count(3) == len(pairs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "",
            (
                "the pages '' have an empty entry before, after or between commas; write numbers and ranges such as "
                "'1-3,7,10-'."
            ),
        ),
        ("1,,2", "have an empty entry before, after or between commas"),
        ("0", "the pages '0' hold '0', but pages are counted from 1."),
        ("1,0-3", "hold '0-3', but pages are counted from 1."),
        ("5-3", "the pages '5-3' hold '5-3', which is in descending order; write '3-5'."),
        ("-3", "the pages '-3' hold '-3'; write numbers and ranges such as '1-3,7,10-'."),
        ("1..3", "hold '1..3'; write numbers"),
        ("all", "hold 'all'; write numbers"),
        ("²", "hold '²'; write numbers"),
        ("9" * 30, "write numbers"),
    ],
)
def test_pages_that_make_no_sense_are_refused_at_once(text: str, message: str) -> None:
    with pytest.raises(SelectionError) as caught:
        open_pages([GOOD], pages=text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("crop", "box"),
    [
        ("10,20,30,40", (10, 20, 40, 60)),
        ("10%,20%,30%,40%", (20, 20, 80, 60)),
        ("50%,0,50%,100", (100, 0, 200, 100)),
        ((0, 0, "33.3%", "100%"), (0, 0, 66.6, 100)),
        ((1.5, 2, 3, 4), (1.5, 2, 4.5, 6)),
        ("66.7%,0,33.3%,1", (133.4, 0, 200, 1)),
    ],
)
def test_a_crop_counts_from_the_top_left_in_units_or_percent(crop: Any, box: tuple[float, ...]) -> None:
    assert parse_crop(crop).box((200, 100), "the page", "pixels") == pytest.approx(box)


@pytest.mark.parametrize(
    ("crop", "message"),
    [
        ("1,2,3", "the crop '1,2,3' is not four numbers of 0 or more; write x,y,width,height, for instance"),
        ("a,b,c,d", "is not four numbers"),
        ("-1,0,5,5", "is not four numbers of 0 or more"),
        ("0,0,nan,5", "is not four numbers"),
        ("0,0,0,5", "the crop '0,0,0,5' has no width or no height"),
        ((1, 2, 3, 4, 5), "is not four numbers"),
    ],
)
def test_a_crop_that_makes_no_sense_is_refused_at_once(crop: Any, message: str) -> None:
    with pytest.raises(SelectionError) as caught:
        open_pages([GOOD], crop=crop)
    assert message in str(caught.value)


@pytest.mark.parametrize("password", ["a\0b", "\udcff"])
def test_a_password_that_cannot_be_one_is_refused_at_once(password: str) -> None:
    with pytest.raises(SelectionError, match="the password holds a zero byte or a lone surrogate"):
        open_pages([GOOD], password=password)
