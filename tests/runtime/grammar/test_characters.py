"""Tests of text in complete characters, compared with an llguidance matcher that is given every token."""

from __future__ import annotations

import random

import numpy as np
import pytest

from granite4v.runtime.grammar.characters import Characters
from granite4v.runtime.grammar.matcher import MatcherFactory
from tests.helpers.constrained import KINDS, compiler, end_of_text, tokenizer


def factory(kind: str) -> MatcherFactory:
    return MatcherFactory(compiler(kind).index, tokenizer(kind).encode_plain, end_of_text(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_what_may_come_is_what_llguidance_says(kind: str) -> None:
    pieces, matchers = compiler(kind).index.pieces, factory(kind)
    start, n_cut = Characters(matchers.of_text(), pieces), 0
    foreign = [token for token, piece in enumerate(pieces) if piece and max(piece) >= 0x80]
    for seed in range(40):
        rng, here, theirs = random.Random(seed), start, matchers.of_text()
        for _ in range(30):
            np.testing.assert_array_equal(here.mask, theirs.mask())
            assert here.is_complete == theirs.is_accepting
            n_cut += not here.is_complete
            tokens = np.flatnonzero(here.mask).tolist()
            if rng.random() < 0.7:  # prefers multi-byte characters, which few tokens belong to
                tokens = [token for token in foreign if here.mask[token]] or tokens
            token = rng.choice(tokens)
            here = here.after(token)
            theirs.accept(token)
    assert n_cut > 200


def test_a_token_that_cannot_come_is_an_error() -> None:
    index = compiler("toy").index
    start = Characters(factory("toy").of_text(), index.pieces)
    cut = start.after(index.byte_tokens[0xE2])
    for here, byte in ((start, 0x82), (start, 0x07), (cut, ord("a"))):
        with pytest.raises(ValueError, match="is not allowed here"):
            here.after(index.byte_tokens[byte])
    assert cut.after(index.byte_tokens[0x82]).after(index.byte_tokens[0xAC]) is start
