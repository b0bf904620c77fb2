"""Manages the KV cache: the index of its sequences, prefix reuse, and eviction.

Owns the llama.cpp context, which grows with the requests. Only this module removes anything from the cache.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

import numpy as np

from granite4v.errors import DeviceError
from granite4v.ggml.backend import Aborted
from granite4v.runtime.engine.cached_sequence import Batch, CachedSequence, total
from granite4v.runtime.engine.moved_states import MovedStates
from granite4v.runtime.engine.stored_pages import StoredPrefix
from granite4v.runtime.llama.context import BatchRows

CONTEXT_STEP = 512  # cells of a single-sequence context are a multiple of this
SEQUENCE_STEP = 256  # with several sequences each one's cells are a multiple of this: llama.cpp rounds to it
# With several sequences, each has room for an answer of recent length, not for all tokens that it may have: the memory
# of all cells is allocated at once. A longer answer makes all sequences larger, by half of that answer's length.
MIN_ANSWER = 512
N_LATELY = 32  # recent answers from which the length of the next ones is estimated


class Context(Protocol):
    """The part of `runtime.llama.context.LlamaContext` that the cache and the scheduler use.

    `state` may not be called between a `copy` and the next `decode`.
    """

    n_cells: int  # per sequence
    n_seq_max: int
    max_outputs: int

    def set_adapter(self, on: bool) -> None: ...
    def decode(self, rows: BatchRows, *, is_prompt: bool = False) -> None: ...
    def logits(self, row: int) -> np.ndarray: ...
    def truncate(self, sequence: int, n_tokens: int) -> bool: ...
    def copy(self, source: int, target: int, n_tokens: int) -> None: ...
    def state(self, sequence: int) -> np.ndarray: ...
    def restore(self, sequence: int, state: np.ndarray) -> None: ...
    def close(self) -> None: ...


class KvCache:
    """The sequences of one context. `acquire` lends one to a request; `release` takes it back and keeps its contents
    for later requests. Not thread-safe.

    The context begins with one sequence that has room for everything its request may generate, so a single request
    takes no more memory than it needs. When a second request arrives while the first one runs, the context is reopened
    with as many sequences as allowed, each with room for the prompt and an answer of recent length. When one needs more
    (`ensure_room`), all sequences become larger, or fewer if memory runs out. Their contents move along.
    """

    def __init__(
        self,
        open_context: Callable[[int, int], Context],
        n_ctx: int,
        n_seq_max: int,
        *,
        opens_all: bool = False,
        most_cells: int | None = None,
    ) -> None:
        """`open_context(n_cells, n_sequences)` makes an empty context. A request may take `n_ctx` cells. `opens_all`:
        the first context already has all sequences. `most_cells`: limit for all of several sequences together; None for
        as many as there is memory for."""
        self._opens_all = opens_all and n_seq_max > 1
        self._open_context, self._n_ctx, self._n_seq_max = open_context, n_ctx, n_seq_max
        self._most_cells = 1 << 62 if most_cells is None else most_cells
        self._context: Context | None = None
        self._sequences = [CachedSequence(0)]
        self._copied: list[CachedSequence] = []  # targets of copies that llama.cpp makes at the next decode
        self._clock = itertools.count(1)
        self._lengths: deque[int] = deque(maxlen=N_LATELY)  # lengths of recent answers
        self.can_cut = True  # whether the end of a sequence can be cut off; True until that fails

    @property
    def n_cells(self) -> int:
        """Current size of a sequence in cells; 0 before the first request."""
        return self._context.n_cells if self._context else 0

    @property
    def context(self) -> Context:
        if self._context is None:
            raise ValueError("no sequence was acquired yet")
        return self._context

    @property
    def n_seq_max(self) -> int:
        """Maximum number of sequences."""
        return self._n_seq_max

    @property
    def n_sequences(self) -> int:
        """Current number of sequences."""
        return len(self._sequences)

    @property
    def n_in_use(self) -> int:
        return sum(sequence.in_use for sequence in self._sequences)

    def holds(self, key: Hashable) -> bool:
        """Whether any sequence holds a position with this key."""
        return any(key in batch.keys for sequence in self._sequences for batch in sequence.batches)

    def sequence(self, number: int) -> CachedSequence:
        return self._sequences[number]

    def n_reusable(self, plan: Sequence[Batch], *, adapter: bool) -> int:
        """How many positions of a plan need not be computed."""
        return self._best_source(plan, adapter)[1]

    # --- acquiring and releasing ---

    def acquire(
        self,
        plan: Sequence[Batch],
        n_new: int,
        *,
        adapter: bool,
        n_wanted: int = 1,
        stored: StoredPrefix | None = None,
    ) -> CachedSequence | None:
        """Lends a sequence that begins with the longest prefix of the plan that the cache has, with room for the rest
        of the plan and for the beginning of an answer of `n_new` tokens. Returns None if all sequences are in use, or
        if there is not enough memory for this request next to the running ones.

        `n_wanted`: number of sequences wanted now, including those in use. Other sequences may lose their contents in
        the process; `is_lost` is then set. `stored`: a stored prefix, used if it is longer than what the cache has.
        Raises DeviceError when there is not enough memory for this request alone.
        """
        n_wanted = self._n_seq_max if self._opens_all else max(n_wanted, self.n_in_use + 1)
        source, n_reused = self._best_source(plan, adapter)
        if len(self._sequences) == 1 and not self.n_in_use:  # what is not reused need not move to a larger context
            self._cut(self._sequences[0], n_reused if source is not None else 0)
        if source is not None:
            source.last_used = next(self._clock)
        if stored is not None and stored.n_tokens > n_reused:
            stored.begin()
        if not self._prepare(total(plan), n_new, n_wanted):
            return None
        target = None if stored is None else self._restored(stored, plan, adapter)
        if target is None:
            source, n_reused = self._best_source(plan, adapter)
            target = self._choose_target(source, n_reused, total(plan))
            self._cut(target, n_reused if source is target else 0)
            if source is not None and source is not target:
                self._copy(source, target, n_reused)
        target.in_use, target.is_lost, target.adapter = True, False, adapter
        target.n_prompt, target.n_most = total(plan), total(plan) + n_new
        target.last_used = next(self._clock)
        return target

    def ensure_room(self, sequence: CachedSequence, n_rows: int) -> bool:
        """Makes room for `n_rows` more rows in a sequence in use. Returns False if sequences in use were lost for it
        (`is_lost` is set): those of the newest requests, where there is not enough memory for all.

        Raises DeviceError when there is not enough memory for this sequence alone.
        """
        n_tokens = sequence.n_tokens + n_rows
        if n_tokens <= self.n_cells:
            return True
        in_use = self._in_use()
        n_cells = self._rounded(max(n_tokens, *map(self._room_of, in_use)), SEQUENCE_STEP)
        n_sequences = self._n_fitting(n_cells)
        if n_sequences < len(in_use) > 1 and sequence is max(in_use, key=lambda s: s.last_used):
            sequence.is_lost = True  # it is the newest itself: the others need not move, and its contents may stay
            return False
        self._resize(n_cells, min(n_sequences, len(self._sequences)), 1)
        return not any(other.is_lost for other in in_use)

    def release(self, sequence: CachedSequence) -> None:
        """Ends a request's use of a sequence. Its contents stay until the room is needed."""
        if not sequence.is_lost:
            self._lengths.append(max(0, sequence.n_tokens - sequence.n_prompt))
        sequence.in_use, sequence.is_lost = False, False
        sequence.last_used = next(self._clock)

    def append(self, sequence: CachedSequence, batch: Batch) -> None:
        """Records a batch that was decoded at the end of a sequence."""
        sequence.append(batch)
        self._copied.clear()

    def truncate(self, sequence: CachedSequence, n_tokens: int | None = None) -> None:
        """Cuts a sequence to its first `n_tokens` positions; by default removes rows that a call left beyond the
        recorded end.

        Where the cache cannot be cut there, the whole sequence is dropped.
        """
        n_tokens = sequence.n_tokens if n_tokens is None else n_tokens
        if self._context is not None and not self._context.truncate(sequence.id, n_tokens):
            self._context.truncate(sequence.id, 0)
            n_tokens, sequence.is_lost, self.can_cut = 0, sequence.in_use, False
        if n_tokens >= sequence.n_tokens:  # nothing recorded was cut, as after a step: a prefill in progress goes on
            return
        sequence.hold(sequence.prefix(n_tokens))
        if n_tokens < total(sequence.plan):
            sequence.plan, sequence.logits = (), None

    def clear(self) -> None:
        """Drops the contents of idle sequences, and all known logits."""
        for sequence in self._sequences:
            if not sequence.in_use:
                self._cut(sequence, 0)
            sequence.logits = None

    def close(self) -> None:
        context, self._context = self._context, None
        self._copied.clear()
        if context is not None:
            context.close()

    # --- choosing sequences ---

    def _best_source(self, plan: Sequence[Batch], adapter: bool) -> tuple[CachedSequence | None, int]:
        """Returns the sequence with the longest reusable prefix of the plan, and its length; among equals an idle one,
        then the one used last."""
        best: CachedSequence | None = None
        most = 0
        for sequence in sorted(self._sequences, key=lambda s: (s.in_use, -s.last_used)):
            if sequence.adapter != adapter or sequence.is_lost or not sequence.batches:
                continue
            known = sequence.known_logits(plan) is not None
            n_reused = total(plan) if known else sequence.reusable(plan)
            if n_reused > most:
                best, most = sequence, n_reused
        return best, most

    def _choose_target(self, source: CachedSequence | None, n_reused: int, n_plan: int) -> CachedSequence:
        """Chooses the sequence for a request: the one that it continues, else an empty one, else the least recently
        used. A sequence of which it reuses less than half a plan is left, if possible, to requests that continue it.

        Among empty sequences it takes the first: llama.cpp computes sequences together only if their numbers are
        neighbours. For the same reason, in a batch of questions it takes one between or next to those in use, but none
        of the most recently used quarter, whose pages may be asked about again.
        """
        if source is not None and not source.in_use and 2 * n_reused >= n_plan:
            return source
        idle = sorted((one for one in self._sequences if not one.in_use), key=lambda s: s.last_used if s.batches else 0)
        if self._opens_all:
            idle = idle[: max(1, len(idle) - len(self._sequences) // 4)]
        in_use = [sequence.id for sequence in self._sequences if sequence.in_use and self._opens_all]
        first, last = (min(in_use), max(in_use)) if in_use else (0, len(self._sequences))
        return min(idle, key=lambda s: (bool(s.batches), s is source, max(first - s.id, s.id - last, 0)))

    def _restored(self, stored: StoredPrefix, plan: Sequence[Batch], adapter: bool) -> CachedSequence | None:
        """Restores a stored prefix into an idle sequence. Returns None if the cache has as much, or if the state is
        unusable."""
        if stored.n_tokens <= self.n_reusable(plan, adapter=adapter):
            return None
        state = stored.load()
        if state is None:
            return None
        target = self._choose_target(None, 0, total(plan))
        self._cut(target, 0)
        try:
            self._apply_copies(target)
            self.context.restore(target.id, state)
        except (Aborted, DeviceError):
            self.context.truncate(target.id, 0)
            return None
        target.hold(list(stored.batches))
        stored.is_taken = True
        return target

    def _apply_copies(self, empty: CachedSequence) -> None:
        """Makes llama.cpp carry out pending copies, by decoding a row in an empty sequence and removing it again.
        Otherwise a copy would be made at the next decode, from cells that a restored state may have replaced by then.
        """
        if self._copied:
            self.context.decode(BatchRows.of(np.zeros(1, dtype=np.int32), 0, empty.id, output=False))
            self.context.truncate(empty.id, 0)
            self._copied.clear()

    def _copy(self, source: CachedSequence, target: CachedSequence, n_tokens: int) -> None:
        self.context.copy(source.id, target.id, n_tokens)
        target.hold(source.prefix(n_tokens))
        self._copied.append(target)
        if n_tokens >= total(source.plan):
            target.plan, target.logits = source.plan, source.logits

    def _cut(self, sequence: CachedSequence, n_tokens: int) -> None:
        """Cuts an idle sequence to its first `n_tokens`."""
        if sequence.batches:
            self.truncate(sequence, n_tokens)
        if not n_tokens:
            sequence.plan, sequence.logits = (), None

    def _lose(self, sequence: CachedSequence) -> None:
        """Marks a sequence's cells as gone."""
        sequence.is_lost = sequence.in_use
        sequence.hold([])
        sequence.plan, sequence.logits = (), None

    # --- memory ---

    def _prepare(self, n_plan: int, n_new: int, n_wanted: int) -> bool:
        """Makes sure there is an idle sequence with room for a request. Returns False if those in use leave no memory
        for it."""
        n_in_use, n_sequences = self.n_in_use, len(self._sequences)
        is_alone = not self._opens_all and n_sequences == 1 and (n_wanted == 1 or self._n_seq_max == 1)
        n_answer = n_new if is_alone else min(n_new, self._expected())
        n_needed = n_plan + n_answer
        if n_wanted <= n_sequences and n_in_use < n_sequences and n_needed <= self.n_cells:
            return True
        n_most = 1 if is_alone else self._n_seq_max
        step = CONTEXT_STEP if is_alone else SEQUENCE_STEP
        n_cells = self._rounded(max(n_needed, *map(self._room_of, self._in_use()), 0), step)
        n_fitting = min(n_most, self._n_fitting(n_cells))
        if n_needed <= self.n_cells and n_fitting <= n_sequences:  # no further sequence would fit
            return n_in_use < n_sequences
        if n_fitting <= n_in_use:
            return False
        return self._resize(n_cells, n_fitting, n_in_use + 1)

    def _in_use(self) -> list[CachedSequence]:
        return [sequence for sequence in self._sequences if sequence.in_use and not sequence.is_lost]

    def _expected(self) -> int:
        """Answer length, in tokens, to reserve room for: what nine of ten recent answers needed, plus a quarter; at
        least `MIN_ANSWER`."""
        lengths = sorted(self._lengths)
        usual = lengths[(9 * len(lengths) - 1) // 10] if lengths else 0
        return max(MIN_ANSWER, usual * 5 // 4)

    def _room_of(self, sequence: CachedSequence) -> int:
        """Cells to reserve for a sequence in use.

        For example, with `_expected()` 512 and a prompt of 1,000 tokens: 1,512 cells at the start; once the answer has
        600 tokens, 1,000 + 600 + max(256, 300) = 1,900. Never more than the request can come to (`n_most`).
        """
        n_answer = sequence.n_tokens - sequence.n_prompt
        n_expected = max(self._expected(), n_answer + max(SEQUENCE_STEP, n_answer // 2))
        return max(sequence.n_tokens, min(sequence.n_most, sequence.n_prompt + n_expected))

    def _rounded(self, n_cells: int, step: int) -> int:
        return max(n_cells, min(-(-n_cells // step) * step, self._n_ctx))

    def _n_fitting(self, n_cells: int) -> int:
        """How many sequences of this size fit into memory; one is always tried."""
        return max(1, self._most_cells // n_cells)

    def _resize(self, n_cells: int, n_sequences: int, n_least: int) -> bool:
        """Replaces the context by one of another size. The old one is closed first, because both together may not fit
        in memory; the contents of the sequences move along. If memory runs out, it tries fewer sequences; if those are
        fewer than are in use, the newest requests lose theirs.

        With fewer than `n_least` sequences the result would be useless: a context like the old one is then reopened,
        and the result is False. Raises DeviceError when there is not enough memory for one sequence.
        """
        n_old_cells, n_old = self.n_cells, len(self._sequences)
        with MovedStates() as states:
            self._save(states, n_cells)
            self.close()
            try:
                while (error := self._try_open(n_cells, n_sequences)) is not None:
                    self._most_cells = min(self._most_cells, n_cells * n_sequences - 1)
                    n_sequences = min(n_sequences - 1, self._most_cells // n_cells)
                    if n_sequences < n_least:
                        if n_least == 1:
                            raise error
                        self._context = self._open_context(n_old_cells, n_old)
                        self._restore(states)
                        return False
            except BaseException:
                for sequence in self._sequences:
                    self._lose(sequence)
                raise
            self._arrange(n_sequences)
            self._restore(states)
        return True

    def _try_open(self, n_cells: int, n_sequences: int) -> DeviceError | None:
        try:
            self._context = self._open_context(n_cells, n_sequences)
        except DeviceError as error:
            return error
        return None

    def _arrange(self, n_sequences: int) -> None:
        """Keeps as many sequences as the context has: first those in use, oldest request first, then the most recently
        used."""
        ranked = sorted(self._sequences, key=lambda s: (not s.in_use, s.last_used if s.in_use else -s.last_used))
        for sequence in ranked[n_sequences:]:
            self._lose(sequence)
        self._sequences = sorted(ranked[:n_sequences], key=lambda s: s.id)
        self._sequences += [CachedSequence(number) for number in range(len(self._sequences), n_sequences)]
        for number, sequence in enumerate(self._sequences):
            sequence.id = number

    def _save(self, states: MovedStates, n_cells: int) -> None:
        """Saves the contents of the sequences, cut to `n_cells` each."""
        context = self._context
        for sequence in self._sequences:
            if sequence.n_tokens > n_cells:
                self._cut(sequence, n_cells)
            if context is not None and sequence.batches and sequence not in self._copied:
                states.save(sequence, context.state(sequence.id))

    def _restore(self, states: MovedStates) -> None:
        """Restores the saved contents. Sequences whose state is missing or refused are lost."""
        for sequence in self._sequences:
            if not sequence.batches:
                continue
            state = states.load(sequence)
            try:
                if state is not None:
                    self.context.restore(sequence.id, state)
                    continue
            except DeviceError:
                self.context.truncate(sequence.id, 0)
            self._lose(sequence)
