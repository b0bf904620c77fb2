"""The automaton of an answer around its tables: one table, several, or a list of them in brackets."""

from __future__ import annotations

from dataclasses import dataclass, replace

from granite4v.runtime.grammar.automaton import Next, Rule


@dataclass(frozen=True)
class End:
    """The end of an answer: nothing may follow."""

    def next(self) -> Next:
        return Next((), is_accepting=True)

    def after(self, literal: bytes) -> Rule:
        raise ValueError(f"{literal!r} comes after the end")


@dataclass(frozen=True)
class Tables:
    """The start of an answer. `opening` begins a table; `table` is the rule after it, which leads to `End` at the end
    of the table.

    `between`: the separators allowed between tables outside brackets; if empty, only one such table is allowed.
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
