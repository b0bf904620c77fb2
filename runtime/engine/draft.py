"""Drafts tokens by lookup: text that the answer, its prompt or another answer has had before.

A drafter follows every text that the answer may repeat with a cursor. From each token of the answer it learns how often
such cursors are right, whether or not their drafts are used, so a wrong estimate corrects itself. It knows only tokens:
no grammar, no logits, no model.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from typing import Literal, NamedTuple, Protocol

# relation of a text to the answer: its own beginning, its prompt, text that may occur in it, the answer to the same
# question about something else, the expected answer except for errors
Kind = Literal["own", "prompt", "piece", "answer", "predicted"]

MOST_ANSWERS = 4
_END = -1  # separates pieces; equals no token
_LONGEST = 32  # most tokens compared backwards
_MOST_PLACES = 8  # latest places kept for each pair of tokens
_LEAST_CHANCE = 0.05  # minimum chance of a draft's last token


class Draft(NamedTuple):
    """Tokens that may come next, and for each the estimated chance that it and all before it are right
    (non-increasing)."""

    tokens: tuple[int, ...] = ()
    chances: tuple[float, ...] = ()


class DraftSource:
    """Token sequences that answers may repeat, shared by any number of requests and threads.

    A request uses what was added before it began. The size is bounded: the oldest pieces are dropped when there are
    more than `most_tokens` tokens, the oldest answers when there are more than `MOST_ANSWERS`. `chances`: what requests
    have learned about drafts; a request continues with those of its first source.
    """

    def __init__(self, most_tokens: int = 1 << 14) -> None:
        self._most_tokens, self._lock = most_tokens, threading.Lock()
        self._pieces: list[tuple[int, ...]] = []
        self._pool = IndexedText()
        self._answers: tuple[IndexedText, ...] = ()
        self._predicted: tuple[IndexedText, ...] = ()
        self.chances = Chances()

    def add(self, tokens: SequenceOf[int]) -> None:
        """Adds text that may occur anywhere in an answer."""
        piece = tuple(tokens)[: self._most_tokens // 2]
        with self._lock:
            if len(self._pool.tokens) + len(piece) >= self._most_tokens:
                n_left, pieces = self._most_tokens // 2 - len(piece), self._pieces
                self._pieces, self._pool = [], IndexedText()
                while pieces and (n_left := n_left - len(pieces[-1]) - 1) >= 0:
                    self._pieces.insert(0, pieces.pop())
                for kept in self._pieces:
                    self._pool.extend((*kept, _END))
            self._pieces.append(piece)
            self._pool.extend((*piece, _END))

    def add_answer(self, tokens: SequenceOf[int]) -> None:
        """Adds a complete answer that others may resemble from their first token on, such as one about another page."""
        with self._lock:
            self._answers = (*self._answers[1 - MOST_ANSWERS :], IndexedText(tokens[: self._most_tokens]))

    def predict(self, tokens: SequenceOf[int]) -> None:
        """Sets the expected complete answer, which may contain errors."""
        with self._lock:
            self._predicted = (IndexedText(tokens),)

    def cursors(self) -> list[_Cursor]:
        with self._lock:
            return [
                _Lookup("piece", self._pool),
                *(_Follower("answer", text) for text in self._answers),
                *(_Follower("predicted", text) for text in self._predicted),
            ]


class IndexedText:
    """Tokens that grow at the end, with an index of where pairs and fours of them occur. One thread extends it, any may
    read."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self.tokens: list[int] = []
        # keyed by hash, as tuples take three times the memory; matches are compared token by token anyway
        self._pairs: dict[int, tuple[int, ...]] = {}  # the latest places right after each pair
        self._fours: dict[int, int] = {}
        self._firsts: dict[int, int] = {}  # place after the first token of a piece
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        known = self.tokens
        for token in tokens:
            known.append(token)
            place = len(known)
            if token == _END:
                continue
            if place == 1 or known[place - 2] == _END:
                self._firsts[token] = place
                continue
            pair = hash((known[place - 2], token))
            self._pairs[pair] = (*self._pairs.get(pair, ())[1 - _MOST_PLACES :], place)
            if place >= 4:
                self._fours[hash(tuple(known[place - 4 :]))] = place

    def at(self, place: int) -> int:
        """The token at a place; after the last one, a value that equals no token."""
        return self.tokens[place] if place < len(self.tokens) else _END

    def find(self, history: SequenceOf[int]) -> tuple[int, int]:
        """Finds the longest occurrence of the end of `history`, the latest among equals. Returns the place after it,
        and its length.

        At least two tokens must agree, or one at the beginning of a piece; otherwise (0, 0). For example, in the tokens
        5 6 7 8 6 7 9 the history 1 6 7 is found at places 3 and 6, both with length 2; (6, 2) is returned.
        """
        places = self._pairs.get(hash(tuple(history[-2:])), ())
        four = self._fours.get(hash(tuple(history[-4:])))
        if four is not None:
            places = (*places, four)
        found = max(((self.n_alike(place, history), place) for place in places), default=(0, 0))
        if found[0] < 2:
            place = self._firsts.get(history[-1], 0)
            return place, min(place, 1)
        return found[1], found[0]

    def n_alike(self, place: int, history: SequenceOf[int]) -> int:
        """How many tokens right before `place` equal the last ones of `history`, up to `_LONGEST`."""
        tokens, n = self.tokens, 0
        most = min(place, len(history), _LONGEST)
        while n < most and tokens[place - 1 - n] == history[-1 - n]:
            n += 1
        return n


class _Cursor(Protocol):
    """A position in a text where the answer may be: `place` is that of the next token, and `n_alike` tokens before it
    agree."""

    kind: Kind
    text: IndexedText
    place: int
    n_alike: int

    @property
    def is_placed(self) -> bool:
        """Whether `place` is meaningful."""
        ...

    def move(self, history: SequenceOf[int]) -> None:
        """Updates the position after a new token, the last of `history`."""
        ...


class _Lookup:
    """Moves to the longest repetition of the answer's end, wherever it is in the text."""

    def __init__(self, kind: Kind, text: IndexedText) -> None:
        self.kind, self.text, self.place, self.n_alike = kind, text, 0, 0

    @property
    def is_placed(self) -> bool:
        return self.n_alike > 0

    def move(self, history: SequenceOf[int]) -> None:
        # as long as this place agrees, no other one can match more tokens
        if self.is_placed and self.text.at(self.place) == history[-1]:
            self.place += 1
            self.n_alike += 1
        else:
            self.place, self.n_alike = self.text.find(history)


class _Follower:
    """Follows the answer through a text that should resemble it from beginning to end.

    Where the two differ, it continues as if one token were replaced, until later tokens show where the answer really
    is: at the matching place nearest to where they parted, because `</td><td>` occurs between any two cells. Text
    `a b c d e f`, answer `a b X d`: after X the cursor is at d, as if c were replaced; after d it is at e, with one
    token that agrees.
    """

    _BEHIND, _AHEAD = 8, 64  # search range, in tokens
    _LOST = 4  # mismatched tokens after which the complete text is searched
    is_placed = True

    def __init__(self, kind: Kind, text: IndexedText) -> None:
        self.kind, self.text, self.place, self.n_alike = kind, text, 0, 0
        self._n_lost, self._parting = 0, 0  # tokens since the texts parted, and the place of the first of them

    def move(self, history: SequenceOf[int]) -> None:
        agrees = self.text.at(self.place) == history[-1]
        self.place = min(self.place + 1, len(self.text.tokens))
        if agrees:
            self.n_alike += 1
            self._n_lost = 0
            return
        if not self._n_lost:
            self._parting = self.place - 1
        self.n_alike = 0
        self._n_lost += 1
        place, n_alike = self._nearby(history) if self._n_lost < self._AHEAD else (0, 0)
        if self._n_lost > self._LOST and n_alike < self._LOST:
            place, n_alike = max((place, n_alike), self.text.find(history), key=lambda found: found[1])
        if n_alike > 1 or (n_alike == 1 and abs(place - self.place) <= 2):
            self.place, self.n_alike, self._n_lost = place, n_alike, 0

    def _nearby(self, history: SequenceOf[int]) -> tuple[int, int]:
        """Returns the best place near where the texts parted, and how many tokens before it agree."""
        best, found = 0.0, (0, 0)
        for place in _places_behind(
            history[-1], self.text.tokens, self._parting - self._BEHIND, self._parting + self._AHEAD
        ):
            n_alike = self.text.n_alike(place, history)
            if (score := n_alike - abs(place - n_alike - self._parting) / self._AHEAD) > best:
                best, found = score, (place, n_alike)
        return found


def _places_behind(token: int, tokens: list[int], start: int, end: int) -> Iterator[int]:
    place = max(0, start)
    with contextlib.suppress(ValueError):
        while True:
            place = tokens.index(token, place, end) + 1  # many times faster than a loop
            yield place


_CLASSES = (0, 1, 2, 3, 3, *4 * (4,), *8 * (5,), 6)  # class by number of tokens that agree; the last is for all above
# initial chance of the next token by class
_PRIORS: dict[Kind, tuple[float, ...]] = {
    "own":       (0.01, 0.1, 0.4, 0.5, 0.6, 0.75, 0.85),
    "prompt":    (0.01, 0.1, 0.3, 0.5, 0.7, 0.80, 0.90),
    "piece":     (0.01, 0.2, 0.4, 0.5, 0.7, 0.80, 0.90),
    "answer":    (0.10, 0.2, 0.4, 0.5, 0.7, 0.80, 0.90),
    "predicted": (0.50, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98),
}  # fmt: skip


class Chances:
    """Estimates how likely a cursor's next token is right: a logistic regression on the kind of its text, the number of
    matching tokens before it, and the token itself (structure repeats, numbers do not), trained on every token."""

    _RATE, _TOKEN_RATE = 0.15, 0.4  # learning rates of classes and of tokens
    _MOST_TOKENS = 1 << 14  # tokens whose weights are kept, the most recent

    def __init__(self) -> None:
        self._of_class = {kind: [math.log(p / (1 - p)) for p in priors] for kind, priors in _PRIORS.items()}
        self._of_token: dict[tuple[Kind, int], float] = {}

    def of(self, kind: Kind, n_alike: int, token: int) -> float:
        number = _CLASSES[min(n_alike, len(_CLASSES) - 1)]
        return 1 / (1 + math.exp(-self._of_class[kind][number] - self._of_token.get((kind, token), 0.0)))

    def observe(self, kind: Kind, n_alike: int, token: int, right: bool) -> None:
        error = right - self.of(kind, n_alike, token)
        self._of_class[kind][_CLASSES[min(n_alike, len(_CLASSES) - 1)]] += self._RATE * error
        weight = self._of_token.pop((kind, token), 0.0)
        self._of_token[kind, token] = weight + self._TOKEN_RATE * error
        if len(self._of_token) > self._MOST_TOKENS:
            del self._of_token[next(iter(self._of_token))]


class Drafter:
    """Proposes how one answer continues. For use by one thread."""

    def __init__(self, prompt: SequenceOf[int] = (), sources: SequenceOf[DraftSource] = ()) -> None:
        """`prompt`: text tokens of the prompt."""
        self._history = IndexedText()
        self._chances = sources[0].chances if sources else Chances()
        self._cursors: list[_Cursor] = [_Lookup("own", self._history), _Lookup("prompt", IndexedText(prompt))]
        for source in sources:
            self._cursors += source.cursors()

    def propose(self, answer: SequenceOf[int], most: int) -> Draft:
        """Proposes at most `most` tokens after those of `answer`, which may only have grown since the last call."""
        for token in answer[len(self._history.tokens) :]:
            self._move(token)
        best = Draft()
        for cursor in self._cursors:
            best = self._from(cursor, most, best)
        return best

    def _move(self, token: int) -> None:
        for cursor in self._cursors:
            expected = cursor.text.at(cursor.place)
            if expected != _END and cursor.is_placed:
                self._chances.observe(cursor.kind, cursor.n_alike, expected, expected == token)
        # the token is not in the history yet, otherwise a lookup there would find the very end that it looks for
        recent = [*self._history.tokens[1 - _LONGEST :], token]
        for cursor in self._cursors:
            cursor.move(recent)
        self._history.extend((token,))

    def _from(self, cursor: _Cursor, most: int, best: Draft) -> Draft:
        """Returns the continuation from a cursor if its expected number of right tokens exceeds that of `best`,
        otherwise `best`."""
        tokens, chances, chance, n_right, n_best = list[int](), list[float](), 1.0, 0.0, sum(best.chances)
        n_known = len(cursor.text.tokens) - cursor.place
        for i in range(most if cursor.is_placed else 0):
            # an answer that repeats itself may do so again, so a draft that reaches the end of the text continues with
            # its own beginning
            goes_round = i >= n_known > 0 and cursor.kind == "own"
            token = tokens[i - n_known] if goes_round else cursor.text.at(cursor.place + i)
            if token == _END:
                break
            chance *= self._chances.of(cursor.kind, cursor.n_alike + len(tokens), token)
            if chance < _LEAST_CHANCE:
                break
            if n_right + chance * (most - i) <= n_best:
                return best
            tokens.append(token)
            chances.append(chance)
            n_right += chance
        return Draft(tuple(tokens), tuple(chances)) if n_right > n_best else best
