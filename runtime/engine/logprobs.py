"""Computes log-probabilities of an answer's tokens, from the logits that they were sampled from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from granite4v.runtime.answer import TokenLogprob

MAX_ALTERNATIVES = 20  # the limit of OpenAI's API


class Logprobs:
    """Collects the entries of one answer. `n_top`: number of alternatives per token; `pieces`: the bytes of each
    vocabulary token."""

    def __init__(self, n_top: int, pieces: Sequence[bytes]) -> None:
        self._n_top, self._pieces = n_top, pieces
        self.entries: list[TokenLogprob] = []

    def add(self, tokens: Sequence[int], ends: Sequence[int], logits: np.ndarray | None) -> None:
        """Adds the tokens of a step. `ends`: length of the answer in characters after each token; `logits`, float32
        `(n_vocab,)`: those the first token was chosen by, None if it was forced. All later tokens of a step are forced.
        """
        for token, end in zip(tokens, ends, strict=True):
            logprob, top = (0.0, ()) if logits is None else self._score(logits, token)
            self.entries.append(TokenLogprob(token, self._pieces[token], logprob, top, logits is None, end))
            logits = None

    def _score(self, logits: np.ndarray, token: int) -> tuple[float, tuple[tuple[int, float], ...]]:
        top = _largest(logits, min(self._n_top, len(logits)))
        shifted = logits.astype(np.float64) - float(logits.max())
        total = np.log(np.exp(shifted).sum())
        return float(shifted[token] - total), tuple((int(one), float(shifted[one] - total)) for one in top)


def _largest(logits: np.ndarray, n: int) -> np.ndarray:
    """The indexes of the `n` largest logits, largest first; among equals the lowest index first."""
    if not n:
        return np.empty(0, dtype=np.intp)
    places = np.flatnonzero(logits >= np.partition(logits, -n)[-n])
    return places[np.argsort(-logits[places], kind="stable")][:n]
