"""The automaton of HTML tables: sections, rows that cover every column once, spans that fit.

The first row determines the number of columns. There is no white space between tags. Text may contain character
references, `<br>` and one level of inline markup; a '<' before anything that could begin a tag does begin one.
"""

from __future__ import annotations

import string
from dataclasses import dataclass, replace

from granite4v.runtime.formats.tables_grammar import End, Tables
from granite4v.runtime.grammar.automaton import Next, Rule, Text

MOST_SPANNED = 99
_TEXT = Text(tags=(string.ascii_letters + "/!?").encode())
_INLINE = (b"b", b"i", b"u", b"em", b"strong", b"sub", b"sup")
_BREAKS = (b"<br>", b"<br/>")
_CELLS = (b"<td>", b"<th>", b"<td ", b"<th ")


@dataclass(frozen=True)
class HtmlTable:
    """Between two rows. `section` is the open section ('' if none), `past` are the closed ones.

    `hanging`: for each column, how many of the following rows a cell from above still covers; None before the first
    row. For example, after a row '<td rowspan="3">a</td><td>b</td>' it is (2, 0).
    """

    section: str = ""
    past: tuple[str, ...] = ()
    n_rows: int = 0  # in this section
    hanging: tuple[int, ...] | None = None

    def next(self) -> Next:
        literals: list[bytes] = []
        if "tbody" not in self.past:
            literals.append(b"<tr>")
        complete = self.hanging is not None and not any(self.hanging)
        if self.section:
            return Next((*([_tag("/" + self.section)] if complete and self.n_rows else []), *literals))
        if self.hanging is None:
            literals.append(b"<thead>")
        if not self.n_rows and "tbody" not in self.past:
            literals.append(b"<tbody>")
        if complete:
            literals.insert(0, b"</table>")
        return Next(tuple(literals))

    def after(self, literal: bytes) -> Rule:
        if literal == b"</table>":
            return End()
        if literal == b"<tr>":
            return _HtmlRow(self, self.hanging)
        name = literal.decode().strip("</>")
        if literal.startswith(b"</"):
            return HtmlTable(past=(*self.past, name), hanging=self.hanging)
        return replace(self, section=name)


@dataclass(frozen=True)
class _HtmlRow:
    """Inside a row. `above` is `hanging` at the start of the row; `below` is what it will be for the next row, for the
    columns that are done."""

    table: HtmlTable
    above: tuple[int, ...] | None
    below: tuple[int, ...] = ()

    def skipped(self) -> _HtmlRow:
        """The same row, after any columns at this point that cells from above cover."""
        below = self.below
        while self.above is not None and len(below) < len(self.above) and self.above[len(below)]:
            below = (*below, self.above[len(below)] - 1)
        return replace(self, below=below)

    def n_free(self) -> int:
        """The greatest colspan that the next cell may have."""
        if self.above is None:
            return MOST_SPANNED
        rest = self.above[len(self.below) :]
        n_free = next((i for i, covered in enumerate(rest) if covered), len(rest))
        return min(n_free, MOST_SPANNED)

    def next(self) -> Next:
        row = self.skipped()
        literals = _CELLS if row.n_free() else ()
        if row.below and (row.above is None or len(row.below) == len(row.above)):
            literals = (b"</tr>", *literals)
        return Next(literals)

    def after(self, literal: bytes) -> Rule:
        row = self.skipped()
        if literal == b"</tr>":
            return replace(self.table, n_rows=self.table.n_rows + 1, hanging=row.below)
        tag = literal[1:3]
        return _HtmlText(row.with_cell(1, 1), tag) if literal.endswith(b">") else _HtmlSpans(row, tag)

    def with_cell(self, colspan: int, rowspan: int) -> _HtmlRow:
        return replace(self, below=(*self.below, *(rowspan - 1 for _ in range(colspan))))


@dataclass(frozen=True)
class _HtmlSpans:
    """Inside the tag of a cell. `name` is the open attribute, empty before an attribute; `value` is its number so
    far."""

    row: _HtmlRow
    tag: bytes
    colspan: int | None = None
    rowspan: int | None = None
    name: bytes = b""
    value: int = 0

    def next(self) -> Next:
        if not self.name:
            return Next((b'colspan="', b'rowspan="'))
        most = self.row.n_free() if self.name == b"colspan" else MOST_SPANNED
        digits = tuple(b"%d" % d for d in range(10) if 0 < self.value * 10 + d <= most)
        if not self.value:
            return Next(digits)
        other = b"rowspan" if self.name == b"colspan" else b"colspan"
        more = () if self._known(other) else (b'" ' + other + b'="',)
        return Next((b'">', *digits, *more))

    def _known(self, name: bytes) -> bool:
        return (self.colspan if name == b"colspan" else self.rowspan) is not None

    def after(self, literal: bytes) -> Rule:
        if literal.isdigit():
            return replace(self, value=self.value * 10 + int(literal))
        spans = self._closed()
        if literal == b'">':
            return _HtmlText(spans.row.with_cell(spans.colspan or 1, spans.rowspan or 1), spans.tag)
        return replace(spans, name=literal.strip(b' "='), value=0)

    def _closed(self) -> _HtmlSpans:
        if self.name == b"colspan":
            return replace(self, colspan=self.value)
        return replace(self, rowspan=self.value) if self.name else self


@dataclass(frozen=True)
class _HtmlText:
    """Inside a cell, which `row` already includes. `inline` is the open inline element, if any."""

    row: _HtmlRow
    tag: bytes
    inline: bytes = b""

    def next(self) -> Next:
        if self.inline:
            return Next((b"</" + self.inline + b">", *_BREAKS), _TEXT)
        opening = (b"<" + name + b">" for name in _INLINE)
        return Next((b"</" + self.tag + b">", *_BREAKS, *opening), _TEXT)

    def after(self, literal: bytes) -> Rule:
        if literal in _BREAKS:
            return self
        if self.inline:
            return replace(self, inline=b"")
        return self.row if literal == b"</" + self.tag + b">" else replace(self, inline=literal[1:-1])


def _tag(name: str) -> bytes:
    return f"<{name}>".encode()


HTML = Tables(b"<table>", HtmlTable(), between=(b"", b"\n"))
