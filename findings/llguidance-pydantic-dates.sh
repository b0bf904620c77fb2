#!/usr/bin/env bash
# llguidance and pydantic disagree about dates in both directions
#
# Expected: pydantic declares datetime.date, datetime.datetime and datetime.time as the formats
#   `date`, `date-time` and `time`. What a grammar for that schema lets through should load into
#   the model, and what the model itself serializes should pass the grammar.
# Observed (llguidance 1.9.1, pydantic 2.14.4):
#   - too lax: the grammar for `date` (and the date part of `date-time`) knows the length of each
#     month but allows 29 February in every year. pydantic then rejects the finished answer.
#   - too strict: the grammar demands a UTC offset in `date-time` and `time`, as RFC 3339 does,
#     while pydantic writes naive values without one under the same `format`. The model's own
#     output does not pass the grammar of its own schema.
# Output:
#   llguidance 1.9.1, pydantic 2.14.4
#   2023-02-29: grammar accepts, pydantic rejects; 2023-02-30: both reject
#   {"due":"2024-03-01T10:00:00","at":"09:30:00"}: pydantic's own JSON, grammar rejects
#   {"due":"2024-03-01T10:00:00Z","at":"09:30:00Z"}: both accept
# Why it matters: invoices and forms print dates and times without a zone. A field declared
#   `datetime` cannot take what is on the page, so the model has to invent a zone; and a constrained
#   answer can still fail validation. Re-validate after decoding, and drop or relax `date-time` and
#   `time` in the grammar if naive values are wanted.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'llguidance==1.9.1' 'pydantic==2.14.4'
"$work/venv/bin/python" - <<'PYTHON'
import datetime
import json
from importlib.metadata import version

from llguidance import LLMatcher, LLTokenizer
from pydantic import BaseModel, ValidationError

TOKENIZER = LLTokenizer("byte")  # one token per byte


class Invoice(BaseModel):
    date: datetime.date


class Meeting(BaseModel):
    due: datetime.datetime
    at: datetime.time


def grammar_accepts(model, text):
    matcher = LLMatcher(TOKENIZER, LLMatcher.grammar_from_json_schema(json.dumps(model.model_json_schema())))
    assert not matcher.is_error(), matcher.get_error()
    data = text.encode()
    return matcher.try_consume_tokens(list(data)) == len(data) and matcher.is_accepting()


def pydantic_accepts(model, text):
    try:
        model.model_validate_json(text)
    except ValidationError:
        return False
    return True


print(f"llguidance {version('llguidance')}, pydantic {version('pydantic')}")
leap = '{"date":"2023-02-29"}'
never = '{"date":"2023-02-30"}'
assert grammar_accepts(Invoice, leap) and not pydantic_accepts(Invoice, leap)
assert not grammar_accepts(Invoice, never) and not pydantic_accepts(Invoice, never)
print("2023-02-29: grammar accepts, pydantic rejects; 2023-02-30: both reject")

naive = Meeting(due=datetime.datetime(2024, 3, 1, 10), at=datetime.time(9, 30)).model_dump_json()
assert naive == '{"due":"2024-03-01T10:00:00","at":"09:30:00"}', naive
assert pydantic_accepts(Meeting, naive) and not grammar_accepts(Meeting, naive)
print(f"{naive}: pydantic's own JSON, grammar rejects")

utc = datetime.timezone.utc
aware = Meeting(due=datetime.datetime(2024, 3, 1, 10, tzinfo=utc), at=datetime.time(9, 30, tzinfo=utc)).model_dump_json()
assert pydantic_accepts(Meeting, aware) and grammar_accepts(Meeting, aware)
print(f"{aware}: both accept")
PYTHON
