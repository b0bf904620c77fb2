"""Writes the grammar of a schema for llguidance, and gets llguidance's verdict on it."""

from __future__ import annotations

import json
import re

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

_MAX_ITEMS = 50_000  # in one row of the parser; an object takes four for each optional property
# no \u escapes: they could produce a lone surrogate, which is JSON but not text
_LAYOUT = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
    "json_allowed_escapes": 'nrbtf\\"',
}


def lark_grammar(schema_text: str) -> str:
    """The llguidance grammar for the instances of a schema.

    With "no_forcing", masks allow every way to split a text into tokens, not only the tokenizer's.
    """
    schema = {**json.loads(schema_text), "x-guidance": _LAYOUT}
    return '%llguidance {"no_forcing": true}\nstart: %json ' + json.dumps(schema)


def validation_problem(schema_text: str) -> str:
    """Why llguidance cannot enforce a schema; empty if it can."""
    failed, messages = LLMatcher.validate_grammar_with_warnings(lark_grammar(schema_text), None)
    return reason_of(messages[0]) if failed else ""


def compile_problem(schema_text: str) -> str:
    """Why llguidance cannot enforce a schema or compile its grammar; empty if it can.

    A vocabulary of single bytes is enough to find that out.
    """
    problem = validation_problem(schema_text)
    if problem:
        return problem
    tokenizer = LLTokenizer(TokenizerWrapper(Bytes()))
    matcher = LLMatcher(tokenizer, lark_grammar(schema_text), log_level=0, limits=limits())
    return reason_of(str(matcher.get_error())) if matcher.is_error() else ""


def limits() -> LLParserLimits:
    """llguidance's own limits, raised for objects with thousands of optional properties."""
    return LLParserLimits(max_items_in_row=_MAX_ITEMS, step_max_items=5 * _MAX_ITEMS)


class Bytes:
    """A vocabulary of single bytes, for `llguidance.TokenizerWrapper`."""

    eos_token_id, bos_token_id, special_token_ids = 256, None, (256,)
    tokens = (*(bytes((byte,)) for byte in range(256)), b"<end>")

    def __call__(self, text: str) -> list[int]:
        return list(text.encode())


def reason_of(message: str) -> str:
    """The reason given in an llguidance message, on one line, without the grammar that follows it."""
    found = re.search(r"failed to compile JSON schema: (.*?)(?=\n +\d+ \| |\Z)", message, re.DOTALL)
    reason = (found[1] if found else message.split("\n<state>")[0]).strip()
    of_regex = re.search(r"regex parse error:.*error: (.*)", reason, re.DOTALL)
    return " ".join((of_regex[1] if of_regex else reason).split())[:200]
