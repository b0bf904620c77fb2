"""An answer of one table, of several, or of a list in brackets, whatever a table looks like."""

from __future__ import annotations

from dataclasses import dataclass, replace

from granite4v.runtime.grammar.automaton import Expectation, Rule


@dataclass(frozen=True)
class End:
    """Nothing more may come."""

    def expects(self) -> Expectation:
        return Expectation((), may_end=True)

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

    def expects(self) -> Expectation:
        return Expectation((b"[", self.opening))

    def after(self, literal: bytes) -> Rule:
        return _Inside(self, False, self.table) if literal == self.opening else _ListStart(self)


@dataclass(frozen=True)
class _ListStart:
    tables: Tables

    def expects(self) -> Expectation:
        return Expectation((b"]", self.tables.opening))

    def after(self, literal: bytes) -> Rule:
        return End() if literal == b"]" else _Inside(self.tables, True, self.tables.table)


@dataclass(frozen=True)
class _Inside:
    tables: Tables
    listed: bool
    rule: Rule

    def expects(self) -> Expectation:
        return self.rule.expects()

    def after(self, literal: bytes) -> Rule:
        following = self.rule.after(literal)
        if not isinstance(following, End):
            return replace(self, rule=following)
        return _Between(self.tables, self.listed) if self.listed or self.tables.between else following


@dataclass(frozen=True)
class _Between:
    tables: Tables
    listed: bool

    def expects(self) -> Expectation:
        if self.listed:
            return Expectation((b"]", b", " + self.tables.opening))
        return Expectation(tuple(gap + self.tables.opening for gap in self.tables.between), may_end=True)

    def after(self, literal: bytes) -> Rule:
        return End() if literal == b"]" else _Inside(self.tables, self.listed, self.tables.table)
