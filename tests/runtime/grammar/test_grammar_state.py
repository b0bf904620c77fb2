"""Masks against trying every token, forced text against the tokenizer, and whole answers of a model under a constraint
against a loop of its own that masks the full distribution at each step."""

from __future__ import annotations

import codecs
import json
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import granite4v
from granite4v.errors import ConstraintError
from granite4v.ggml.gguf_file import GgufFile
from granite4v.runtime.formats.task_grammar import grammar_for
from granite4v.runtime.grammar.automaton import Rule, advance, next_bytes, start
from granite4v.runtime.grammar.forced_tokens import forced_tokens
from granite4v.runtime.grammar.grammar import Grammar
from granite4v.runtime.grammar.grammar_state import Compiler, GrammarState
from granite4v.runtime.grammar.token_index import TokenIndex
from granite4v.runtime.prompt.tokenizer import HfTokenizer, LlamaTokenizer, Vocabulary, load_tokenizer
from tests.helpers.constrained import KINDS, compiler, end_of_text, generated, state_after, tokenizer
from tests.helpers.gguf_edit import copy_gguf
from tests.helpers.pictures import noise_picture
from tests.toy.spec import PRESETS

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


def grammar_of(task: str) -> Grammar:
    grammar = grammar_for(task, FORM if task == "kvp" else None)
    assert grammar is not None
    return grammar


def rule_of(task: str) -> Rule:
    rule = grammar_of(task).rule
    assert rule is not None
    return rule


# --- masks ---


def places(kind: str, task: str, n_answers: int) -> Iterator[tuple[GrammarState, list[int]]]:
    """States at each step of some answers of noise, and the tokens up to there."""
    grammar = grammar_of(task)
    for seed in range(n_answers):
        state, so_far = compiler(kind).begin(grammar), []
        for token in generated(kind, grammar, seed, max_tokens=400, patience=6).tokens[:40]:
            yield state, so_far
            state.accept(token)
            so_far.append(token)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", TASKS[1:])
def test_a_mask_of_a_form_holds_what_trying_each_token_from_the_start_gives(kind: str, task: str) -> None:
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


def is_text(data: bytes) -> bool:
    """Whether this is the beginning of text in UTF-8 without control characters."""
    try:
        text = codecs.getincrementaldecoder("utf-8")("strict").decode(data)
    except UnicodeDecodeError:
        return False
    return not any((ord(c) < 32 and c not in "\t\n") or 127 <= ord(c) < 160 or c in "\ufeff\ufffe\uffff" for c in text)


@pytest.mark.parametrize("task", TASKS[1:])
def test_the_bytes_that_may_come_next_are_those_that_lead_on(task: str) -> None:
    for seed in range(20):
        rng, position = random.Random(seed), start(rule_of(task))
        for _ in range(30):
            found = {byte for byte in range(256) if advance(position, bytes((byte,))) is not None}
            assert next_bytes(position) == found
            following = advance(position, bytes((rng.choice([b for b in found if b < 128] or [0]),)))
            if following is None:
                break
            position = following


def own_matcher(kind: str, schema: dict[str, Any]) -> Any:
    """llguidance on the checkpoint's vocabulary as transformers spells it, with none of our code."""
    from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
    from tokenizers import Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    plain = Tokenizer.from_str(tokenizer(kind)._tokenizer.to_str())
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


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_of_a_schema_is_llguidances_and_what_trying_each_token_gives(kind: str) -> None:
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
        state = compiler("toy").begin(grammar_of(task))
        with pytest.raises(ValueError, match="is not allowed here"):
            state.accept(tokenizer("toy").encode_plain("z")[0])


def test_a_vocabulary_that_cannot_spell_the_form_is_an_error() -> None:
    class Poor:
        def vocabulary(self) -> Vocabulary:
            return Vocabulary((b"a", b"<", None), frozenset())

        def encode_plain(self, text: str) -> list[int]:
            return [0] * len(text)

    state = Compiler(Poor(), 3, [2]).begin(grammar_of("tables_otsl"))  # type: ignore[arg-type]
    state.accept(1)
    with pytest.raises(ConstraintError, match="no token can follow b'<'"):
        state.allowed([2])


def test_where_llguidance_gives_up_the_answer_does_not_end_as_if_it_were_whole() -> None:
    """A schema that demands text without end, which `grammar_for` would refuse."""
    endless = {"$defs": {"a": {"type": "object", "properties": {"x": {"$ref": "#/$defs/a"}}, "required": ["x"]}}}
    grammar = Grammar("kvp", schema=json.dumps({**endless, "$ref": "#/$defs/a"}))
    state = compiler("toy").begin(grammar)
    with pytest.raises(ConstraintError, match="llguidance gave up in the middle of an answer: .*limit"):
        for _ in range(20):
            for token in state.forced_tokens() or [int(np.flatnonzero(state.allowed())[0])]:
                state.accept(token)
    assert not state.is_final


# --- text that must come ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", TASKS)
def test_forced_tokens_are_those_that_the_tokenizer_writes_for_the_whole(kind: str, task: str) -> None:
    """Whatever comes next: tokens that follow are tried, and the tokenizer is asked for all of it."""
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
            continue  # the model wrote it in another way than the tokenizer would
        n_compared += 1
        allowed = [int(token) for token in np.flatnonzero(ahead.allowed([end_of_text(kind)]))]
        for token in rng.sample(allowed, min(len(allowed), 25)):
            whole = text + index.text(tokens) + index.pieces[token]
            try:
                found = encode(whole.decode())
            except UnicodeDecodeError:
                continue  # a part of a character
            if found[: len(so_far)] == so_far:  # or else a longer token would have begun before
                assert found[: len(so_far) + len(tokens)] == [*so_far, *tokens], whole
    assert n_forced if task != "chart2csv" else not n_forced
    assert n_compared or task in ("chart2csv", "tables_otsl")


def in_one_way(encode: Callable[[str], list[int]], so_far: list[int], text: bytes, demanded: bytes) -> bool:
    """Whether the tokenizer writes the text so far as it is, with what is demanded behind it."""
    return encode((text + demanded).decode())[: len(so_far)] == so_far


def after_tokens(kind: str, task: str, tokens: list[int]) -> GrammarState:
    state = compiler(kind).begin(grammar_of(task))
    for token in tokens:
        state.accept(token)
    return state


def alone_at_each_step(kind: str, task: str, so_far: list[int], text: bytes) -> bool:
    """Whether at each byte of `text` the mask holds only tokens that go on with it."""
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
    assert forced('{"name": "x", "n') == [b'"', b":"]  # a space before a number may be written in several ways
    assert forced('{"name": "x", "n": 1') == []
    otsl = grammar_of("tables_otsl")
    assert [pieces[t] for t in state_after("nano", otsl, "<otsl><ecel><nl><ecel>").forced_tokens()] == [b"<nl>"]
    html = grammar_of("tables_html")
    assert state_after("nano", html, "<table><tr><td></td></tr><tr><td>a").forced_tokens() == []
    cells = grammar_of("tables_json")
    size = '{"dimensions": {"rows": 1, "columns": 1, "header_rows": 1, "total_rows": 2'
    found = [pieces[t] for t in state_after("nano", cells, size).forced_tokens()]
    assert found == [b'}, "cells": [{"row": ', b"1", b', "col": ', b"1"]  # a longer piece begins with ', "colspan": '


def letters(*longer: str, added: tuple[str, ...] = ()) -> tuple[TokenIndex, Callable[[str], list[int]]]:
    """A tokenizer that takes the longest token it knows, added ones first, and its index."""
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
        (("ab", "bcd"), (), "", "abc", "d", ""),  # then ab is not even begun
        (("xa",), (), "x", "ab", "c", "ab"),  # said otherwise: by itself
        (("xa",), (), "x", "a", "c", "a"),
        ((), ("<t>",), "", "<t>", "a", "<t>"),
        ((">a",), ("<t>",), "", "<t>", "a", "<t>"),  # an added token is cut out first
        ((), ("<t>", "<t>a"), "", "<t>", "a", ""),  # unless a longer one begins there
        ((), ("<t>", "b<t>a"), "", "b<t>", "a", ""),
        ((), ("<t>", "t>a"), "", "<t>", "a", "<t>"),  # one that begins later comes too late
        ((), (), "", "a ", "b", "a"),  # white space before a word is split in its own way
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


# --- vocabularies ---


@pytest.fixture(scope="module")
def text_file(make_model: Callable[..., Path]) -> Path:
    return make_model(PRESETS["tiny"]) / "text-F32.gguf"


def test_the_vocabulary_is_the_same_from_tokenizer_json_and_from_llama_cpp(text_file: Path, tmp_path: Path) -> None:
    bare = copy_gguf(text_file, tmp_path / "text.gguf", without=["tokenizer.huggingface"])
    with GgufFile.open(text_file) as file, GgufFile.open(bare) as other:
        ours, theirs = load_tokenizer(file, text_file), load_tokenizer(other, bare)
    assert isinstance(ours, HfTokenizer) and isinstance(theirs, LlamaTokenizer)
    assert ours.vocabulary() == theirs.vocabulary()
    texts = {piece for piece in ours.vocabulary().pieces if piece}
    assert {b"<fcel>", b"<nl>", bytes([0xC3])} <= texts
    assert not {b"<|end_of_text|>", b"<image>", b"<|pad|>"} & texts
    for text in ("<otsl>a<|end_of_text|>", "<image>é"):
        assert ours.encode_plain(text) == theirs.encode_plain(text)
        assert b"".join(ours.vocabulary().pieces[t] or b"?" for t in ours.encode_plain(text)) == text.encode()
    assert ours.encode("<|end_of_text|>") != ours.encode_plain("<|end_of_text|>")
    theirs.close()


def test_another_kind_of_tokenizer_is_spelled_by_llama_cpp(text_file: Path) -> None:
    """tokenizer.json of a model whose pieces are characters, not bytes."""
    with GgufFile.open(text_file) as file:
        ours = load_tokenizer(file, text_file)
        assert isinstance(ours, HfTokenizer)
        source = json.loads(file["tokenizer.huggingface.json"])
    source["decoder"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    assert HfTokenizer(json.dumps(source), text_file, None).vocabulary() == ours.vocabulary()


# --- a model's answers ---


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path]) -> Iterator[granite4v.Model]:
    with granite4v.load(make_model(PRESETS["tiny"]), device="cpu", n_threads=1) as model:
        yield model


def masked_greedily(model: granite4v.Model, task: str, max_tokens: int) -> list[int]:
    """The likeliest of the tokens that can be tried without failing, over the full distribution, step by step."""
    matcher = own_matcher("toy", CLOSED)
    pieces, end, tokens = compiler("toy").index.pieces, end_of_text("toy"), list[int]()
    while len(tokens) < max_tokens:
        logits = model.score("What?", tokens=[*tokens, 0])[-1]
        if task == "kvp":
            allowed = [t for t in range(len(pieces)) if matcher.validate_tokens([t]) == 1]
        else:
            text = b"".join(pieces[t] for t in tokens)
            behind = advance(start(rule_of(task)), text)
            assert behind is not None
            allowed = [t for t, p in enumerate(pieces) if p and is_text(text + p) and advance(behind, p) is not None]
            allowed += [end] if behind.is_accepting and is_text(text + b" ") else []
        token = max(allowed, key=lambda t: (logits[t], -t))
        if token == end:
            break
        tokens.append(token)
        matcher.consume_token(token)
        if task == "kvp" and matcher.is_stopped():
            break
    return tokens


@pytest.mark.parametrize("task", TASKS)
def test_greedy_answers_are_those_of_masking_the_full_distribution(model: granite4v.Model, task: str) -> None:
    answer = model.generate("What?", max_tokens=200, constraint=grammar_of(task), fast_forward=False, repetition=False)
    assert answer.tokens[:30] == masked_greedily(model, task, 30)
    n_closing = len(compiler("toy").index.spell((answer.closing or "").encode()))
    assert answer.timings.n_forced <= n_closing + 1, "a character that was not whole belongs to the end"


def test_fast_forward_changes_the_tokens_and_not_the_text_that_is_forced(model: granite4v.Model) -> None:
    schema = {
        "type": "object",
        "properties": {name: {"enum": [1, 2]} for name in ("a_long_name", "another_name", "größe")},
        "required": ["a_long_name", "another_name", "größe"],
    }
    grammar = grammar_for("kvp", schema)
    slow = model.generate("What?", max_tokens=100, constraint=grammar, fast_forward=False)
    fast = model.generate("What?", max_tokens=100, constraint=grammar)
    for answer in (slow, fast):
        assert answer.finish_reason == "stop"
        assert list(json.loads(answer.text)) == list(schema["properties"])  # type: ignore[call-overload]
    assert fast.tokens == tokenizer("toy").encode_plain(fast.text)
    timings = fast.timings
    assert timings.n_forced > 15 and timings.n_generated == len(fast.tokens)
    assert timings.n_steps < len(fast.tokens) - timings.n_forced + 2
    assert slow.timings.n_steps >= len(slow.tokens) - 1


def test_forced_text_alone_costs_one_decode(model: granite4v.Model) -> None:
    grammar = grammar_for("kvp", {"const": {"answer": [1, 2, 3], "text": "for certain"}})
    answer = model.generate("What?", max_tokens=100, constraint=grammar)
    assert json.loads(answer.text) == {"answer": [1, 2, 3], "text": "for certain"}
    assert answer.finish_reason == "stop"
    assert answer.timings.n_forced == len(answer.tokens) and answer.timings.n_steps == 0
    cut = model.generate("What?", max_tokens=5, constraint=grammar)
    assert (cut.tokens, cut.finish_reason, cut.timings.n_forced) == (answer.tokens[:5], "length", 5)


def test_more_forced_tokens_than_a_batch_holds(model: granite4v.Model) -> None:
    grammar = grammar_for("kvp", {"const": [f"value {i}" for i in range(300)]})
    answer = model.generate("What?", max_tokens=4000, constraint=grammar, repetition=False)
    assert json.loads(answer.text) == [f"value {i}" for i in range(300)] and answer.finish_reason == "stop"


@pytest.mark.parametrize(
    "options", [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 5, "min_p": 0.1, "top_p": 0.9}]
)
def test_sampled_answers_keep_to_the_constraint(model: granite4v.Model, options: dict[str, Any]) -> None:
    grammar = grammar_for("kvp", {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3})
    found = {model.generate("What?", max_tokens=60, constraint=grammar, seed=s, **options).text for s in range(12)}
    assert all(set(json.loads(text)) <= {"a", "b"} for text in found) and len(found) > 2
    again = model.generate("What?", max_tokens=60, constraint=grammar, seed=3, repeat_penalty=1.3, **options)
    assert json.loads(again.text) is not None


def test_the_end_comes_only_where_the_answer_is_whole(model: granite4v.Model) -> None:
    """`stop` texts do end it anywhere; without a stop token it goes on as far as the form does."""
    grammar = grammar_for("kvp", {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]})
    endless = model.generate("What?", max_tokens=50, constraint=grammar, ignore_eos=True)
    assert (endless.text, endless.finish_reason) == ('{"a": 1}', "stop")
    cut = model.generate("What?", max_tokens=50, constraint=grammar, stop=[": 1"])
    assert (cut.text, cut.finish_reason) == ('{"a"', "stop")
    csv = model.generate("What?", max_tokens=25, constraint=grammar_of("chart2csv"), ignore_eos=True)
    assert csv.finish_reason == "length" and csv.closing == "" and 20 < len(csv.tokens) <= 25


def test_cancelling_a_constrained_answer_leaves_what_was_said(model: granite4v.Model) -> None:
    stop = threading.Event()
    stream = model.stream("What?", max_tokens=300, constraint=grammar_of("kvp"), cancel=stop.is_set)
    first = next(stream)
    stop.set()
    assert not "".join(stream)
    assert stream.answer.finish_reason == "cancelled" and stream.answer.text.startswith(first)
    assert compiler("toy").index.text(stream.answer.tokens).decode() == stream.answer.text
    other = model.stream("What?", max_tokens=300, constraint=grammar_of("kvp"))
    next(other)
    other.close()
    assert other.answer.finish_reason == "cancelled"


def test_two_constrained_answers_at_once_do_not_mix(model: granite4v.Model) -> None:
    tasks = ("kvp", "tables_otsl")
    alone = [model.generate("What?", max_tokens=20, constraint=grammar_of(task)).text for task in tasks]
    streams = [model.stream("What?", max_tokens=20, constraint=grammar_of(task)) for task in tasks]
    found = ["", ""]
    for _ in range(21):
        for i, stream in enumerate(streams):
            found[i] += next(stream, "")
    assert found == alone


def test_pictures_that_were_encoded_are_counted(model: granite4v.Model) -> None:
    model.clear_cache()
    one, two = noise_picture((150, 100), 1), noise_picture((150, 100), 2)
    counts = [
        model.generate("What?", pictures, max_tokens=1).timings.n_encoded
        for pictures in ([one], [one], [one, two], [two], [])
    ]
    assert counts == [1, 0, 1, 0, 0]


def test_a_grammar_that_llguidance_cannot_compile_costs_nothing(model: granite4v.Model) -> None:
    model.logits("What?")
    before = model.counters
    with pytest.raises(ConstraintError, match="uniqueItems"):
        model.generate("What?", constraint=Grammar("kvp", schema='{"type": "array", "uniqueItems": true}'))
    assert model.counters == before


# --- copies ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", TASKS)
def test_a_copy_goes_its_own_way(kind: str, task: str) -> None:
    """Drafted tokens are accepted on a copy: the state itself is the same before and after, and so is a copy of it."""
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
