"""The automaton of OTSL: all rows are as long as the first, and cells are rectangles.

The rules are those of the paper (Lysak et al., 2023, arXiv 2305.03393): `<lcel>` continues a cell of this row, `<ucel>`
the first column of the cell above, `<xcel>` its other columns. `<ecel>` is an empty cell; all other cells have text
that is not blank. A '<' before anything but a lower-case letter or '/' is text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from granite4v.runtime.formats.tables_grammar import End, Tables
from granite4v.runtime.grammar.automaton import Next, Rule, Text

_FILLED = (b"<fcel>", b"<ched>", b"<rhed>", b"<srow>")
_STARTS: tuple[bytes, ...] = (b"<ecel>", *_FILLED)
_TEXT = Text(tags=b"abcdefghijklmnopqrstuvwxyz/", non_blank=True)


@dataclass(frozen=True)
class OtslRow:
    """Inside a row, after the columns in `row`: for each of them, the width of the cell that begins there, or 0.

    For example, '<fcel>a<lcel><fcel>b' is (2, 0, 1). `above` is the row above, None in the first row. `crossing`: how
    many more columns belong to a cell from above that this row has begun to continue; after '<ucel>' below the '2' of
    the example it is 1, so '<xcel>' has to follow. `own`: the last cell begins in this row. `filled`: it has text.
    """

    above: tuple[int, ...] | None = None
    row: tuple[int, ...] = ()
    crossing: int = 0
    own: bool = False
    filled: bool = False

    def next(self) -> Next:
        return Next(self._tags(), _TEXT, initial_literals=()) if self.filled else Next(self._tags())

    def _tags(self) -> tuple[bytes, ...]:
        if self.crossing:
            return (b"<xcel>",)
        column, above = len(self.row), self.above
        if above is not None and column == len(above):
            return (b"<nl>",)
        tags = _STARTS
        if self.own:
            tags = (*tags, b"<lcel>")
        if above is not None and above[column]:
            tags = (*tags, b"<ucel>")
        if above is None and self.row:
            tags = (b"<nl>", *tags)
        if above is not None and not self.row:
            tags = (b"</otsl>", *tags)
        return tags

    def after(self, literal: bytes) -> Rule:
        if literal == b"<nl>":
            return OtslRow(above=self.row)
        if literal == b"</otsl>":
            return End()
        row, column = self.row, len(self.row)
        if literal == b"<xcel>":
            return replace(self, row=(*row, 0), crossing=self.crossing - 1, filled=False)
        if literal == b"<ucel>":
            assert self.above is not None
            width = self.above[column]
            return replace(self, row=(*row, width), crossing=width - 1, own=False, filled=False)
        if literal == b"<lcel>":
            first = max(i for i, width in enumerate(row) if width)
            wider = (*row[:first], row[first] + 1, *row[first + 1 :], 0)
            return replace(self, row=wider, filled=False)
        return replace(self, row=(*row, 1), own=True, filled=literal in _FILLED)


OTSL = Tables(b"<otsl>", OtslRow(), between=(b"", b"\n"))
