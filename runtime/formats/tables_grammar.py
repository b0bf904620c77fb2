"""An answer of one table, of several, or of a list in brackets, whatever a table looks like."""

from __future__ import annotations

from dataclasses import dataclass, replace

from granite4v.runtime.grammar.automaton import Next, Rule


@dataclass(frozen=True)
class End:
    """Nothing more may come."""

    def next(self) -> Next:
        return Next((), is_accepting=True)

    def after(self, literal: bytes) -> Rule:
        raise ValueError(f"{literal!r} comes after the end")


@dataclass(frozen=True)
class Tables:
    """`opening` begins a table, `table` is the rule behind it, which comes to `End` where the table does.

    `between` are what may stand between tables without brackets; none: then there is one table only.
    """

    opening: bytes
    table: Rule
    between: tuple[bytes, ...] = ()

    def next(self) -> Next:
        return Next((b"[", self.opening))

    def after(self, literal: bytes) -> Rule:
        return _Inside(self, False, self.table) if literal == self.opening else _ListStart(self)


@dataclass(frozen=True)
class _ListStart:
    tables: Tables

    def next(self) -> Next:
        return Next((b"]", self.tables.opening))

    def after(self, literal: bytes) -> Rule:
        return End() if literal == b"]" else _Inside(self.tables, True, self.tables.table)


@dataclass(frozen=True)
class _Inside:
    tables: Tables
    listed: bool
    rule: Rule

    def next(self) -> Next:
        return self.rule.next()

    def after(self, literal: bytes) -> Rule:
        following = self.rule.after(literal)
        if not isinstance(following, End):
            return replace(self, rule=following)
        return _Between(self.tables, self.listed) if self.listed or self.tables.between else following


@dataclass(frozen=True)
class _Between:
    tables: Tables
    listed: bool

    def next(self) -> Next:
        if self.listed:
            return Next((b"]", b", " + self.tables.opening))
        return Next(tuple(gap + self.tables.opening for gap in self.tables.between), is_accepting=True)

    def after(self, literal: bytes) -> Rule:
        return End() if literal == b"]" else _Inside(self.tables, self.listed, self.tables.table)
