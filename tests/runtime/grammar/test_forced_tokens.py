"""Tests of forced text as tokens: compared with the tokenizer for any continuation, and with cases by hand."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from granite4v.runtime.formats.task_grammar import grammar_for
from granite4v.runtime.grammar.forced_tokens import forced_tokens
from granite4v.runtime.grammar.token_index import TokenIndex
from granite4v.runtime.prompt.tokenizer import Vocabulary
from tests.helpers.constrained import KINDS, compiler, end_of_text, state_after, tokenizer
from tests.helpers.grammars import TASKS, after_tokens, places, task_grammar


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", TASKS)
def test_forced_tokens_are_those_of_the_tokenizer_for_the_complete_text(kind: str, task: str) -> None:
    """For any continuation: tokens that may follow are tried, and the complete text is tokenized."""
    n_forced, n_compared = 0, 0
    encode, index = tokenizer(kind).encode_plain, compiler(kind).index
    rng = random.Random(1)
    for state, so_far in places(kind, task, 6):
        tokens = state.forced_tokens()
        if not tokens:
            continue
        n_forced += 1
        text = index.text(so_far)
        ahead = after_tokens(kind, task, [*so_far, *tokens])
        assert alone_at_each_step(kind, task, so_far, index.text(tokens))
        demanded = state.forced_text()
        if not in_one_way(encode, so_far, text, demanded):
            assert encode(demanded.decode())[: len(tokens)] == tokens
            continue  # the model split the text differently than the tokenizer would
        n_compared += 1
        allowed = [int(token) for token in np.flatnonzero(ahead.allowed([end_of_text(kind)]))]
        for token in rng.sample(allowed, min(len(allowed), 25)):
            whole = text + index.text(tokens) + index.pieces[token]
            try:
                found = encode(whole.decode())
            except UnicodeDecodeError:
                continue  # ends inside a character
            if found[: len(so_far)] == so_far:  # else a longer token would have begun earlier
                assert found[: len(so_far) + len(tokens)] == [*so_far, *tokens], whole
    assert n_forced if task != "chart2csv" else not n_forced
    assert n_compared or task in ("chart2csv", "tables_otsl")


def in_one_way(encode: Callable[[str], list[int]], so_far: list[int], text: bytes, demanded: bytes) -> bool:
    """Whether the tokenizer splits the text so far into the same tokens when the demanded text follows it."""
    return encode((text + demanded).decode())[: len(so_far)] == so_far


def alone_at_each_step(kind: str, task: str, so_far: list[int], text: bytes) -> bool:
    """Whether the mask at each byte of `text` allows only tokens that continue with it."""
    pieces = compiler(kind).index.pieces
    single = {piece: token for token, piece in enumerate(pieces) if len(piece) == 1}
    state = after_tokens(kind, task, so_far)
    for i in range(len(text)):
        rest = text[i:]
        allowed = [pieces[token] for token in np.flatnonzero(state.allowed([end_of_text(kind)]))]
        if not all(piece and (rest.startswith(piece) or piece.startswith(rest)) for piece in allowed):
            return False
        state.accept(single[text[i : i + 1]])
    return True


def test_forced_text_by_hand() -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "n": {"type": "integer"}},
        "required": ["name", "n"],
    }
    grammar = grammar_for("kvp", schema)
    assert grammar is not None
    pieces = compiler("nano").index.pieces

    def forced(so_far: str) -> list[bytes]:
        return [pieces[token] for token in state_after("nano", grammar, so_far).forced_tokens()]

    assert forced("") == [b'{"', b"n", b"a", b"m", b"e", b'": "']
    assert forced('{"name": "x') == []
    assert forced('{"name": "x", "n') == [b'"', b":"]  # the space before a number may be split in several ways
    assert forced('{"name": "x", "n": 1') == []
    otsl = task_grammar("tables_otsl")
    assert [pieces[t] for t in state_after("nano", otsl, "<otsl><ecel><nl><ecel>").forced_tokens()] == [b"<nl>"]
    html = task_grammar("tables_html")
    assert state_after("nano", html, "<table><tr><td></td></tr><tr><td>a").forced_tokens() == []
    cells = task_grammar("tables_json")
    size = '{"dimensions": {"rows": 1, "columns": 1, "header_rows": 1, "total_rows": 2'
    found = [pieces[t] for t in state_after("nano", cells, size).forced_tokens()]
    assert found == [b'}, "cells": [{"row": ', b"1", b', "col": ', b"1"]  # a longer piece begins with ', "colspan": '


def letters(*longer: str, added: tuple[str, ...] = ()) -> tuple[TokenIndex, Callable[[str], list[int]]]:
    """Returns the index and the encode function of a tokenizer that takes the longest known token, added ones first."""
    texts = [*map(chr, range(128)), *longer, *added]
    ids = {text: i for i, text in enumerate(texts)}
    index = TokenIndex(Vocabulary(tuple(t.encode() for t in texts), frozenset(ids[t] for t in added)), len(texts))

    def encode(text: str) -> list[int]:
        for i in range(len(text)):
            found = [t for t in added if text.startswith(t, i)]
            if found:
                first = max(found, key=len)
                return [*encode(text[:i]), ids[first], *encode(text[i + len(first) :])]
        found_ids = []
        while text:
            best = max((t for t in (*longer, text[0]) if text.startswith(t)), key=len)
            found_ids.append(ids[best])
            text = text[len(best) :]
        return found_ids

    return index, encode


@pytest.mark.parametrize(
    ("longer", "added", "said_before", "text", "following", "expected"),
    [
        ((), (), "", "ab", "c", "ab"),
        (("bc",), (), "", "ab", "c", "a"),  # the b could become bc
        (("bc",), (), "", "ab", "d", "ab"),
        (("bc",), (), "", "ab", "", "ab"),  # nothing follows
        (("bcd",), (), "", "abc", "d", "a"),
        (("ab", "bcd"), (), "", "abc", "d", ""),  # then not even ab is certain
        (("xa",), (), "x", "ab", "c", "ab"),  # the x is already a token by itself
        (("xa",), (), "x", "a", "c", "a"),
        ((), ("<t>",), "", "<t>", "a", "<t>"),
        ((">a",), ("<t>",), "", "<t>", "a", "<t>"),  # an added token is split off first
        ((), ("<t>", "<t>a"), "", "<t>", "a", ""),  # unless a longer one begins there
        ((), ("<t>", "b<t>a"), "", "b<t>", "a", ""),
        ((), ("<t>", "t>a"), "", "<t>", "a", "<t>"),  # a token that begins later comes too late
        ((), (), "", "a ", "b", "a"),  # white space before a word is split differently
    ],
)
def test_only_tokens_that_are_certain_are_fed(
    longer: tuple[str, ...], added: tuple[str, ...], said_before: str, text: str, following: str, expected: str
) -> None:
    index, encode = letters(*longer, added=added)
    tokens = forced_tokens(index, encode, encode(said_before), text.encode(), following.encode())
    assert index.text(tokens) == expected.encode()


def test_text_that_is_cut_within_a_character_is_left_to_the_model() -> None:
    index, encode = letters()
    assert forced_tokens(index, encode, [], b"a\xc3", b"\xa9") == []
