"""The state of one answer in a grammar that was compiled for a vocabulary: which tokens may come next, which must, and
which would end the answer.

JSON schemas are llguidance's business; table formats are automata (see `automaton`). A mask holds every token after
which the answer can still be completed: how text is split into tokens is left to the model.
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

    `copy` costs a few microseconds and `accept` changes no other copy, so tokens can be tried on a copy (drafts) and
    taken back by dropping it.
    """

    def __init__(self, tracker: Tracker, compiler: Compiler, generated: list[int]) -> None:
        self._tracker, self._compiler, self._generated = tracker, compiler, generated

    def copy(self) -> GrammarState:
        return GrammarState(self._tracker.copy(), self._compiler, list(self._generated))

    @property
    def is_accepting(self) -> bool:
        """Whether what was generated is a complete answer."""
        return self._tracker.is_accepting

    @property
    def is_final(self) -> bool:
        """Whether nothing can follow."""
        return self._tracker.is_final

    @property
    def has_quick_endings(self) -> bool:
        """Whether `ending` takes a small part of the time of a token."""
        return self._tracker.has_quick_endings

    def allowed(self, stop_tokens: Collection[int] = ()) -> np.ndarray:
        """The tokens that may come next, with `stop_tokens` where the answer may end; a new array, bool `(n_vocab,)`.

        Raises ConstraintError where there is none: the vocabulary cannot spell what the grammar demands.
        """
        mask = self._tracker.mask()
        if self.is_accepting:
            mask[[token for token in stop_tokens if token < len(mask)]] = True
        if not mask.any():
            text = self._compiler.index.text(self._generated[-20:])
            raise ConstraintError(
                f"no token can follow {text!r}; the model's vocabulary cannot spell what the grammar demands. Use "
                "--unconstrained."
            )
        return mask

    def accept(self, token: int) -> None:
        """Moves on by a token that is allowed; ValueError for any other."""
        self._tracker.accept(token)
        self._generated.append(token)

    def forced_text(self) -> bytes:
        """The text that must come next, in complete characters; a long one is cut."""
        return _complete_characters(self._tracker.forced_text())

    def forced_tokens(self) -> list[int]:
        """The next tokens where there is only one text, as the tokenizer writes it; they are not accepted yet.

        Only those that stay the same whatever follows; often none.
        """
        text = self.forced_text()
        if not text:
            return []
        compiler = self._compiler
        following = self._tracker.following(text)
        return forced_tokens(compiler.index, compiler.encode, self._generated, text, following)

    def ending(self, most: int, token: int | None = None) -> list[int] | None:
        """At most `most` tokens that complete what was generated, or what was generated and `token`.

        None where that takes more, or no such tokens were found.
        """
        try:
            return self._tracker.ending(most, token)
        except ConstraintError:  # one of llguidance's limits, which the answer itself has not met
            return None


class Compiler:
    """Compiles grammars for one vocabulary. `n_vocab` is the number of logits, `stop_tokens` end answers."""

    def __init__(self, tokenizer: Tokenizer, n_vocab: int, stop_tokens: Collection[int]) -> None:
        self.encode = tokenizer.encode_plain
        self.index = TokenIndex(tokenizer.vocabulary(), n_vocab)
        # llguidance needs to know one end token; masks leave it out, and `allowed` adds all stop tokens
        self._matchers = MatcherFactory(self.index, self.encode, min(stop_tokens))
        self._masks: dict[Rule, AutomatonMasks] = {}
        self._characters: Characters | None = None

    def begin(self, grammar: Grammar) -> GrammarState:
        """The state at the beginning of an answer. Raises ConstraintError for a grammar llguidance cannot compile."""
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
    """The text without an incomplete character at its end; one that was cut at its beginning stays."""
    decoder = codecs.getincrementaldecoder("utf-8")("ignore")
    decoder.decode(text)
    return text[: len(text) - len(decoder.getstate()[0])]
