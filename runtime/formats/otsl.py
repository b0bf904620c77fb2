"""OTSL: one tag for each slot of the grid, `<nl>` at the end of a row, text after the tag of a cell's first slot.

`<fcel>` starts a cell, `<ecel>` an empty one; `<ched>`, `<rhed>` and `<srow>` start the header of a column, a row and a
section. `<lcel>` continues the cell on its left, `<ucel>` the one above, `<xcel>` both (Lysak et al., 2023,
arXiv 2305.03393). docling writes `<xcel>` for every slot but the first of a cell that spans rows and columns. This is
parsed as well: the cell reaches down as far as its `<xcel>` tags. Tags that are closed after their text or immediately
(`<fcel>text</fcel>`, `<ecel/>`) are also parsed, as in docling 2.143; nothing here writes them.

Only these tags are markup. Everything else is text, including `<` and `&`.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from granite4v.errors import AnswerError
from granite4v.runtime.formats.place import Place
from granite4v.runtime.formats.rows import Rows
from granite4v.runtime.formats.table import Cell, Table, as_many_as_fit, bounded, check_size, place, with_header_rows
from granite4v.runtime.formats.wrapping import joined, unfence

_TAG = re.compile(r"<(/?)(fcel|ecel|ched|rhed|srow|lcel|ucel|xcel|nl|otsl)(\s*/)?>")
_STARTS = ("fcel", "ecel", "ched", "rhed", "srow")
_HEADERS = ("ched", "rhed", "srow")
OTSL_ROWS = Rows("<nl>", re.compile(r"</?(?:otsl|[eflux]cel|ched|rhed|srow)\s*/?>|\s+"))
_BETWEEN = re.compile(r"[\s\[\],\"'`]*")  # list syntax around tables


@dataclass
class _Slot:
    tag: str
    offset: int
    text: str = ""
    end: int = 0  # of its text
    closed: bool = False


@dataclass
class _Draft:
    """A cell that may still grow. `crossed`: its first row was continued with <xcel>, as docling does."""

    tag: str
    row: int
    col: int
    text: str
    rowspan: int = 1
    colspan: int = 1
    start: int = 0  # of its tag
    end: int = 0
    crossed: bool = False


@dataclass
class _Rows:
    """The rows of one table so far."""

    n_rows: int = 0
    n_header_rows: int = 0
    above: list[_Draft] = field(default_factory=list)  # the cell of each slot of the last row
    cells: list[_Draft] = field(default_factory=list)

    def add(self, slots: list[_Slot]) -> None:
        """Adds a row, or raises AnswerError and changes nothing."""
        if self.above and len(slots) != len(self.above):
            raise AnswerError(
                f"row {self.n_rows + 1}, at character {slots[0].offset}, has {len(slots)} columns; "
                f"expected {len(self.above)} as in the rows above."
            )
        check_size(self.n_rows + 1, len(slots))
        row: list[_Draft] = []
        for slot in slots:
            row.append(self._owner(slot, row))
        # a cell from above that this row continues has to be continued over exactly its own columns
        n_continued = Counter(id(draft) for draft in row if draft.row < self.n_rows)
        for j, draft in enumerate(row):
            if draft.row < self.n_rows and (self.above[j] is not draft or n_continued[id(draft)] != draft.colspan):
                raise AnswerError(
                    f"<{slots[j].tag}> in {place(self.n_rows, j)}, at character {slots[j].offset}, continues the cell "
                    f"of {place(draft.row, draft.col)}, but not over all its {draft.colspan} columns; expected a "
                    "rectangle."
                )
        for j, draft in enumerate(row):
            if draft.row == self.n_rows:
                draft.colspan = j - draft.col + 1
            else:
                draft.rowspan = self.n_rows - draft.row + 1
        self.cells += [draft for j, draft in enumerate(row) if draft.row == self.n_rows and draft.col == j]
        tags = {draft.tag for draft in row}
        if self.n_header_rows == self.n_rows and "ched" in tags and tags <= {"ched", "ecel"}:
            self.n_header_rows += 1
        self.above = row
        self.n_rows += 1

    def _owner(self, slot: _Slot, row: list[_Draft]) -> _Draft:
        """The cell that a slot belongs to. `row` has the cells of the slots on its left."""
        j = len(row)
        left = row[-1] if row else None
        up = self.above[j] if self.above else None
        if slot.tag in _STARTS:
            return _Draft(slot.tag, self.n_rows, j, slot.text, start=slot.offset, end=slot.end)
        if slot.tag == "lcel" and left is not None:
            return left
        if slot.tag == "ucel" and up is not None:
            return up
        if slot.tag == "xcel":
            # docling writes a cell of 2x2 slots as '<fcel>a<xcel><nl><xcel><xcel><nl>': the <xcel> in its first row
            # sets `crossed`, so that the next row may begin with <xcel> instead of <ucel>
            if up is not None and (up is left or (up.crossed and up.col == j)):
                return up
            if left is not None and left.row == self.n_rows:
                left.crossed = True
                return left
        expected = {"lcel": "a cell on its left", "ucel": "a cell above it", "xcel": "one cell above and on its left"}
        raise AnswerError(
            f"<{slot.tag}> in {place(self.n_rows, j)}, at character {slot.offset}, does not continue a cell; "
            f"expected {expected[slot.tag]}."
        )

    def table(self) -> Table:
        cells = [Cell(d.row, d.col, d.text, d.rowspan, d.colspan, d.tag in _HEADERS) for d in self.cells]
        return with_header_rows(self.n_rows, len(self.above), self.n_header_rows, cells)


@dataclass
class _Reader:
    """Parses an answer into `tables`, until `run` raises an error."""

    text: str
    tables: list[_Rows] = field(default_factory=list)
    row: list[_Slot] = field(default_factory=list)
    inside: bool = False  # a table has begun
    tagged: bool = False  # it began with <otsl>
    end: int = 0  # offset after the last complete row

    def run(self) -> None:
        at = 0
        for found in _TAG.finditer(self.text):
            self._take_text(at, found.start())
            closes, tag, at_once = found.groups()
            at = found.end()
            if tag == "otsl" and closes:
                self._end_table(found.start(), at)
            elif tag == "otsl":
                self._begin_table(found.start())
            elif closes:
                self._close(tag, found.start())
            elif tag == "nl":
                self._take_row_end(found.start(), at)
            else:
                self._begin_slot(_Slot(tag, found.start(), end=at, closed=bool(at_once)))
        self._take_text(at, len(self.text))

    def finish(self) -> None:
        """Ends a table without <otsl>, which ends with the answer. Raises AnswerError if a </otsl> is missing."""
        if self.inside and self.tagged:
            where = f"row {self.tables[-1].n_rows + 1}" if self.tables else "row 1"
            raise AnswerError(
                f"the answer ends at character {len(self.text)} in {where} of table {len(self.tables)}; "
                "expected '</otsl>'. It was probably cut."
            )
        self._end_row(len(self.text))

    def _take_text(self, start: int, end: int) -> None:
        text, slot = self.text[start:end].strip(), self.row[-1] if self.row else None
        if slot is not None and slot.tag in _STARTS and not slot.closed:
            slot.text, slot.end = text, end
            if text and slot.tag == "ecel":
                raise AnswerError(f"{text!r:.60} at character {start} follows <ecel>, an empty cell; expected a tag.")
        elif text and (self.inside or not _BETWEEN.fullmatch(text)):
            raise AnswerError(f"{text!r:.60} at character {start} is not in a cell; expected an OTSL tag before it.")

    def _begin_table(self, start: int) -> None:
        if self.inside:
            raise AnswerError(f"<otsl> at character {start} is inside a table; expected '</otsl>' before it.")
        self.inside = self.tagged = True
        self.tables.append(_Rows())

    def _end_table(self, start: int, end: int) -> None:
        if not self.inside:
            raise AnswerError(f"</otsl> at character {start} does not end a table; expected '<otsl>' before it.")
        self._end_row(end)
        if not self.tables[-1].n_rows:
            raise AnswerError(f"</otsl> at character {start} ends a table without rows; expected a cell before it.")
        self.inside = self.tagged = False
        self.end = end

    def _begin_slot(self, slot: _Slot) -> None:
        if not self.inside:
            self.inside = True
            self.tables.append(_Rows())
        self.row.append(slot)

    def _take_row_end(self, start: int, end: int) -> None:
        if not self.row:
            n_rows = self.tables[-1].n_rows if self.inside else 0
            raise AnswerError(f"<nl> at character {start} ends row {n_rows + 1}, which has no cells; expected one.")
        self._end_row(end)

    def _close(self, tag: str, start: int) -> None:
        slot = self.row[-1] if self.row else None
        if slot is None or slot.tag != tag or slot.closed:
            raise AnswerError(f"</{tag}> at character {start} closes nothing; expected '<{tag}>' before it.")
        slot.closed = True

    def _end_row(self, end: int) -> None:
        """Ends the last row of a table, even without <nl>."""
        if self.row:
            self.tables[-1].add(self.row)
            self.row = []
            self.end = end


def read_otsl(text: str) -> list[Table]:
    """Parses the tables of an answer: one, with or without `<otsl>` around it, or several in a list.

    Leading rows of nothing but `<ched>` and `<ecel>` are the header rows. Text is stripped. Raises AnswerError.
    """
    reader = _Reader(joined(unfence(text, "otsl").text).text)
    reader.run()
    reader.finish()
    if not reader.tables and reader.text.strip() != "[]":
        raise AnswerError(f"no OTSL tag in {text!r:.60}; expected '<otsl>'.")
    return list(bounded(rows.table() for rows in reader.tables))


def salvage_otsl(text: str) -> tuple[list[Table], bool]:
    """The tables up to the last complete and valid row, and whether that is the complete answer."""
    body = joined(unfence(text, "otsl").text)
    reader = _Reader(body.text)
    try:
        reader.run()
        complete = body.closed and not reader.inside and bool(reader.tables or body.text.strip() == "[]")
        if body.text.lstrip().startswith("["):
            complete = complete and "]" in body.text[reader.end :]
    except AnswerError:
        complete = False
    tables, fit = as_many_as_fit(rows.table() for rows in reader.tables if rows.n_rows)
    return tables, complete and fit


def otsl_places(text: str) -> list[Place]:
    """The place of each cell, from its tag on: the tag says whether it is empty, a header, or a cell of its own."""
    fenced = unfence(text, "otsl")
    body = joined(fenced.text)
    reader = _Reader(body.text)
    with contextlib.suppress(AnswerError):
        reader.run()
        reader.finish()
    return [
        Place((number, d.row, d.col), *(fenced.start + at for at in body.span(d.start, d.end + 1)))
        for number, rows in enumerate(reader.tables)
        for d in rows.cells
    ]


def write_otsl(table: Table) -> str:
    """Writes one line of tags. A header below the header rows that is as wide as the table (two columns or more)
    becomes `<srow>`; an empty cell becomes `<ecel>`, even if it is a header.

    Raises AnswerError for a text that contains an OTSL tag.
    """
    for cell in table.cells:
        if found := _TAG.search(cell.text):
            raise AnswerError(f"the text of {place(cell.row, cell.col)} contains '{found[0]}', which OTSL cannot hold.")
    texts = iter([cell.text.strip() for cell in table.cells])  # in reading order, like the tags
    parts = [f"<{tag}>{next(texts) if tag in _STARTS else ''}" for tag in otsl_tags(table)]
    return "".join(["<otsl>", *parts, "</otsl>"])


def otsl_tags(table: Table) -> Iterator[str]:
    """The tags of a table's slots and row ends as `write_otsl` writes them, without angle brackets."""
    for i, row in enumerate(table.grid()):
        for j, cell in enumerate(row):
            if (cell.row, cell.col) == (i, j):
                yield _start(table, cell)
            else:
                yield "lcel" if cell.row == i else "ucel" if cell.col == j else "xcel"
        yield "nl"


def is_section(table: Table, cell: Cell) -> bool:
    """Whether a cell is the header of the rows below it: as wide as the table (two columns or more), and not among the
    header rows."""
    return cell.header and cell.row >= table.n_header_rows and cell.colspan == table.n_cols > 1


def _start(table: Table, cell: Cell) -> str:
    if not cell.text.strip():
        return "ecel"
    if cell.row < table.n_header_rows:
        return "ched"
    if is_section(table, cell):
        return "srow"
    return "rhed" if cell.header else "fcel"
