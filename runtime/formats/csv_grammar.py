"""The automaton of CSV: a header, and rows of the same width, quoted as in RFC 4180, with '\\n' between rows.

An answer is bare or in a Markdown fence. No field may contain '`', so that a field cannot be mistaken for a fence. A
row of one empty field is written as '""', since parsers skip blank lines.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from granite4v.runtime.formats.tables_grammar import End
from granite4v.runtime.grammar.automaton import Next, Rule, Text

_PLAIN = Text(marks=b',"\n`')
_QUOTED = Text(marks=b'"`')
_FENCES = (b"```csv\n", b"```\n")
_CLOSING = b"```"


@dataclass(frozen=True)
class CsvField:
    """At the start of a field, or inside an unquoted one. `column` counts from 0.

    `n_fields` is the width of the header, None inside the header. `fenced` is None until the answer shows it.
    """

    n_fields: int | None = None
    column: int = 0
    fenced: bool | None = False

    @property
    def begins_row(self) -> bool:
        return self.column == 0

    def separators(self) -> tuple[bytes, ...]:
        """What may follow the field."""
        if self.n_fields is None:
            return (b"\n", b",")
        return (b",",) if self.column < self.n_fields - 1 else (b"\n",)

    def next(self) -> Next:
        separators = self.separators()
        # parsers skip blank lines, so a row cannot be empty: neither a line break nor the end comes right at its start
        initial_literals = [b'"', *(s for s in separators if s != b"\n")] if self.begins_row else [*separators, b'"']
        is_accepting = b"\n" in separators and not self.fenced
        initially_accepting = is_accepting and not self.begins_row
        if self.n_fields is not None and self.begins_row:  # after a line break: the rows so far may be all
            initially_accepting = not self.fenced
            initial_literals = [_CLOSING, *initial_literals] if self.fenced else initial_literals
        if self.fenced is None:
            initial_literals += _FENCES
        return Next(separators, _PLAIN, is_accepting, tuple(initial_literals), initially_accepting)

    def after(self, literal: bytes) -> Rule:
        if literal in _FENCES:
            return CsvField(fenced=True)
        if literal == _CLOSING:
            return End()
        field = replace(self, fenced=bool(self.fenced))
        return _Quoted(field) if literal == b'"' else field.following(literal)

    def following(self, separator: bytes) -> CsvField:
        if separator == b",":
            return replace(self, column=self.column + 1)
        return replace(self, n_fields=self.n_fields or self.column + 1, column=0)


@dataclass(frozen=True)
class _Quoted:
    """Inside a quoted field."""

    field: CsvField

    def next(self) -> Next:
        return Next((b'"',), _QUOTED)

    def after(self, literal: bytes) -> Rule:
        return _Unquoted(self.field)


@dataclass(frozen=True)
class _Unquoted:
    """After a quote that either closes the field or is the first of a doubled quote."""

    field: CsvField

    def next(self) -> Next:
        separators = self.field.separators()
        return Next((*separators, b'"'), is_accepting=b"\n" in separators and not self.field.fenced)

    def after(self, literal: bytes) -> Rule:
        return _Quoted(self.field) if literal == b'"' else self.field.following(literal)


CSV = CsvField(fenced=None)
