"""The grammars of all tasks, their states along noise answers, and an independent llguidance matcher."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any

from granite4v.runtime.formats.task_grammar import grammar_for
from granite4v.runtime.grammar.automaton import Rule
from granite4v.runtime.grammar.grammar import Grammar
from granite4v.runtime.grammar.grammar_state import GrammarState
from tests.helpers.constrained import compiler, end_of_text, generated, tokenizer_json

FORM = {
    "type": "object",
    "properties": {
        "name": {"type": ["string", "null"], "maxLength": 12},
        "kind": {"enum": ["invoice", "receipt", "größe", None]},
        "total": {"type": "number", "minimum": 0, "maximum": 1000},
        "items": {
            "type": "array",
            "items": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]},
            "maxItems": 3,
        },
    },
    "required": ["name", "total", "items"],
}

TASKS = ("kvp", "tables_otsl", "tables_html", "tables_json", "chart2csv")


def task_grammar(task: str) -> Grammar:
    grammar = grammar_for(task, FORM if task == "kvp" else None)
    assert grammar is not None
    return grammar


def rule_of(task: str) -> Rule:
    rule = task_grammar(task).rule
    assert rule is not None
    return rule


def places(kind: str, task: str, n_answers: int) -> Iterator[tuple[GrammarState, list[int]]]:
    """Yields the grammar state at each step of some noise answers, and the tokens up to there."""
    grammar = task_grammar(task)
    for seed in range(n_answers):
        state, so_far = compiler(kind).begin(grammar), []
        for token in generated(kind, grammar, seed, max_tokens=400, patience=6).tokens[:40]:
            yield state, so_far
            state.accept(token)
            so_far.append(token)


def after_tokens(kind: str, task: str, tokens: list[int]) -> GrammarState:
    state = compiler(kind).begin(task_grammar(task))
    for token in tokens:
        state.accept(token)
    return state


def is_text(data: bytes) -> bool:
    """Whether this is the beginning of a UTF-8 text without control characters."""
    try:
        text = codecs.getincrementaldecoder("utf-8")("strict").decode(data)
    except UnicodeDecodeError:
        return False
    return not any((ord(c) < 32 and c not in "\t\n") or 127 <= ord(c) < 160 or c in "\ufeff\ufffe\uffff" for c in text)


def own_matcher(kind: str, schema: dict[str, Any]) -> Any:
    """Returns an llguidance matcher on the checkpoint's vocabulary, with tokens decoded by transformers' byte table and
    none of our code."""
    from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
    from tokenizers import Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    plain = Tokenizer.from_str(tokenizer_json(kind))
    added = plain.get_added_tokens_decoder()

    class Spelled:
        eos_token_id, bos_token_id = end_of_text(kind), None
        special_token_ids = [i for i, info in added.items() if info.special]  # noqa: RUF012
        tokens = [  # noqa: RUF012
            added[i].content.encode() if i in added else bytes(byte_of[c] for c in plain.id_to_token(i) or "")
            for i in range(compiler(kind).index.n_vocab)
        ]

        def __call__(self, text: str) -> list[int]:
            return list(plain.encode(text, add_special_tokens=False).ids)

    layout = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
    schema = {**schema, "x-guidance": {**layout, "json_allowed_escapes": 'nrbtf\\"'}}
    return LLMatcher(
        LLTokenizer(TokenizerWrapper(Spelled())), '%llguidance {"no_forcing": true}\nstart: %json ' + json.dumps(schema)
    )


CLOSED = {
    **FORM,
    "required": ["name", "total", "items", "kind"],
    "additionalProperties": False,
    "properties": {
        **FORM["properties"],  # type: ignore[dict-item]
        "items": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"n": {"type": "integer"}},
                "required": ["n"],
                "additionalProperties": False,
            },
            "maxItems": 3,
        },
    },
}
