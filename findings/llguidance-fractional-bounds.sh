#!/usr/bin/env bash
# llguidance: numbers inside fractional or exclusive bounds are refused by how they are spelled
#
# Expected: a grammar for {"type": "number", "maximum": 0.25} accepts every JSON spelling of every
#   number up to 0.25, and {"exclusiveMinimum": 0} every spelling of every positive number.
# Observed (llguidance 1.9.1): the grammar compiles without an error or a warning, then
#   - below a maximum with several decimals it refuses shorter fractions that agree with its first
#     digits: 0.2 under 0.25 (0.20 and 0.1 pass), 0.6 and 0.64 under 0.646;
#   - above an exclusive 0 it refuses trailing zeros below 1: 0.50 (0.5, 1.50 and 12.30 pass);
#   - below 1 it refuses -0.10, though not -0.1;
#   - with an exclusive minimum of 0 and a maximum below 1 it accepts 0 itself.
#   An inclusive minimum of 0 alone, or with a maximum of 100, behaves as expected.
# Output:
#   llguidance 1.9.1
#   {"maximum": 0.25}: 0.25 accepted, 0.24 accepted, 0.20 accepted, 0.2 refused, 0.1 accepted
#   {"maximum": 0.646}: 0.646 accepted, 0.64 refused, 0.6 refused
#   {"exclusiveMinimum": 0}: 0.5 accepted, 0.50 refused, 0.050 refused, 1.50 accepted, 12.30 accepted
#   {"maximum": 1}: -0.1 accepted, -0.10 refused, 0.10 accepted
#   {"exclusiveMinimum": 0, "maximum": 0.9}: 0 accepted, 0.5 accepted
#   {"minimum": 0, "maximum": 100}: 19.90 accepted, 0.50 accepted, 100.00 accepted
# Why it matters: prices and rates are printed with trailing zeros, and "greater than 0" is how schemas
#   declare them. Constrained decoding then makes a model that reads 0.50 write another number. Leave
#   such bounds out of the grammar and check the value afterwards.
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
SEEN = (
    ({"maximum": 0.25}, {"0.25": True, "0.24": True, "0.20": True, "0.2": False, "0.1": True}),
    ({"maximum": 0.646}, {"0.646": True, "0.64": False, "0.6": False}),
    ({"exclusiveMinimum": 0}, {"0.5": True, "0.50": False, "0.050": False, "1.50": True, "12.30": True}),
    ({"maximum": 1}, {"-0.1": True, "-0.10": False, "0.10": True}),
    ({"exclusiveMinimum": 0, "maximum": 0.9}, {"0": True, "0.5": True}),
    ({"minimum": 0, "maximum": 100}, {"19.90": True, "0.50": True, "100.00": True}),
)


def accepts(bounds, text):
    schema = json.dumps({"type": "number", **bounds})
    matcher = LLMatcher(TOKENIZER, LLMatcher.grammar_from_json_schema(schema))
    assert not matcher.is_error(), matcher.get_error()
    data = text.encode()
    return matcher.try_consume_tokens(list(data)) == len(data) and matcher.is_accepting()


print("llguidance", version("llguidance"))
for bounds, expected in SEEN:
    found = {text: accepts(bounds, text) for text in expected}
    words = (f"{text} {'accepted' if ok else 'refused'}" for text, ok in found.items())
    print(f"{json.dumps(bounds)}: {', '.join(words)}")
    assert found == expected, f"expected {expected}"
PYTHON
