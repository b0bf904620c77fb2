"""The text of a schema's grammar as llguidance takes it, and what llguidance says of it."""

from __future__ import annotations

import json
import re

# no \u escapes: half a surrogate pair is JSON, but no text
_LAYOUT = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
    "json_allowed_escapes": 'nrbtf\\"',
}


def lark_grammar(schema_text: str) -> str:
    """llguidance's grammar of the instances of a schema. Masks hold every spelling, not the tokenizer's alone."""
    schema = {**json.loads(schema_text), "x-guidance": _LAYOUT}
    return '%llguidance {"no_forcing": true}\nstart: %json ' + json.dumps(schema)


def validation_problem(schema_text: str) -> str:
    """Why llguidance cannot hold an answer to a schema; empty if it can."""
    from llguidance import LLMatcher

    failed, messages = LLMatcher.validate_grammar_with_warnings(lark_grammar(schema_text), None)
    return reason_of(messages[0]) if failed else ""


def reason_of(message: str) -> str:
    """What a message of llguidance says, in one line, without the grammar that follows."""
    found = re.search(r"failed to compile JSON schema: (.*?)(?=\n +\d+ \| |\Z)", message, re.DOTALL)
    reason = (found[1] if found else message.split("\n<state>")[0]).strip()
    of_regex = re.search(r"regex parse error:.*error: (.*)", reason, re.DOTALL)
    return " ".join((of_regex[1] if of_regex else reason).split())[:200]
