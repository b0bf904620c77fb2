"""What may be said next, token by token: a grammar compiled for a vocabulary, and its walk through one answer.

JSON schemas are llguidance's. Forms that count (see `form`) are walked here, with llguidance to keep to whole
characters. A mask holds every token after which the answer can still be finished; how text is cut into tokens is
left to the model.
"""

from __future__ import annotations

import codecs
import functools
from collections import Counter, OrderedDict
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Protocol

from granite4v.errors import ConstraintError
from granite4v.runtime.grammar.automaton import Cursor, Rule, advance, ending, forced, next_bytes, start
from granite4v.runtime.grammar.automaton_masks import FormMasks
from granite4v.runtime.grammar.ending import JsonPlace
from granite4v.runtime.grammar.forced_tokens import canonical_tokens
from granite4v.runtime.grammar.grammar import Grammar
from granite4v.runtime.grammar.grammar_text import lark_grammar, limits
from granite4v.runtime.grammar.token_index import Lexicon
from granite4v.runtime.prompt.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np

MOST_FORCED_BYTES = 4096  # of one run; a schema can demand text without end
_KEPT_GRAMMARS = 16
# no control characters but tab and line feed, no byte order mark
_ANY_TEXT = (
    '%llguidance {"no_forcing": true}\n'
    r"start: /[^\x00-\x08\x0b-\x1f\x7f-\x9f\x{feff}\x{fffe}\x{ffff}]*/"
)


class Guide:
    """The way of one answer through its grammar."""

    def __init__(self, walk: _Walk, compiler: Compiler) -> None:
        self._walk, self._compiler = walk, compiler
        self._said: list[int] = []

    @property
    def may_end(self) -> bool:
        """Whether what was said is a whole answer."""
        return self._walk.may_end

    @property
    def is_over(self) -> bool:
        """Whether nothing can be added any more."""
        return self._walk.is_over

    @property
    def has_quick_endings(self) -> bool:
        """Whether `ending` takes a small part of the time of a token."""
        return isinstance(self._walk, _FormWalk)

    def allowed(self, stop_tokens: Collection[int] = ()) -> np.ndarray:
        """What may be said next, bool `(n_vocab,)`; of `stop_tokens` where the answer may end.

        Raises ConstraintError where there is nothing: the vocabulary cannot spell what the grammar demands.
        """
        mask = self._walk.mask()
        if self.may_end:
            mask[[token for token in stop_tokens if token < len(mask)]] = True
        if not mask.any():
            raise ConstraintError(
                f"no token can follow {self._compiler.lexicon.text(self._said[-20:])!r}; the model's vocabulary cannot "
                "spell what the form demands. Use --unconstrained."
            )
        return mask

    def accept(self, token: int) -> None:
        """Goes on behind a token that is allowed; ValueError for any other."""
        self._walk.accept(token)
        self._said.append(token)

    def forced_tokens(self) -> list[int]:
        """The next tokens where there is one choice of text, as the tokenizer writes them; not accepted yet.

        Only those that what follows cannot change; often none.
        """
        text = _whole_characters(self._walk.forced())
        if not text:
            return []
        compiler = self._compiler
        following = self._walk.following(text)
        return canonical_tokens(compiler.lexicon, compiler.encode, self._said, text, following)

    def ending(self, most: int, token: int | None = None) -> list[int] | None:
        """At most so many tokens that make what was said a whole answer, or what was said and `token`.

        None where that takes more, or no such tokens were found.
        """
        try:
            return self._walk.ending(most, token)
        except ConstraintError:  # one of llguidance's limits, which the answer itself has not met
            return None


class _Walk(Protocol):
    """A grammar and how far an answer has come in it; `mask` is a new array."""

    @property
    def may_end(self) -> bool: ...

    @property
    def is_over(self) -> bool: ...

    def mask(self) -> np.ndarray: ...

    def accept(self, token: int) -> None: ...

    def forced(self) -> bytes: ...

    def following(self, text: bytes) -> Collection[int]:
        """The bytes that may come behind `text`, which is forced."""
        ...

    def ending(self, most: int, token: int | None) -> list[int] | None: ...


class Compiler:
    """Makes guides for one vocabulary. `n_vocab` is the number of logits, `stop_tokens` end answers."""

    def __init__(self, tokenizer: Tokenizer, n_vocab: int, stop_tokens: Collection[int]) -> None:
        self.encode = tokenizer.encode_plain
        self.lexicon = Lexicon(tokenizer.vocabulary(), n_vocab)
        self.end = min(stop_tokens)  # what llguidance knows as the end; masks do without it
        self._masks: dict[Rule, FormMasks] = {}
        self._matchers: OrderedDict[str, Any] = OrderedDict()

    def begin(self, grammar: Grammar) -> Guide:
        """A guide at the beginning of an answer. Raises ConstraintError for a grammar llguidance cannot compile."""
        if grammar.rule is not None:
            masks = self._masks.setdefault(grammar.rule, FormMasks(self.lexicon))
            walk: _Walk = _FormWalk(grammar.rule, masks, self._matcher(_ANY_TEXT), self.end)
        else:
            walk = _SchemaWalk(self._matcher(lark_grammar(grammar.schema)), self)
        return Guide(walk, self)

    def _matcher(self, grammar: str) -> Any:
        """A fresh matcher; compiled grammars are kept."""
        from llguidance import LLMatcher

        if grammar not in self._matchers:
            matcher = LLMatcher(self.ll_tokenizer, grammar, log_level=0, limits=limits())
            if matcher.is_error():
                raise ConstraintError(
                    f"llguidance cannot compile the grammar: {_reason(matcher)}. Use --unconstrained."
                )
            self._matchers[grammar] = matcher
            while len(self._matchers) > _KEPT_GRAMMARS:
                self._matchers.popitem(last=False)
        self._matchers.move_to_end(grammar)
        return self._matchers[grammar].deep_copy()

    @functools.cached_property
    def ll_tokenizer(self) -> Any:
        from llguidance import LLTokenizer, TokenizerWrapper

        return LLTokenizer(TokenizerWrapper(_TokenizerForLlguidance(self)))


class _TokenizerForLlguidance:
    """What `llguidance.TokenizerWrapper` asks for. A token without text is one that it never allows."""

    def __init__(self, compiler: Compiler) -> None:
        self.eos_token_id, self.bos_token_id = compiler.end, None
        self.tokens = list(compiler.lexicon.pieces)
        self.special_token_ids = [compiler.end]
        self._encode = compiler.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


class _SchemaWalk:
    """llguidance all the way."""

    def __init__(self, matcher: Any, compiler: Compiler) -> None:
        self._matcher, self._compiler = matcher, compiler
        self._place = JsonPlace()

    @property
    def may_end(self) -> bool:
        return bool(self._matcher.is_accepting())

    @property
    def is_over(self) -> bool:
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    def mask(self) -> np.ndarray:
        return _mask_of(self._matcher, self._compiler.lexicon.n_vocab, self._compiler.end)

    def accept(self, token: int) -> None:
        _consume(self._matcher, token)
        self._place = self._place.behind(self._compiler.lexicon.pieces[token])

    def forced(self) -> bytes:
        text = self._matcher.compute_ff_bytes()
        _check(self._matcher)
        return bytes(text[:MOST_FORCED_BYTES])

    def following(self, text: bytes) -> Collection[int]:
        import numpy as np

        ahead, lexicon = self._matcher.deep_copy(), self._compiler.lexicon
        tokens = self._compiler.ll_tokenizer.tokenize_bytes(text)
        if ahead.try_consume_tokens(tokens) != len(tokens):
            return range(256)
        mask = _mask_of(ahead, lexicon.n_vocab, self._compiler.end)
        return np.flatnonzero(np.bincount(lexicon.first_byte[mask])).tolist()

    def ending(self, most: int, token: int | None) -> list[int] | None:
        ahead, place, lexicon = self._matcher.deep_copy(), self._place, self._compiler.lexicon
        if token is not None:
            _consume(ahead, token)
            place = place.behind(lexicon.pieces[token])
        tokens: list[int] = []
        taken: Counter[int] = Counter()
        while not ahead.is_accepting():
            text = bytes(ahead.compute_ff_bytes())
            if not lexicon.spell(text):
                mask = _mask_of(ahead, lexicon.n_vocab, self._compiler.end)
                allowed = {byte for byte, of_byte in lexicon.of_byte.items() if mask[of_byte]}
                if not allowed:
                    return None
                text = bytes((place.soonest(allowed, taken),))
                taken.update(text)
            new = lexicon.spell(text)
            if len(tokens) + len(new) > most or ahead.try_consume_tokens(new) != len(new):
                return None
            tokens += new
            place = place.behind(text)
        return tokens


class _FormWalk:
    """A form for the structure, llguidance for the characters."""

    def __init__(self, rule: Rule, masks: FormMasks, characters: Any, end: int) -> None:
        self._cursor, self._masks, self._characters, self._end = start(rule), masks, characters, end
        self._endings: dict[Cursor, list[bytes]] = {}  # of the last cursor, which text leaves as it was

    @property
    def may_end(self) -> bool:
        return self._cursor.may_end and bool(self._characters.is_accepting())

    @property
    def is_over(self) -> bool:
        return self._cursor.is_over

    def mask(self) -> np.ndarray:
        lexicon = self._masks.lexicon
        return self._masks.of(self._cursor) & _mask_of(self._characters, lexicon.n_vocab, self._end)

    def accept(self, token: int) -> None:
        lexicon = self._masks.lexicon
        following = advance(self._cursor, lexicon.pieces[token])
        if following is None or not lexicon.pieces[token]:
            raise ValueError(f"token {token} ({lexicon.pieces[token]!r}) is not allowed here")
        _consume(self._characters, token)
        self._cursor = following

    def forced(self) -> bytes:
        return forced(self._cursor, MOST_FORCED_BYTES)

    def following(self, text: bytes) -> Collection[int]:
        behind = advance(self._cursor, text)
        assert behind is not None
        return next_bytes(behind)

    def ending(self, most: int, token: int | None) -> list[int] | None:
        cursor, characters, lexicon = self._cursor, self._characters, self._masks.lexicon
        if token is not None:
            following = advance(cursor, lexicon.pieces[token])
            assert following is not None
            cursor, characters = following, characters.deep_copy()
            _consume(characters, token)
        begun: list[bytes] = []
        if not characters.is_accepting():  # inside a character
            characters = characters.deep_copy()
        while not characters.is_accepting():
            mask = _mask_of(characters, lexicon.n_vocab, self._end)
            byte = next((byte for byte, of_byte in lexicon.of_byte.items() if mask[of_byte]), None)
            following = None if byte is None else advance(cursor, bytes((byte,)))
            if byte is None or following is None or len(begun) == 3:
                return None
            _consume(characters, lexicon.of_byte[byte])
            begun.append(bytes((byte,)))
            cursor = following
        pieces = self._endings.get(cursor) or ending(cursor, most)
        if pieces is None:
            return None
        self._endings = {cursor: pieces}
        spelled = [lexicon.spell(piece) for piece in (*begun, *pieces)]
        tokens = [token for piece in spelled for token in piece]
        return tokens if all(spelled) and len(tokens) <= most else None


def _mask_of(matcher: Any, n_vocab: int, end: int) -> np.ndarray:
    """llguidance's mask as bool `(n_vocab,)`, without its `end`."""
    import numpy as np

    packed = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
    _check(matcher)
    mask = np.unpackbits(packed, count=n_vocab, bitorder="little").view(bool)
    mask[end] = False
    return mask


def _consume(matcher: Any, token: int) -> None:
    if not matcher.consume_token(token):
        if "limit" in _reason(matcher):
            _check(matcher)
        raise ValueError(f"token {token} is not allowed here: {_reason(matcher)}")


def _check(matcher: Any) -> None:
    """Raises ConstraintError when llguidance ran into one of its limits: its masks hold the end alone then."""
    if matcher.is_error():
        raise ConstraintError(
            f"llguidance gave up in the middle of an answer: {_reason(matcher)}. Use --unconstrained."
        )


def _reason(matcher: Any) -> str:
    """What llguidance says first; the state of its parser follows."""
    return str(matcher.get_error()).split("\n<state>")[0].strip()


def _whole_characters(text: bytes) -> bytes:
    """The text without the beginning of a character at its end; what is cut at its front stays."""
    decoder = codecs.getincrementaldecoder("utf-8")("ignore")
    decoder.decode(text)
    return text[: len(text) - len(decoder.getstate()[0])]
