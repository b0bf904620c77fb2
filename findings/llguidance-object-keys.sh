#!/usr/bin/env bash
# llguidance: an object grammar compares keys as spelled, so one key can occur twice
#
# Expected: within one object a grammar never offers the same key again, and a declared property
#   always has its declared type. JSON compares keys after unescaping, so "fuer" and "\u0066uer"
#   are one key.
# Observed (llguidance 1.9.1):
#   - keys that only `additionalProperties` covers may repeat, with different values;
#   - declared keys are excluded from the additional ones by their raw spelling. A spelling with a
#     \u escape counts as an additional key, escapes the declared type, and after parsing replaces
#     the declared value. In string values the same escapes are refused, so keys and values follow
#     different rules.
#   With "additionalProperties": false neither happens.
# Output:
#   llguidance 1.9.1
#   {"7%":1,"7%":2}: accepted, read as {'7%': 2}
#   {"für":1.5,"f\u00fcr":"x"}: accepted, read as {'für': 'x'}
#   "f\u00fcr" as a string value: refused
#   closed object: both refused
# Why it matters: tables read into dict[str, float] lose rows without a trace when two lines carry
#   the same label, and models trained on ASCII-only JSON write \u escapes in non-English field names
#   by themselves. Parse with object_pairs_hook to see repeated keys, validate after decoding, and
#   close objects where the schema allows it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'llguidance==1.9.1'
"$work/venv/bin/python" - <<'PYTHON'
import json
from importlib.metadata import version

from llguidance import LLMatcher, LLTokenizer

TOKENIZER = LLTokenizer("byte")  # one token per byte


def accepts(schema, text):
    matcher = LLMatcher(TOKENIZER, LLMatcher.grammar_from_json_schema(json.dumps(schema)))
    assert not matcher.is_error(), matcher.get_error()
    data = text.encode()
    return matcher.try_consume_tokens(list(data)) == len(data) and matcher.is_accepting()


print("llguidance", version("llguidance"))
rates = {"type": "object", "additionalProperties": {"type": "integer"}}
twice = '{"7%":1,"7%":2}'
assert accepts(rates, twice) and json.loads(twice) == {"7%": 2}
print(f"{twice}: accepted, read as {json.loads(twice)}")

declared = {"type": "object", "properties": {"für": {"type": "number"}}, "required": ["für"]}
alias = '{"für":1.5,"f\\u00fcr":"x"}'
assert not accepts(declared, '{"für":"x"}')  # the declared type holds for the plain spelling
assert not accepts(declared, '{"für":1.5,"für":2.5}')  # and so does uniqueness
assert accepts(declared, alias) and json.loads(alias) == {"für": "x"}
print(f"{alias}: accepted, read as {json.loads(alias)}")

assert accepts({"type": "string"}, '"für"') and not accepts({"type": "string"}, '"f\\u00fcr"')
print('"f\\u00fcr" as a string value: refused')

closed = {**declared, "additionalProperties": False}
assert accepts(closed, '{"für":1.5}') and not accepts(closed, alias)
fixed = {"type": "object", "properties": {"7%": {"type": "integer"}}, "additionalProperties": False}
assert accepts(fixed, '{"7%":1}') and not accepts(fixed, twice)
print("closed object: both refused")
PYTHON
