"""Structured output: compiled grammars, and the position of an answer in one. Knows tokens, but no table format."""

from __future__ import annotations

from typing import TYPE_CHECKING

from granite4v.lazy import exports

if TYPE_CHECKING:
    from granite4v.runtime.grammar.grammar import Grammar
    from granite4v.runtime.grammar.grammar_state import Compiler, GrammarState

__all__ = ["Compiler", "Grammar", "GrammarState"]

__getattr__, __dir__ = exports(__name__, {"grammar": ("Grammar",), "grammar_state": ("Compiler", "GrammarState")})
