"""HTML tables: rows, cells, spans and text. All other markup is ignored.

Inside a cell, `<br>` and the boundaries of block elements become line breaks, runs of other white space become one
space, and nested tables become text. Parsing takes time and memory in proportion to the answer, whatever it contains.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, field
from html import escape

from granite4v.errors import AnswerError
from granite4v.runtime.formats.html_markup import Tag, pieces
from granite4v.runtime.formats.place import Place
from granite4v.runtime.formats.rows import Rows
from granite4v.runtime.formats.table import (
    Cell,
    Table,
    as_many_as_fit,
    bounded,
    check_size,
    place,
    printable,
    with_header_rows,
)
from granite4v.runtime.formats.wrapping import joined

MAX_COLSPAN, MAX_ROWSPAN = 1000, 65534  # HTML's own limits
_BLOCKS = frozenset((
    "blockquote", "caption", "dd", "div", "dl", "dt", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre",
    "table", "tr", "ul",
))  # fmt: skip
_SECTIONS = ("thead", "tbody", "tfoot")
_SPACE = re.compile(r"[ \t\r\n\f]+")
HTML_ROWS = Rows("</tr>", re.compile(r"</?[a-zA-Z][^<>]*>|\s+"))


@dataclass
class _Draft:
    tag: str
    rowspan: int
    colspan: int
    parts: list[str | None] = field(default_factory=list)  # None: the boundary of a block element
    row: int = 0
    col: int = 0
    start: int = 0  # offsets of its content in the text
    end: int = 0

    def text(self) -> str:
        parts: list[str] = []
        in_line = False  # there is something other than spaces after the last line break
        for part in self.parts:
            if part is None:
                parts += ["\n"] * in_line
                in_line = False
            else:
                parts.append(part)
                last_line = part[part.rfind("\n") + 1 :]
                in_line = bool(last_line.strip(" ")) or (in_line and last_line == part)
        return re.sub(" ?\n ?", "\n", re.sub(" +", " ", "".join(parts))).strip(" \n")


@dataclass
class _Rows:
    """The rows of one table so far."""

    n_rows: int = 0
    n_cols: int = 0
    cells: list[_Draft] = field(default_factory=list)
    hanging: list[_Draft] = field(default_factory=list)  # cells that reach below the last row, by column
    heads: int = 0  # leading rows in <thead>
    all_th: int = 0  # leading rows of nothing but <th>
    has_thead: bool = False

    def add(self, drafts: list[_Draft], in_head: bool, offset: int) -> None:
        """Adds a row, or raises AnswerError and changes nothing."""
        where = f"row {self.n_rows + 1}, which ends at character {offset},"
        if in_head and self.heads != self.n_rows:
            raise AnswerError(f"{where} is in a <thead> below other rows; expected the header first.")
        cols, n_cols, n_covered = self._place(drafts, where)
        if not n_covered or n_covered != n_cols or n_covered != (self.n_cols or n_covered):
            raise AnswerError(f"{where} covers {n_covered} columns; expected {self.n_cols or 'at least one'}.")
        check_size(self.n_rows + 1, n_cols)
        for draft, col in zip(drafts, cols, strict=True):
            draft.row, draft.col = self.n_rows, col
        self._count_headers(drafts, in_head)
        self.cells += drafts
        self.n_rows, self.n_cols = self.n_rows + 1, n_cols
        reaching = [draft for draft in [*self.hanging, *drafts] if draft.row + draft.rowspan > self.n_rows]
        self.hanging = sorted(reaching, key=lambda draft: draft.col)

    def _place(self, drafts: list[_Draft], where: str) -> tuple[list[int], int, int]:
        """Places the cells of a new row in the columns that no cell from above covers.

        Returns the first column of each cell, the width of the row, and how many of its columns are covered. For
        example, if a cell from above covers column 1, two cells without spans get columns 0 and 2: ([0, 2], 3, 3).
        """
        cols: list[int] = []
        j = k = 0
        for draft in drafts:
            while k < len(self.hanging) and self.hanging[k].col == j:
                j += self.hanging[k].colspan
                k += 1
            end = j + draft.colspan
            if k < len(self.hanging) and self.hanging[k].col < end:
                raise AnswerError(
                    f"{where} has a cell over columns {j + 1} to {end} that overlaps a cell from a row above; expected "
                    "one cell for each slot."
                )
            cols.append(j)
            j = end
        n_covered = j + sum(draft.colspan for draft in self.hanging[k:])
        n_cols = max([j, *(draft.col + draft.colspan for draft in self.hanging[k:])])
        return cols, n_cols, n_covered

    def _count_headers(self, drafts: list[_Draft], in_head: bool) -> None:
        if in_head:
            self.heads += 1
        if self.all_th == self.n_rows and all(draft.tag == "th" for draft in [*self.hanging, *drafts]):
            self.all_th += 1

    def check_end(self, offset: int) -> None:
        if not self.n_rows:
            raise AnswerError(f"</table> at character {offset} ends a table without rows; expected '<tr>'.")
        for draft in self.hanging:
            raise AnswerError(
                f"the cell at {place(draft.row, draft.col)} has rowspan {draft.rowspan}, but the table ends with row "
                f"{self.n_rows}; expected at most {self.n_rows - draft.row}."
            )

    def table(self) -> Table:
        cells = [
            Cell(d.row, d.col, d.text(), min(d.rowspan, self.n_rows - d.row), d.colspan, d.tag == "th")
            for d in self.cells
        ]
        return with_header_rows(self.n_rows, self.n_cols, self.heads if self.has_thead else self.all_th, cells)


class _Reader:
    """Collects `tables` until `run` raises an error. End tags of cells and rows may be missing, as in HTML."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.offset = 0  # of the current piece
        self.tables: list[_Rows] = []
        self.depth = 0
        self.section = ""
        self.row: list[_Draft] | None = None
        self.cell: _Draft | None = None
        self.ignored = False  # inside a <caption>

    def run(self) -> None:
        for offset, piece in pieces(self.text):
            self.offset = offset
            if isinstance(piece, str):
                self._take_text(piece)
            elif piece.closing:
                self._take_end(piece.name)
            else:
                self._take_start(piece)
        self.offset = len(self.text)

    def _take_start(self, start: Tag) -> None:
        tag = start.name
        if tag == "table":
            self._open_table()
        elif not self.depth:
            return
        elif self.depth > 1:
            self._mark_nested(tag)
        elif tag in _SECTIONS:
            self._end_row()
            self.section = tag
            self.tables[-1].has_thead |= tag == "thead"
        elif tag == "tr":
            self._end_row()
            self.row = []
        elif tag in ("td", "th"):
            self._end_cell()
            self.row = self.row if self.row is not None else []
            rowspan, colspan = self._span(start, "rowspan", MAX_ROWSPAN), self._span(start, "colspan", MAX_COLSPAN)
            self.cell = _Draft(tag, rowspan, colspan, start=start.end)
        elif self.cell is not None:
            self._mark(tag)
        elif tag == "caption":
            self.ignored = True

    def _take_end(self, tag: str) -> None:
        if tag == "table" and self.depth:
            self._close_table()
        elif self.depth == 1 and tag in ("td", "th"):
            self._end_cell()
        elif self.depth == 1 and (tag == "tr" or tag in _SECTIONS):
            self._end_row()
            self.section = "" if tag in _SECTIONS else self.section
        elif self.depth > 1:
            self._mark_nested(tag)
        elif self.cell is not None and tag not in ("br", "hr"):
            self._mark(tag)
        elif tag == "caption":
            self.ignored = False

    def _take_text(self, data: str) -> None:
        if self.cell is not None:
            self.cell.parts.append(_SPACE.sub(" ", data))
        elif self.depth and data.strip() and not self.ignored:
            raise AnswerError(
                f"{data.strip()!r:.60} at character {self.offset} is in a table but not in a cell; expected '<td>' or "
                "'<th>' before it."
            )

    def _open_table(self) -> None:
        if self.depth and self.cell is None:
            raise AnswerError(f"<table> at character {self.offset} is inside a table; expected '</table>' before it.")
        self.depth += 1
        if self.depth == 1:
            self.tables.append(_Rows())
            self.section, self.ignored = "", False
        else:
            self._mark("table")

    def _close_table(self) -> None:
        if self.depth == 1:
            self._end_row()
            self.tables[-1].check_end(self.offset)
        else:
            self._mark("table")
        self.depth -= 1

    def _mark(self, tag: str) -> None:
        assert self.cell is not None
        if tag == "br":
            self.cell.parts.append("\n")
        elif tag in _BLOCKS:
            self.cell.parts.append(None)

    def _mark_nested(self, tag: str) -> None:
        if tag in ("td", "th"):
            assert self.cell is not None
            self.cell.parts.append(" ")
        else:
            self._mark(tag)

    def _end_cell(self) -> None:
        if self.cell is not None and self.row is not None:
            self.cell.end = self.offset
            self.row.append(self.cell)
        self.cell = None

    def _end_row(self) -> None:
        self._end_cell()
        row, self.row = self.row, None
        if row is not None:
            self.tables[-1].add(row, self.section == "thead", self.offset)

    def _span(self, start: Tag, name: str, most: int) -> int:
        value = start.attributes.get(name, "1")
        digits = value.strip()
        if not re.fullmatch("[0-9]{1,9}", digits) or not 1 <= int(digits) <= most:
            raise AnswerError(
                f"{name} at character {self.offset} is {value!r:.60}; expected an integer from 1 to {most}."
            )
        return int(digits)


def read_html(text: str) -> list[Table]:
    """Parses the tables of an answer; text around them is ignored.

    The header rows are those in `<thead>` or, without one, the leading rows of nothing but `<th>`. Raises AnswerError.
    """
    reader = _Reader(joined(text).text)
    reader.run()
    if reader.depth:
        raise AnswerError(
            f"the answer ends at character {len(reader.text)} in row {reader.tables[-1].n_rows + 1} of table "
            f"{len(reader.tables)}; expected '</table>'. It was probably cut."
        )
    if not reader.tables and reader.text.strip() != "[]":
        raise AnswerError(f"no table in {text!r:.60}; expected '<table>'.")
    return list(bounded(rows.table() for rows in reader.tables))


def salvage_html(text: str) -> tuple[list[Table], bool]:
    """The tables up to the last complete and valid row, and whether that is the complete answer."""
    body = joined(text)
    reader = _Reader(body.text)
    try:
        reader.run()
        complete = body.closed and not reader.depth and bool(reader.tables or body.text.strip() == "[]")
        if body.text.lstrip().startswith("["):
            complete = complete and body.text.rstrip("` \r\n").endswith("]")
    except AnswerError:
        complete = False
    tables, fit = as_many_as_fit(rows.table() for rows in reader.tables if rows.n_rows)
    return tables, complete and fit


def html_places(text: str) -> list[Place]:
    """The place of the content of each cell, including the markup in it."""
    body = joined(text)
    reader = _Reader(body.text)
    with contextlib.suppress(AnswerError):
        reader.run()
    return [
        Place((number, d.row, d.col), *body.span(d.start, d.end + 1))
        for number, rows in enumerate(reader.tables)
        for d in rows.cells
    ]


def write_html(table: Table) -> str:
    """Writes a `<table>` on one line, with `<thead>` and `<tbody>` if there are such rows.

    Line breaks become `<br>`; characters that HTML cannot represent become U+FFFD. Runs of white space are kept, but
    HTML reads them as one space.
    """
    rows: list[list[str]] = [[] for _ in range(table.n_rows)]
    for cell in table.cells:
        rows[cell.row].append(_cell(table, cell))
    lines = ["<tr>" + "".join(row) + "</tr>" for row in rows]
    head, body = "".join(lines[: table.n_header_rows]), "".join(lines[table.n_header_rows :])
    # an empty <thead> marks a first row of <th> as not being a header row
    first_is_th = not head and all(cell.header for cell in table.grid()[0])
    head = f"<thead>{head}</thead>" if head or first_is_th else ""
    return f"<table>{head}<tbody>{body}</tbody></table>" if body else f"<table>{head}</table>"


def _cell(table: Table, cell: Cell) -> str:
    tag = "th" if cell.header or cell.row < table.n_header_rows else "td"
    spans = f' colspan="{cell.colspan}"' if cell.colspan > 1 else ""
    spans += f' rowspan="{cell.rowspan}"' if cell.rowspan > 1 else ""
    return f"<{tag}{spans}>{escape(printable(cell.text), quote=False).replace(chr(10), '<br>')}</{tag}>"
