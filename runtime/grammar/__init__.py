"""Answers held to a form: JSON schemas, OTSL, HTML tables, CSV. No answer that ends by itself is invalid."""

from granite4v.errors import ConstraintError
from granite4v.runtime.grammar.grammar_state import Compiler, Guide
from granite4v.runtime.grammar.grammars import Grammar, grammar_for

__all__ = ["Compiler", "ConstraintError", "Grammar", "Guide", "grammar_for"]
