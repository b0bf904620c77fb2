"""Tracks one answer in a grammar compiled for a vocabulary: which tokens may come next, which must, and which would
complete the answer.

llguidance handles JSON Schemas; table formats are automata (see `automaton`). A token mask allows every token after
which the answer can still be completed: the model chooses how to split the text into tokens.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection

import numpy as np

from granite4v.errors import ConstraintError
from granite4v.runtime.grammar.automaton import Rule, start
from granite4v.runtime.grammar.automaton_masks import AutomatonMasks
from granite4v.runtime.grammar.automaton_tracker import AutomatonTracker
from granite4v.runtime.grammar.characters import Characters
from granite4v.runtime.grammar.forced_tokens import forced_tokens
from granite4v.runtime.grammar.grammar import Grammar
from granite4v.runtime.grammar.matcher import MatcherFactory
from granite4v.runtime.grammar.schema_tracker import SchemaTracker
from granite4v.runtime.grammar.token_index import TokenIndex
from granite4v.runtime.grammar.tracker import Tracker
from granite4v.runtime.prompt.tokenizer import Tokenizer


class GrammarState:
    """Tracks the position of one answer in a compiled grammar.

    `copy` costs a few microseconds and `accept` changes no other copy, so draft tokens can be tried on a copy and
    rolled back by dropping it.
    """

    def __init__(self, tracker: Tracker, compiler: Compiler, generated: list[int]) -> None:
        self._tracker, self._compiler, self._generated = tracker, compiler, generated

    def copy(self) -> GrammarState:
        return GrammarState(self._tracker.copy(), self._compiler, list(self._generated))

    @property
    def is_accepting(self) -> bool:
        """Whether the tokens so far are a complete answer."""
        return self._tracker.is_accepting

    @property
    def is_final(self) -> bool:
        """Whether nothing can follow."""
        return self._tracker.is_final

    @property
    def has_quick_endings(self) -> bool:
        """Whether `ending` takes a small fraction of the time that a token takes."""
        return self._tracker.has_quick_endings

    def allowed(self, stop_tokens: Collection[int] = ()) -> np.ndarray:
        """The token mask: which tokens may come next; a new array, bool `(n_vocab,)`.

        Includes `stop_tokens` if the answer may end here. Raises ConstraintError if no token is allowed: the vocabulary
        cannot spell what the grammar demands.
        """
        mask = self._tracker.mask()
        if self.is_accepting:
            mask[[token for token in stop_tokens if token < len(mask)]] = True
        if not mask.any():
            text = self._compiler.index.text(self._generated[-20:])
            raise ConstraintError(
                f"no token can follow {text!r}; the model's vocabulary cannot spell what the grammar demands.",
                "Use --unconstrained.",
            )
        return mask

    def accept(self, token: int) -> None:
        """Advances by one token. Raises ValueError for a token that is not allowed."""
        self._tracker.accept(token)
        self._generated.append(token)

    def forced_text(self) -> bytes:
        """The text that must come next, in complete characters; long text is cut short."""
        return _complete_characters(self._tracker.forced_text())

    def forced_tokens(self) -> list[int]:
        """The tokens, as the tokenizer writes them, of the text that must come next; they are not accepted yet.

        Only those that stay the same whatever text follows; often none.
        """
        text = self.forced_text()
        if not text:
            return []
        compiler = self._compiler
        following = self._tracker.following(text)
        return forced_tokens(compiler.index, compiler.encode, self._generated, text, following)

    def ending(self, most: int, token: int | None = None) -> list[int] | None:
        """Finds at most `most` tokens that complete the answer so far, or the answer so far plus `token`.

        None if it takes more tokens than that, or if none were found.
        """
        try:
            return self._tracker.ending(most, token)
        except ConstraintError:  # the search hit one of llguidance's limits; the answer itself has not
            return None


class Compiler:
    """Compiles grammars for one vocabulary. `n_vocab` is the number of logits; `stop_tokens` end an answer."""

    def __init__(self, tokenizer: Tokenizer, n_vocab: int, stop_tokens: Collection[int]) -> None:
        self.encode = tokenizer.encode_plain
        self.index = TokenIndex(tokenizer.vocabulary(), n_vocab)
        # llguidance needs to know one end token; masks exclude it, and `allowed` adds all stop tokens
        self._matchers = MatcherFactory(self.index, self.encode, min(stop_tokens))
        self._masks: dict[Rule, AutomatonMasks] = {}
        self._characters: Characters | None = None

    def begin(self, grammar: Grammar) -> GrammarState:
        """The state at the start of an answer. Raises ConstraintError for a grammar that llguidance cannot compile."""
        return GrammarState(self._tracker(grammar), self, [])

    def _tracker(self, grammar: Grammar) -> Tracker:
        if grammar.rule is None:
            matcher = self._matchers.of_schema(grammar.schema)
            return SchemaTracker(matcher, self.index, self._matchers)
        masks = self._masks.setdefault(grammar.rule, AutomatonMasks(self.index))
        if self._characters is None:
            self._characters = Characters(self._matchers.of_text(), self.index.pieces)
        return AutomatonTracker(start(grammar.rule), masks, self._characters)


def _complete_characters(text: bytes) -> bytes:
    """Drops an incomplete character from the end of the text; one that is incomplete at the start is kept."""
    decoder = codecs.getincrementaldecoder("utf-8")("ignore")
    decoder.decode(text)
    return text[: len(text) - len(decoder.getstate()[0])]
