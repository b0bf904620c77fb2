"""Records what one sequence of the KV cache holds, and how much of a prompt it can be reused for.

A position is identified by its contents: a token id, or the digest of an image and an index into it. Two positions are
equal only if everything before them is equal too, so the cells of one image are never reused for another.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np

# A repeated request should give bit-identical logits, which needs the same batches. So a request is recomputed from the
# batch where it first differs, unless that would compute more than this many known tokens again.
MAX_RECOMPUTED = 128


@dataclass(frozen=True)
class Batch:
    """Positions that were or will be computed in one call, and their contents."""

    keys: tuple[Hashable, ...]

    @property
    def n_tokens(self) -> int:
        return len(self.keys)


@dataclass(eq=False)
class CachedSequence:
    """The contents of one sequence of the context, batch by batch, from position 0 on."""

    id: int
    batches: list[Batch] = field(default_factory=list)
    adapter: bool = False  # whether a LoRA was applied to it
    in_use: bool = False
    is_lost: bool = False  # its cells are gone while it is in use
    last_used: int = 0
    n_prompt: int = 0  # prompt tokens of the request that uses it
    n_most: int = 0  # the most tokens that this request can have, prompt included
    # batches of the last prefill and the logits after it, so that repeating the request costs nothing
    plan: tuple[Batch, ...] = ()
    logits: np.ndarray | None = None
    # running total of `batches`: every decoded token adds a batch and asks for the total
    n_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.n_tokens = total(self.batches)

    def append(self, batch: Batch) -> None:
        self.batches.append(batch)
        self.n_tokens += batch.n_tokens

    def hold(self, batches: list[Batch]) -> None:
        """Replaces its contents."""
        self.batches, self.n_tokens = batches, total(batches)

    def prefix(self, n_tokens: int) -> list[Batch]:
        """Returns the batches of the first `n_tokens` positions; a batch that is cut keeps its first part."""
        kept: list[Batch] = []
        room = n_tokens
        for batch in self.batches:
            if room <= 0:
                break
            kept.append(batch if batch.n_tokens <= room else Batch(batch.keys[:room]))
            room -= kept[-1].n_tokens
        return kept

    def reusable(self, plan: Sequence[Batch]) -> int:
        """How many positions of the plan need not be computed; the plan's last position always is.

        Counts the leading batches that are equal as a whole; or, where that would recompute more than `MAX_RECOMPUTED`
        known positions, all equal positions. For example, batches of 512 and 300 are held and batches of 512 and 310
        are planned. If the first 812 positions are equal, all 812 are reused, since 512 would recompute 300; if the
        first 612 are, 512 are.
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
        n_plan = total(plan)
        equal = min(equal, n_plan - 1)
        if alike >= n_plan:
            alike -= plan[-1].n_tokens
        return alike if equal - alike <= MAX_RECOMPUTED else equal

    def known_logits(self, plan: Sequence[Batch]) -> np.ndarray | None:
        """The logits at the end of a plan, if this plan was the sequence's last prefill and its logits are kept."""
        return self.logits.copy() if self.logits is not None and self.plan == tuple(plan) else None


def total(batches: Sequence[Batch]) -> int:
    """Number of positions in the batches."""
    return sum(batch.n_tokens for batch in batches)
