"""Picks the next token from logits: greedily, or by sampling after the usual filters. NumPy only, so that masks can be
applied.

Filters in llama.cpp's order: repeat penalty, top-k, top-p, min-p, temperature.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from granite4v.errors import ArgumentError

# Penalized logits are clipped to finite values: differences between infinities are NaN, so none could be sampled.
_LEAST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled. Temperature 0 is greedy decoding; every other filter is off by default.

    `repeat_penalty` divides positive and multiplies negative logits of the last `repeat_last_n` tokens. Raises
    TypeError for a value that is no number, ArgumentError for one out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", "repeat_penalty"):
            _check_type(name, getattr(self, name), numbers.Real, "a number")
        for name in ("top_k", "repeat_last_n"):
            _check_type(name, getattr(self, name), numbers.Integral, "an integer")
        if self.seed is not None:
            _check_type("seed", self.seed, numbers.Integral, "an integer or None")
        limits = (
            ("temperature", 0 <= self.temperature < math.inf, "0 or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1 (off)"),
            ("min_p", 0 <= self.min_p < 1, "0 (off) or more, below 1"),
            ("repeat_penalty", 0 < self.repeat_penalty < math.inf, "above 0 (1 is off)"),
            ("repeat_last_n", self.repeat_last_n >= 0, "0 or more"),
            ("seed", self.seed is None or self.seed >= 0, "0 or more, or None"),
        )
        for name, fits, expected in limits:
            if not fits:
                raise ArgumentError(f"{name} is {getattr(self, name)}; expected {expected}.")


def _check_type(name: str, value: Any, kind: type, expected: str) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r:.60}; expected {expected}.")


class Sampler:
    """Picks the tokens of one answer; the same seed and logits give the same tokens."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

    def pick(self, logits: np.ndarray, history: Sequence[int], allowed: np.ndarray | None = None) -> int:
        """Returns the next token's id. `history`: tokens generated so far. `logits` is not modified.

        `allowed`: bool `(n_vocab,)`, the tokens to pick from, at least one; all filters see only those.
        """
        s = self.sampling
        if allowed is not None:
            logits = np.where(allowed, logits, np.float32(-np.inf))
        if s.repeat_penalty != 1.0 and history and s.repeat_last_n:
            logits = logits.copy()
            seen = np.unique(np.asarray(history[-s.repeat_last_n :]))
            scores = logits[seen]
            penalty = min(max(s.repeat_penalty, _LEAST), _LARGEST)
            with np.errstate(over="ignore"):
                penalized = np.where(scores > 0, scores / penalty, scores * penalty)
            logits[seen] = np.where(np.isfinite(scores), np.clip(penalized, -_LARGEST, _LARGEST), scores)
        if s.temperature == 0.0:
            return int(logits.argmax())
        ids, scores = self._candidates(logits)
        weights = np.exp((scores - scores[0]) / s.temperature)
        return int(self._random.choice(ids, p=weights / weights.sum()))

    def _candidates(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids and float64 logits of the tokens that remain after the filters, most likely first."""
        s = self.sampling
        some = 0 < s.top_k < len(logits)
        ids = np.argpartition(logits, -s.top_k)[-s.top_k :] if some else np.arange(len(logits))
        ids = ids[np.argsort(-logits[ids], kind="stable")]
        scores = logits[ids].astype(np.float64)
        weights = np.exp(scores - scores[0])
        n = len(ids)
        if s.top_p < 1.0:
            total = np.cumsum(weights) / weights.sum()
            n = min(n, int(np.searchsorted(total, s.top_p)) + 1)
        if s.min_p > 0.0:
            n = min(n, int(np.count_nonzero(weights >= s.min_p)))
        return ids[:n], scores[:n]
