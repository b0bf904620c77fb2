"""Tests of grammar states: masks compared with trying every token, errors, and copies of a state."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from granite4v.errors import ConstraintError
from granite4v.runtime.grammar.automaton import advance, start
from granite4v.runtime.grammar.grammar import Grammar
from granite4v.runtime.grammar.grammar_state import Compiler, GrammarState
from granite4v.runtime.prompt.tokenizer import Vocabulary
from tests.helpers.constrained import KINDS, compiler, end_of_text, tokenizer
from tests.helpers.grammars import CLOSED, TASKS, after_tokens, is_text, own_matcher, places, rule_of, task_grammar


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", TASKS[1:])
def test_a_mask_of_an_automaton_equals_trying_each_token_from_the_start(kind: str, task: str) -> None:
    pieces = compiler(kind).index.pieces
    rule = rule_of(task)
    for state, so_far in places(kind, task, 3):
        allowed = state.allowed()
        text = compiler(kind).index.text(so_far)
        behind = advance(start(rule), text)
        assert behind is not None
        for token, piece in enumerate(pieces):
            expected = bool(piece) and is_text(text + piece) and advance(behind, piece) is not None
            assert allowed[token] == expected, (text, piece)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_of_a_schema_is_llguidances_and_equals_trying_each_token(kind: str) -> None:
    matcher = own_matcher(kind, CLOSED)
    assert not matcher.is_error(), matcher.get_error()
    pieces = compiler(kind).index.pieces
    for state, so_far in places(kind, "kvp", 2):
        theirs = matcher.deep_copy()
        assert theirs.try_consume_tokens(so_far) == len(so_far)
        allowed = state.allowed([end_of_text(kind)])
        bits = np.unpackbits(np.frombuffer(theirs.compute_bitmask(), np.uint8), bitorder="little")[: len(pieces)]
        np.testing.assert_array_equal(allowed, bits.astype(bool))
        tried = [theirs.validate_tokens([token]) == 1 for token in range(len(pieces))]
        np.testing.assert_array_equal(allowed, tried)


def test_a_token_that_is_not_allowed_is_an_error() -> None:
    for task in ("kvp", "tables_otsl"):
        state = compiler("toy").begin(task_grammar(task))
        with pytest.raises(ValueError, match="is not allowed here"):
            state.accept(tokenizer("toy").encode_plain("z")[0])


def test_a_vocabulary_that_cannot_spell_the_format_is_an_error() -> None:
    class Poor:
        def vocabulary(self) -> Vocabulary:
            return Vocabulary((b"a", b"<", None), frozenset())

        def encode_plain(self, text: str) -> list[int]:
            return [0] * len(text)

    state = Compiler(Poor(), 3, [2]).begin(task_grammar("tables_otsl"))  # type: ignore[arg-type]
    state.accept(1)
    with pytest.raises(ConstraintError, match="no token can follow b'<'"):
        state.allowed([2])


def test_an_answer_does_not_end_as_if_complete_where_llguidance_gives_up() -> None:
    """The schema demands endless text; `grammar_for` would refuse it."""
    endless = {"$defs": {"a": {"type": "object", "properties": {"x": {"$ref": "#/$defs/a"}}, "required": ["x"]}}}
    grammar = Grammar("kvp", schema=json.dumps({**endless, "$ref": "#/$defs/a"}))
    state = compiler("toy").begin(grammar)
    with pytest.raises(ConstraintError, match="llguidance gave up in the middle of an answer: .*limit"):
        for _ in range(20):
            for token in state.forced_tokens() or [int(np.flatnonzero(state.allowed())[0])]:
                state.accept(token)
    assert not state.is_final


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", TASKS)
def test_a_copy_goes_its_own_way(kind: str, task: str) -> None:
    """Draft tokens are accepted on a copy; the state itself does not change, nor does a new copy of it."""
    rng = random.Random(2)
    for state, so_far in places(kind, task, 3):
        before = observed(state)
        draft = state.copy()
        for _ in range(4):
            allowed = np.flatnonzero(draft.allowed())
            if not len(allowed):
                break
            draft.accept(int(rng.choice(allowed.tolist())))
            if draft.is_final:
                break
        assert observed(state) == before
        assert observed(state.copy()) == before == observed(after_tokens(kind, task, so_far))


def observed(state: GrammarState) -> tuple[object, ...]:
    mask = state.allowed([0]).tobytes()
    return mask, state.forced_tokens(), state.ending(60), state.is_accepting, state.is_final
