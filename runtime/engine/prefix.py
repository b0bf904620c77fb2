"""What the KV cache holds, and how much of it a new request can use. Plain bookkeeping, no library.

A position is known by what was put there: a token id, or the digest of a picture and an index into it. Two
positions are equal only when everything before them is equal too, so a picture's cache is never used for another.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

# A repeated request should give the same logits to the last bit, which needs the same batches. So a request starts
# again at the batch where it first differs, unless that would compute more than this many known tokens anew.
MAX_RECOMPUTED = 128


@dataclass(frozen=True)
class Batch:
    """Positions that were or will be computed in one call, and what they hold."""

    keys: tuple[Hashable, ...]

    @property
    def n_tokens(self) -> int:
        return len(self.keys)


@dataclass
class CachedSequence:
    """The batches in the cache, in order."""

    batches: list[Batch] = field(default_factory=list)

    @property
    def n_tokens(self) -> int:
        return sum(batch.n_tokens for batch in self.batches)

    def append(self, batch: Batch) -> None:
        self.batches.append(batch)

    def truncate(self, n_tokens: int) -> None:
        """Keeps the first `n_tokens`; a batch that is cut through keeps its first part."""
        kept: list[Batch] = []
        room = n_tokens
        for batch in self.batches:
            if room <= 0:
                break
            kept.append(batch if batch.n_tokens <= room else Batch(batch.keys[:room]))
            room -= kept[-1].n_tokens
        self.batches = kept

    def reusable(self, plan: Sequence[Batch]) -> int:
        """How many positions of the plan need not be computed; the plan's last position always is.

        The whole batches that were computed alike; or, where that leaves much to do, all equal positions.
        """
        alike = 0
        for mine, planned in zip(self.batches, plan, strict=False):
            if mine != planned:
                break
            alike += mine.n_tokens
        equal = 0
        mine_keys = (key for batch in self.batches for key in batch.keys)
        plan_keys = (key for batch in plan for key in batch.keys)
        for mine_key, planned_key in zip(mine_keys, plan_keys, strict=False):
            if mine_key != planned_key:
                break
            equal += 1
        n_plan = sum(batch.n_tokens for batch in plan)
        equal = min(equal, n_plan - 1)
        if alike >= n_plan:
            alike -= plan[-1].n_tokens
        return alike if equal - alike <= MAX_RECOMPUTED else equal
