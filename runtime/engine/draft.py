"""Drafts by lookup: what an answer is likely to go on with, because it, its prompt or another answer said so before.

A drafter follows every text that the answer may repeat with a cursor, and learns from each token of the answer how
often a cursor of that kind is right. So an estimate that is wrong corrects itself, whether or not its drafts are used.
Knows tokens alone: no grammar, no logits, no model.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple, Protocol

_END = -1  # between two token sequences of a source; equals no token
_LONGEST = 32  # tokens that are compared backwards
_MOST_PLACES = 8  # of a pair of tokens that are remembered, the latest
_LEAST_CHANCE = 0.05  # of the last token of a draft
# how far a complete answer is searched for the place where the real one continues, after they differed
_BEHIND, _AHEAD = 8, 64


class Draft(NamedTuple):
    """Tokens that may come next, and for each the estimated chance that it and all before it are right (falling)."""

    tokens: tuple[int, ...] = ()
    chances: tuple[float, ...] = ()


class DraftSource:
    """Token sequences that answers may repeat, shared by any number of requests and threads.

    Bounded: the oldest sequences are forgotten when there are more than `most_tokens`.
    """

    def __init__(self, most_tokens: int = 1 << 14) -> None:
        self._most_tokens, self._lock = most_tokens, threading.Lock()
        self._pieces: list[tuple[int, ...]] = []
        self._answers: list[IndexedText] = []
        self._pool = IndexedText()
        self.version = 0  # changes with the texts

    def add(self, tokens: SequenceOf[int], *, whole: bool = False) -> None:
        """`whole`: a complete answer that another may follow from its first token on, with differences; otherwise
        pieces of it may occur anywhere."""
        tokens = tuple(tokens)[: self._most_tokens]
        if not tokens:
            return
        with self._lock:
            if whole:
                self._answers.append(IndexedText(tokens))
                while sum(len(answer.tokens) for answer in self._answers) > self._most_tokens:
                    self._answers.pop(0)
            else:
                self._add_piece(tokens)
            self.version += 1

    def _add_piece(self, tokens: tuple[int, ...]) -> None:
        if len(self._pool.tokens) + len(tokens) > self._most_tokens:
            n_kept, kept = len(tokens), list[tuple[int, ...]]()
            for piece in reversed(self._pieces):
                n_kept += len(piece) + 1
                if n_kept > self._most_tokens // 2:
                    break
                kept.insert(0, piece)
            self._pieces, self._pool = kept, IndexedText()
            for piece in kept:
                self._pool.extend((*piece, _END))
        self._pieces.append(tokens)
        self._pool.extend((*tokens, _END))

    def texts(self) -> tuple[IndexedText, tuple[IndexedText, ...]]:
        """The pieces as one text, and the complete answers."""
        with self._lock:
            return self._pool, tuple(self._answers)


class IndexedText:
    """Tokens that grow at the end, and where pairs and fours of them occur. One thread extends it, any may read."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self.tokens: list[int] = []
        self._pairs: dict[tuple[int, int], tuple[int, ...]] = {}  # the latest places behind each
        self._fours: dict[tuple[int, ...], int] = {}
        self._firsts: dict[int, int] = {}  # behind the first token of a sequence
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
            pair = known[place - 2], token
            self._pairs[pair] = (*self._pairs.get(pair, ())[1 - _MOST_PLACES :], place)
            if place >= 4:
                self._fours[tuple(known[place - 4 :])] = place

    def find(self, history: SequenceOf[int]) -> tuple[int, int]:
        """The place behind the longest occurrence of the end of `history`, the latest of several, and its length.

        (0, 0) without one of two tokens, or of one at the beginning of a sequence.
        """
        if not history:
            return 0, 0
        places = self._pairs.get((history[-2], history[-1]), ()) if len(history) > 1 else ()
        four = self._fours.get(tuple(history[-4:]))
        if four is not None:
            places = (four, *places)
        if not places:
            place = self._firsts.get(history[-1], 0)
            return place, min(place, 1)
        n_alike, place = max((self.n_alike(place, history), place) for place in places)
        return place, n_alike

    def n_alike(self, place: int, history: SequenceOf[int]) -> int:
        """How many tokens before `place` are the last ones of `history`."""
        tokens, n = self.tokens, 0
        most = min(place, len(history), _LONGEST)
        while n < most and tokens[place - 1 - n] == history[-1 - n]:
            n += 1
        return n


class _Cursor(Protocol):
    """Where an answer may be in a text: `place` is that of the next token, `n_alike` tokens before it agree."""

    kind: str
    text: IndexedText
    place: int
    n_alike: int

    def move(self, history: SequenceOf[int]) -> None:
        """The answer got one more token, the last of `history`."""
        ...


class _Lookup:
    """Goes to the longest repetition of the answer's end, wherever it is in the text."""

    def __init__(self, kind: str, text: IndexedText) -> None:
        self.kind, self.text, self.place, self.n_alike = kind, text, 0, 0

    def move(self, history: SequenceOf[int]) -> None:
        # no other place can have more in common as long as this one agrees
        if self.n_alike and _at(self.text, self.place) == history[-1]:
            self.place += 1
            self.n_alike += 1
        else:
            self.place, self.n_alike = self.text.find(history)


class _Follower:
    """Stays beside the answer in a text that should resemble it from its beginning to its end.

    Where the two differ, it goes on as if one token were replaced, until what follows tells where the answer really is:
    the nearest place that agrees, as `</td><td>` occurs between any two cells.
    """

    def __init__(self, text: IndexedText) -> None:
        self.kind, self.text, self.place, self.n_alike = "answer", text, 0, 0
        self._n_lost = 0  # tokens since the two differed

    def move(self, history: SequenceOf[int]) -> None:
        if _at(self.text, self.place) == history[-1]:
            self.place += 1
            self.n_alike += 1
            self._n_lost = 0
            return
        self.n_alike = 0
        self._n_lost += 1
        self.place = min(self.place + 1, len(self.text.tokens))
        place, n_alike = self._nearby(history)
        if n_alike < 4 and self._n_lost > 4:
            place, n_alike = max((place, n_alike), self.text.find(history), key=lambda found: found[1])
        if n_alike >= 2 or (n_alike == 1 and abs(place - self.place) <= 2):
            self.place, self.n_alike, self._n_lost = place, n_alike, 0

    def _nearby(self, history: SequenceOf[int]) -> tuple[int, int]:
        tokens, last = self.text.tokens, history[-1]
        best, found = 0.0, (0, 0)
        for place in range(max(1, self.place - _BEHIND), min(len(tokens), self.place + _AHEAD) + 1):
            if tokens[place - 1] == last:
                n_alike = self.text.n_alike(place, history)
                if (score := n_alike - abs(place - self.place) / _AHEAD) > best:
                    best, found = score, (place, n_alike)
        return found


def _at(text: IndexedText, place: int) -> int:
    return text.tokens[place] if place < len(text.tokens) else _END


_BOUNDS = (0, 1, 2, 4, 8, 16)  # of the classes of `n_alike`
# chances of a token by kind and class, before the answer has shown others
_PRIORS = {
    "answer": (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97),
    "own":    (0.0, 0.1, 0.4, 0.5, 0.6, 0.75, 0.85),
    "prompt": (0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9),
    "piece":  (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.9),
}  # fmt: skip
_PRIOR_WEIGHT, _DECAY = 4.0, 0.95  # in observations; what one weighs after the next


class _Chances:
    """How often the next token of a cursor is right, by its kind and by how much agreed before."""

    def __init__(self) -> None:
        self._seen = {kind: [[0.0, 0.0] for _ in priors] for kind, priors in _PRIORS.items()}

    def of(self, kind: str, n_alike: int) -> float:
        number = _class(n_alike)
        right, n = self._seen[kind][number]
        return (_PRIORS[kind][number] * _PRIOR_WEIGHT + right) / (_PRIOR_WEIGHT + n)

    def observe(self, kind: str, n_alike: int, right: bool) -> None:
        seen = self._seen[kind][_class(n_alike)]
        seen[0] = seen[0] * _DECAY + right
        seen[1] = seen[1] * _DECAY + 1


def _class(n_alike: int) -> int:
    return sum(n_alike > bound for bound in _BOUNDS)


class Drafter:
    """Proposes how one answer goes on. For one thread."""

    def __init__(self, prompt: SequenceOf[int] = (), sources: SequenceOf[DraftSource] = ()) -> None:
        """`prompt`: its text tokens."""
        self._history = IndexedText()
        self._chances = _Chances()
        self._cursors: list[_Cursor] = [_Lookup("own", self._history)]
        if prompt:
            self._cursors.append(_Lookup("prompt", IndexedText(prompt)))
        self._sources = [(source, -1) for source in sources]
        self._known: set[int] = set()  # texts of sources that have a cursor, by identity; cursors keep them alive

    def propose(self, answer: SequenceOf[int], most: int) -> Draft:
        """At most `most` tokens after those of `answer`, which has only grown since the last call."""
        for token in answer[len(self._history.tokens) :]:
            self._move(token)
        self._refresh()
        drafts = (self._from(cursor, most) for cursor in self._cursors)
        return max(drafts, key=lambda draft: sum(draft.chances), default=Draft())

    def _move(self, token: int) -> None:
        history = self._history.tokens
        for cursor in self._cursors:
            expected = _at(cursor.text, cursor.place)
            if expected != _END and (cursor.n_alike or cursor.kind == "answer"):
                self._chances.observe(cursor.kind, cursor.n_alike, expected == token)
        # a cursor in the history itself must not find the end it is compared with
        seen = [*history[-_LONGEST:], token]
        for cursor in self._cursors:
            cursor.move(seen)
        self._history.extend((token,))

    def _refresh(self) -> None:
        """Takes up what was added to the sources."""
        for i, (source, version) in enumerate(self._sources):
            if source.version == version:
                continue
            self._sources[i] = source, source.version
            pool, answers = source.texts()
            new: list[_Cursor] = [_Follower(answer) for answer in answers if id(answer) not in self._known]
            if id(pool) not in self._known:
                new.append(_Lookup("piece", pool))
            self._known |= {id(cursor.text) for cursor in new}
            for cursor in new:
                self._catch_up(cursor)
            self._cursors += new

    def _catch_up(self, cursor: _Cursor) -> None:
        tokens = self._history.tokens
        for n in range(1, len(tokens) + 1):
            cursor.move(tokens[max(0, n - _LONGEST) : n])

    def _from(self, cursor: _Cursor, most: int) -> Draft:
        if not cursor.n_alike and cursor.kind != "answer":
            return Draft()
        tokens, chances, chance = list[int](), list[float](), 1.0
        for token in cursor.text.tokens[cursor.place : cursor.place + max(0, most)]:
            chance *= self._chances.of(cursor.kind, cursor.n_alike + len(tokens))
            if token == _END or chance < _LEAST_CHANCE:
                break
            tokens.append(token)
            chances.append(chance)
        return Draft(tuple(tokens), tuple(chances))
