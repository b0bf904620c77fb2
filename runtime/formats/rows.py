"""How an answer is split into rows, for detecting repeated ones."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Rows:
    """Describes the rows of a format. `end` is the text that ends a row, or a part of a row if `group` finds which row
    a part belongs to.

    `blank` matches everything that a row without content consists of. `position` matches the row's number, which is not
    compared, since it differs in rows that are otherwise equal.
    """

    end: str
    blank: re.Pattern[str]
    group: re.Pattern[str] | None = None
    position: re.Pattern[str] | None = None


LINES = Rows("\n", re.compile(r"\s+"))
