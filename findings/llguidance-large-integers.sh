#!/usr/bin/env bash
# llguidance: integers above 2^53 in a JSON Schema are replaced by other integers
#
# Expected: JSON Schema puts no limit on the size of an integer, JSON text carries any number of
#   digits, and Python's json module keeps them all. A `const` or `enum` integer should therefore be
#   the one value that the grammar accepts, or the schema should be refused.
# Observed (llguidance 1.9.1): the schema's numbers pass through a 64-bit float. The grammar is
#   compiled without an error or a warning; it refuses the integer in the schema and accepts the
#   nearest float instead. The same happens to `minimum` and `maximum`. An unbounded
#   {"type": "integer"} is unaffected and accepts any digits.
# Output:
#   llguidance 1.9.1
#   const 123456789012345678: itself refused, 123456789012345680 accepted
#   enum 9007199254740993: itself refused, 9007199254740992 accepted
#   minimum = maximum = 9007199254740993: itself refused, 9007199254740992 accepted
#   integer without bounds: both accepted
# Why it matters: account, customer and document numbers of 17 or 18 digits are often declared as
#   integers. Constrained decoding then makes the model write a number that is not on the list, and
#   a validator that reads the answer exactly rejects it. Compare such constants before compiling,
#   or turn them into patterns over digits.
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
n = 9007199254740993  # 2**53 + 1, the first integer that a 64-bit float cannot hold
for label, schema, own, other in (
    ("const 123456789012345678", {"const": 123456789012345678}, "123456789012345678", "123456789012345680"),
    (f"enum {n}", {"enum": [n]}, str(n), str(n - 1)),
    (f"minimum = maximum = {n}", {"type": "integer", "minimum": n, "maximum": n}, str(n), str(n - 1)),
):
    assert not accepts(schema, own), label
    assert accepts(schema, other), label
    print(f"{label}: itself refused, {other} accepted")
assert accepts({"type": "integer"}, str(n)) and accepts({"type": "integer"}, str(n - 1))
print("integer without bounds: both accepted")
PYTHON
