"""Constrained answers without a model: noise logits over the vocabularies of the random and the nano checkpoint, run
through the real generation loop."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from granite4v.runtime.answer import Answer
from granite4v.runtime.engine.sampler import Sampling
from granite4v.runtime.formats.task_grammar import grammar_for
from granite4v.runtime.grammar.grammar import Grammar
from granite4v.runtime.grammar.grammar_state import Compiler, GrammarState
from granite4v.runtime.prompt.tokenizer import HfTokenizer
from scripts.nano import language
from tests.helpers.drive import generate
from tests.toy import language as toy_language

KINDS = ("toy", "nano")  # 'toy': byte-level BPE with merges; 'nano': single bytes and whole pieces of the formats


def tokenizer_json(kind: str) -> str:
    """Returns the text of the checkpoint's tokenizer.json."""
    return json.dumps(checkpoint(kind).tokenizer_json)


@functools.cache
def tokenizer(kind: str) -> HfTokenizer:
    return HfTokenizer(tokenizer_json(kind), Path(kind), toy_language.END_OF_TEXT)


@functools.cache
def end_of_text(kind: str) -> int:
    return checkpoint(kind).end_of_text_id


@functools.cache
def compiler(kind: str) -> Compiler:
    return Compiler(tokenizer(kind), checkpoint(kind).n_vocab, [end_of_text(kind)])


def checkpoint(kind: str) -> toy_language.ToyTokenizer:
    return toy_language.build_tokenizer() if kind == "toy" else language.build_tokenizer()


# Beginnings of the tokens that bring an answer closer to its end.
CLOSING = {
    "tables_otsl": (b"<", b"/", b"nl", b">"),
    "tables_html": (b"<", b"/", b">", b'">'),
    "tables_json": (b'"', b"}", b"]", b","),
    "chart2csv": (b",", b"\n"),
    "kvp": (b'"', b"}", b"]", b","),
}


class Noise:
    """A source of noise logits, deterministic in the seed and the answer so far. The longer the answer, the likelier
    are tokens that end it."""

    def __init__(self, kind: str, seed: int, task: str, patience: int, closing: tuple[bytes, ...] = ()) -> None:
        """`patience`: the number of tokens after which the bias towards ending has grown by half; `closing`: like the
        values of CLOSING, in place of that for `task`."""
        self._seed, self._patience, self._end = seed, patience, end_of_text(kind)
        pieces = compiler(kind).index.pieces
        self._closing = np.fromiter((piece.startswith(closing or CLOSING[task]) for piece in pieces), dtype=np.float32)
        if task == "tables_json":  # small numbers
            large = tuple(b"%d" % digit for digit in range(3, 10))
            self._closing -= np.fromiter((piece.startswith(large) for piece in pieces), dtype=bool)

    def first(self) -> np.ndarray:
        return self.next(())

    def next(self, tokens: Sequence[int]) -> np.ndarray:
        rng = np.random.default_rng([self._seed, len(tokens), *tokens[-3:]])
        haste = np.float32(2 + len(tokens) / self._patience)
        logits = rng.standard_normal(len(self._closing), dtype=np.float32) * 2 + self._closing * haste
        logits[self._end] += haste
        return logits


def grammar_of(task: str, schema: object = None) -> Grammar:
    """Returns the grammar of a task that has one."""
    grammar = grammar_for(task, schema)
    assert grammar is not None
    return grammar


def generated(
    kind: str,
    grammar: Grammar,
    seed: int,
    *,
    max_tokens: int = 250,
    temperature: float = 1.0,
    fast_forward: bool = True,
    patience: int = 30,
    closing: tuple[bytes, ...] = (),
) -> Answer:
    """Generates one answer under a grammar from noise logits."""
    answer = Answer()
    pieces = generate(
        Noise(kind, seed, grammar.task, patience, closing),
        answer,
        tokenizer(kind).text_stream(),
        sampling=Sampling(temperature=temperature, seed=seed),
        stop_tokens=frozenset({end_of_text(kind)}),
        max_tokens=max_tokens,
        cancelled=lambda: False,
        grammar=compiler(kind).begin(grammar),
        fast_forward=fast_forward,
    )
    assert "".join(pieces) == answer.text
    return answer


def ended(kind: str, grammar: Grammar, seeds: range, **options: Any) -> Iterator[str]:
    """Yields the distinct texts of noise answers that ended by themselves."""
    answers = [generated(kind, grammar, seed, fast_forward=seed % 2 == 0, **options) for seed in seeds]
    texts = {answer.text for answer in answers if answer.finish_reason == "stop"}
    assert len(texts) >= 6
    assert {answer.finish_reason for answer in answers} <= {"stop", "length"}
    yield from texts


def state_after(kind: str, grammar: Grammar, text: str) -> GrammarState:
    """Returns the grammar state after `text`; fails if the grammar refuses any of its canonical tokens."""
    state = compiler(kind).begin(grammar)
    for token in tokenizer(kind).encode_plain(text):
        assert state.allowed()[token], f"{compiler(kind).index.pieces[token]!r} is refused in {text!r}"
        state.accept(token)
    return state


def allows(kind: str, grammar: Grammar, text: str) -> bool:
    """Whether the grammar accepts a text, fed token by token, as a complete answer."""
    state = compiler(kind).begin(grammar)
    for token in tokenizer(kind).encode_plain(text):
        if not state.allowed([end_of_text(kind)])[token]:
            return False
        state.accept(token)
    return state.is_accepting
