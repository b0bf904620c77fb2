"""The fields that a JSON Schema asks for (the key-value task): the prompt, and the parser of its answers.

The grammar of these answers is made from the schema, see `runtime.grammar.schema`.
"""

from __future__ import annotations

import re
from typing import Any

from granite4v.errors import AnswerError
from granite4v.runtime.formats.json_prefix import read_prefix
from granite4v.runtime.formats.json_text import json_places, load_json
from granite4v.runtime.formats.place import Place, pointer
from granite4v.runtime.formats.rows import Rows
from granite4v.runtime.formats.wrapping import unfence

# the exact prompt of the publisher's benchmark, which the models were trained on
KVP_PROMPT = """\
Extract structured data from this document.
Return a JSON object matching this schema:

{schema}

Return null for fields you cannot find.
Return ONLY valid JSON.
Return an instance of the JSON with extracted values, not the schema itself."""
FIELDS_ROWS = Rows("}", re.compile(r'"[^"\\]*": *|null|""|[\[\]{},\s]+'))


def read_fields(text: str) -> dict[str, Any] | list[Any]:
    """The object (or list) that answers a key-value prompt. Raises AnswerError."""
    value = load_json(text)
    if not isinstance(value, dict | list):
        raise AnswerError(f"the answer is {value!r:.60}; expected a JSON object.")
    return value


def field_places(text: str) -> list[Place]:
    """The place of each string, number, literal, empty object and empty list, by its JSON pointer."""
    found: dict[str, Place] = {}
    for path, start, end in json_places(text):
        found[pointer(path)] = Place(pointer(path), start, end)
    return list(found.values())


def salvage_fields(text: str) -> tuple[dict[str, Any] | list[Any] | None, bool]:
    """The object (or list) up to the last complete field or item, and whether that is the complete answer.

    Unclosed objects and lists are kept with their complete members.
    """
    prefix = read_prefix(unfence(text, "json").text.lstrip())
    if not isinstance(prefix.value, dict | list):
        return None, False
    return prefix.value, prefix.complete
