"""What the KV cache holds: the index of its sequences, prefix reuse, and eviction.

Owns the llama.cpp context, which grows with the requests. A position is known by what was put there: a token id, or the
digest of an image and an index into it. Two positions are equal only if everything before them is equal too, so the
cells of one image are never reused for another. Only this module removes anything from the cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from granite4v.errors import DeviceError
from granite4v.runtime.llama.context import BatchRows

# A repeated request should give the same logits to the last bit, which needs the same batches. So a request starts
# again at the batch where it first differs, unless that would compute more than this many known tokens anew.
MAX_RECOMPUTED = 128
CONTEXT_STEP = 512  # contexts are made in multiples of this many tokens


@dataclass(frozen=True)
class Batch:
    """Positions that were or will be computed in one call, and what they hold."""

    keys: tuple[Hashable, ...]

    @property
    def n_tokens(self) -> int:
        return len(self.keys)


class Context(Protocol):
    """What of `runtime.llama.context.LlamaContext` the cache and the scheduler use.

    `state` may not be asked for between a `copy` and the next `decode`.
    """

    n_cells: int  # of one sequence
    n_seq_max: int
    max_outputs: int

    def set_adapter(self, on: bool) -> None: ...
    def decode(self, rows: BatchRows) -> None: ...
    def logits(self, row: int) -> np.ndarray: ...
    def truncate(self, sequence: int, n_tokens: int) -> bool: ...
    def copy(self, source: int, target: int, n_tokens: int) -> None: ...
    def state(self, sequence: int) -> np.ndarray: ...
    def restore(self, sequence: int, state: np.ndarray) -> None: ...
    def close(self) -> None: ...


@dataclass
class CachedSequence:
    """What one sequence of the context holds, batch by batch, from position 0 on."""

    id: int
    batches: list[Batch] = field(default_factory=list)
    adapter: bool = False  # whether a LoRA was applied to it
    in_use: bool = False
    is_lost: bool = False  # its cells are gone although it is in use
    last_used: int = 0
    # the last prefill and the logits at its end, so that the same request again costs nothing
    plan: tuple[Batch, ...] = ()
    logits: np.ndarray | None = None
    # of `batches`, counted along: every decoded token makes a batch and asks for the sum
    n_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.n_tokens = _length(self.batches)

    def append(self, batch: Batch) -> None:
        self.batches.append(batch)
        self.n_tokens += batch.n_tokens

    def hold(self, batches: list[Batch]) -> None:
        """Replaces what it holds."""
        self.batches, self.n_tokens = batches, _length(batches)

    def prefix(self, n_tokens: int) -> list[Batch]:
        """The first `n_tokens`; a batch that is cut through is there with its first part."""
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

        The complete batches that were computed alike; or, where that leaves much to do, all equal positions.
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

    def known_logits(self, plan: Sequence[Batch]) -> np.ndarray | None:
        """The logits at the end of a plan that this sequence begins with and was prefilled by, if it was the last."""
        return self.logits.copy() if self.logits is not None and self.plan == tuple(plan) else None


class KvCache:
    """The sequences of one context. `acquire` lends one to a request, `release` takes it back and keeps what it holds
    for later requests. Not for several threads at once.

    The context begins with one sequence. It gets all the others with the second request that comes while one is in use,
    and larger sequences with a request that needs them; so a request that is alone takes no more memory than it needs.
    """

    def __init__(
        self,
        open_context: Callable[[int, int], Context],
        n_ctx: int,
        n_seq_max: int,
        *,
        opens_all: bool = False,
    ) -> None:
        """`open_context(n_cells, n_sequences)` makes an empty context. A request may take `n_ctx` cells.
        `opens_all`: the first context has all sequences.
        """
        self._opens_all = opens_all
        self._open_context, self._n_ctx, self._n_seq_max = open_context, n_ctx, n_seq_max
        self._context: Context | None = None
        self._sequences = [CachedSequence(0)]
        self._copied: list[CachedSequence] = []  # since the last decode: llama.cpp copies no sooner
        self._clock = itertools.count(1)
        self._too_large = 1 << 62  # cells of a sequence that there was no memory for
        self.can_cut = True  # whether the end of a sequence can be forgotten; until shown otherwise

    @property
    def n_cells(self) -> int:
        """Tokens that a sequence has room for now; 0 before the first request."""
        return self._context.n_cells if self._context else 0

    @property
    def context(self) -> Context:
        if self._context is None:
            raise ValueError("no sequence was acquired yet")
        return self._context

    @property
    def n_seq_max(self) -> int:
        """Sequences there can be."""
        return self._n_seq_max

    @property
    def n_sequences(self) -> int:
        """Sequences there are."""
        return len(self._sequences)

    @property
    def n_in_use(self) -> int:
        return sum(sequence.in_use for sequence in self._sequences)

    def holds(self, key: Hashable) -> bool:
        """Whether any sequence holds a position of this key."""
        return any(key in batch.keys for sequence in self._sequences for batch in sequence.batches)

    def sequence(self, number: int) -> CachedSequence:
        return self._sequences[number]

    def n_reusable(self, plan: Sequence[Batch], *, adapter: bool) -> int:
        """How much of a plan need not be computed."""
        return self._best_source(plan, adapter)[1]

    # --- lending ---

    def acquire(self, plan: Sequence[Batch], n_new: int, *, adapter: bool, n_wanted: int = 1) -> CachedSequence | None:
        """A sequence that begins with as much of the plan as the cache has, and has room for the rest and for `n_new`
        tokens more; None when all are in use, or when memory is too small for what this request needs beside them.

        `n_wanted`: sequences that are wanted now, those in use included. Other sequences may be lost on the way, which
        is told by `is_lost`. Raises DeviceError when there is not enough memory for this request alone.
        """
        n_tokens = _length(plan) + n_new
        if self._opens_all or max(n_wanted, self.n_in_use + 1) > len(self._sequences):
            self._add_sequences(n_tokens)
        if self.n_in_use >= len(self._sequences):
            return None
        source, n_reused = self._best_source(plan, adapter)
        target = self._choose_target(source, n_reused, _length(plan))
        if source is target:
            self.truncate(target, n_reused)
        else:
            self._evict(target)
        if n_tokens > self.n_cells:
            if not self._enlarge(n_tokens):
                return None
            target = target if target in self._sequences else self._sequences[0]
        if source is not None and source is not target and source.batches:
            self._copy(source, target, n_reused)
        target.in_use, target.is_lost, target.adapter = True, False, adapter
        target.last_used = next(self._clock)
        return target

    def release(self, sequence: CachedSequence) -> None:
        """The request is done; what the sequence holds stays until the room is needed."""
        sequence.in_use, sequence.is_lost = False, False
        sequence.last_used = next(self._clock)

    def append(self, sequence: CachedSequence, batch: Batch) -> None:
        """Records what was decoded at the end of a sequence."""
        sequence.append(batch)
        self._copied.clear()

    def truncate(self, sequence: CachedSequence, n_tokens: int | None = None) -> None:
        """Forgets a sequence from `n_tokens` on; by default what a call may have left behind its end.

        Where the cache cannot be cut there, all of the sequence is forgotten.
        """
        n_tokens = sequence.n_tokens if n_tokens is None else n_tokens
        if self._context is not None and not self._context.truncate(sequence.id, n_tokens):
            self._context.truncate(sequence.id, 0)
            n_tokens, sequence.is_lost, self.can_cut = 0, sequence.in_use, False
        if n_tokens < sequence.n_tokens:
            sequence.hold(sequence.prefix(n_tokens))
        if n_tokens < _length(sequence.plan):
            sequence.plan, sequence.logits = (), None

    def clear(self) -> None:
        """Forgets what idle sequences hold, and the logits that are known."""
        for sequence in self._sequences:
            if not sequence.in_use:
                self._evict(sequence)
            sequence.logits = None

    def close(self) -> None:
        context, self._context = self._context, None
        self._copied.clear()
        if context is not None:
            context.close()

    # --- choosing ---

    def _best_source(self, plan: Sequence[Batch], adapter: bool) -> tuple[CachedSequence | None, int]:
        """The sequence that has most of the plan, and how much of it; an idle one if it has as much."""
        best: CachedSequence | None = None
        most = 0
        for sequence in sorted(self._sequences, key=lambda s: (s.in_use, -s.last_used)):
            if sequence.adapter != adapter or sequence.is_lost or not sequence.batches:
                continue
            known = sequence.known_logits(plan) is not None
            n_reused = _length(plan) if known else sequence.reusable(plan)
            if n_reused > most:
                best, most = sequence, n_reused
        return best, most

    def _choose_target(self, source: CachedSequence | None, n_reused: int, n_plan: int) -> CachedSequence:
        """Where the request goes: on in the sequence that it continues, or into an empty one, or into the one that was
        used longest ago. A sequence of which it takes only a little is left to those who continue it.

        Of empty ones it takes the first: llama.cpp computes sequences together only if their numbers are neighbours.
        """
        if source is not None and not source.in_use and 2 * n_reused >= n_plan:
            return source
        idle = [sequence for sequence in self._sequences if not sequence.in_use]
        return min(idle, key=lambda s: (bool(s.batches), s is source, s.last_used if s.batches else 0, s.id))

    def _copy(self, source: CachedSequence, target: CachedSequence, n_tokens: int) -> None:
        self.context.copy(source.id, target.id, n_tokens)
        target.hold(source.prefix(n_tokens))
        self._copied.append(target)
        if n_tokens >= _length(source.plan):
            target.plan, target.logits = source.plan, source.logits

    def _evict(self, sequence: CachedSequence) -> None:
        if sequence.batches:
            self.truncate(sequence, 0)
        sequence.plan, sequence.logits = (), None

    # --- room ---

    def _add_sequences(self, n_cells: int) -> None:
        """All the sequences there can be, if there is memory for them. They begin empty, and those there were are lost:
        llama.cpp takes a sequence's state only into a context with as many sequences."""
        n_sequences, n_old = self._n_seq_max, self.n_cells
        if n_sequences == len(self._sequences):
            return
        try:
            self._open(max(n_cells, n_old), n_sequences, {})
        except DeviceError:
            self._n_seq_max = len(self._sequences)
            if n_old:
                self._open(n_old, len(self._sequences), {})
        self._sequences += [CachedSequence(number) for number in range(len(self._sequences), self._n_seq_max)]

    def _enlarge(self, n_cells: int) -> bool:
        """Larger sequences. False where memory ends and others are in use; then they are lost, but can be computed
        again. Raises DeviceError where there are no others, and no room for one sequence of this size."""
        n_sequences, n_old = len(self._sequences), self.n_cells
        if self.n_in_use and n_cells >= self._too_large:
            return False
        context = self._context
        states = (
            {s.id: context.state(s.id) for s in self._sequences if s.batches and s not in self._copied}
            if context
            else {}
        )
        try:
            self._open(n_cells, n_sequences, states)
        except DeviceError:
            self._too_large = min(self._too_large, n_cells)
            if self.n_in_use:
                self._open(n_old, n_sequences, {})
                return False
            if n_sequences == 1:
                raise
            del self._sequences[1:]
            self._n_seq_max = 1
            self._open(n_cells, 1, {})
        return True

    def _open(self, n_cells: int, n_sequences: int, states: dict[int, np.ndarray]) -> None:
        """A new context in place of the old one, which is closed first: the two together may be too much."""
        self.close()
        for sequence in self._sequences:
            if sequence.id not in states:
                sequence.is_lost = sequence.in_use
                sequence.hold([])
                sequence.plan, sequence.logits = (), None
        rounded = -(-n_cells // CONTEXT_STEP) * CONTEXT_STEP
        self._context = self._open_context(max(n_cells, min(rounded, self._n_ctx)), n_sequences)
        try:
            for number, state in states.items():
                self._context.restore(number, state)
        except DeviceError:
            self._open(n_cells, n_sequences, {})


def _length(batches: Sequence[Batch]) -> int:
    return sum(batch.n_tokens for batch in batches)
