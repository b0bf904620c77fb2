"""Answers held to a form: JSON schemas, OTSL, HTML tables, CSV. No answer that ends by itself is invalid."""

from granite4v.errors import ConstraintError
from granite4v.runtime.constraint.grammars import Grammar, grammar_for
from granite4v.runtime.constraint.guide import Compiler, Guide

__all__ = ["Compiler", "ConstraintError", "Grammar", "Guide", "grammar_for"]
