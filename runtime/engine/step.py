"""Plans one decode step: which sequences it computes, and how many rows of each.

llama.cpp passes over all weights once for each run of neighbouring sequences with the same number of rows. So all
sequences of a step get the same number of rows: their pending tokens, then draft tokens, then fillers that are cut off
again. The number is chosen by how many tokens it is expected to yield and by what steps of that size have cost.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from granite4v.runtime.engine.cached_sequence import CachedSequence
from granite4v.runtime.engine.draft import Draft
from granite4v.runtime.engine.step_costs import StepCosts
from granite4v.runtime.engine.task import Task
from granite4v.runtime.llama.context import BatchRows

# From this many rows of one sequence on, llama.cpp's attention on the CPU computes them in tiles: 64 rows of a 4B model
# after 1,000 tokens take as long as 33, and 63 take half as long again. The values differ from those of fewer rows by
# rounding.
TILE = 64
MAX_DRAFT = TILE - 1  # draft tokens of one answer in a step
MAX_DRAFTED_ROWS = 64  # rows of a step with drafts, all sequences together


@dataclass(frozen=True)
class Limits:
    """Limits of a step. `rows`: most rows of a call. `outputs`: most rows of logits of a call. `cells`: size of a
    sequence. `least`: minimum number of rows, and of rows of logits. `can_cut`: whether the end of a sequence can be
    cut off."""

    rows: int
    outputs: int
    cells: int
    least: int = 1
    can_cut: bool = True


@dataclass(frozen=True)
class Part:
    """The rows of one sequence in a step: `tokens` that follow its contents, the last `n_drafted` of them a draft, then
    fillers up to `n_rows`. `is_complete`: it contains all pending tokens, so logits are needed from the last of these
    on."""

    sequence: CachedSequence
    tokens: tuple[int, ...] = ()
    n_drafted: int = 0
    n_rows: int = 1
    is_complete: bool = False
    task: Task | None = None  # None: it only closes the gap between two others

    @property
    def pending(self) -> tuple[int, ...]:
        return self.tokens[: len(self.tokens) - self.n_drafted]

    @property
    def draft(self) -> tuple[int, ...]:
        return self.tokens[len(self.pending) :]


def plan_step(ready: Sequence[Task], between: Sequence[CachedSequence], costs: StepCosts, limits: Limits) -> list[Part]:
    """Plans the parts of a step, sorted by sequence number.

    `ready`: tasks with pending tokens, the most urgent first; `between`: sequences in the gaps between theirs.
    """
    if not limits.can_cut:
        return _uncut(ready, limits)
    room = min(limits.cells - sequence.n_tokens for sequence in (*(task.held for task in ready), *between))
    n_sequences = len(ready) + len(between)
    if room < 1 or n_sequences > limits.rows:  # the gaps cannot be closed
        between, n_sequences = (), len(ready)
        room = min(limits.cells - task.held.n_tokens for task in ready)
    most = min(room, limits.rows // n_sequences)
    if limits.least > 1:  # values must not depend on what else is computed, so no tiled attention
        most = min(most, TILE - 1)
    n_draft = min(MAX_DRAFT, most - 1, MAX_DRAFTED_ROWS // n_sequences - 1)
    drafts = [task.advances.draft(n_draft) if n_draft > 0 else Draft((), ()) for task in ready]
    n_rows = _choose(ready, drafts, costs, n_sequences, most, limits)
    parts = [Part(sequence, n_rows=n_rows) for sequence in between]
    for task, draft in zip(ready, drafts, strict=True):
        pending = task.pending[:n_rows]
        is_complete = len(pending) == task.n_pending
        n_drafted = min(len(draft.tokens), n_rows - len(pending)) if is_complete else 0
        tokens = (*pending, *draft.tokens[:n_drafted])
        parts.append(Part(task.held, tokens, n_drafted, n_rows, is_complete, task))
    return sorted(parts, key=lambda part: part.sequence.id)


def joined(parts: Sequence[Part], least: int) -> tuple[BatchRows, list[int]]:
    """Joins the parts into one batch. Returns it, and the index of each part's first row.

    If any logits are needed, at least `least` rows get logits. For example, tokens p (pending), d (draft) and two
    fillers in a complete part give the rows p d 0 0, with logits for p and d.
    """
    # built as lists: a step has so few rows that an array for each part would cost more
    data, positions, sequences, outputs, starts = list[int](), list[int](), list[int](), list[bool](), list[int]()
    for part in parts:
        n, n_held, n_given = part.n_rows, part.sequence.n_tokens, len(part.tokens)
        first_output = n_given - part.n_drafted - 1 if part.is_complete else n
        starts.append(len(data))
        data += (*part.tokens, *(n - n_given) * (0,))
        positions += range(n_held, n_held + n)
        sequences += n * (part.sequence.id,)
        outputs += (first_output <= row < n_given for row in range(n))
    wanted = np.array(outputs, dtype=bool)
    n_missing = least - int(wanted.sum())
    if 0 < n_missing < least:
        wanted[np.flatnonzero(~wanted)[:n_missing]] = True
    tokens, places, numbers = (np.array(values, dtype=np.int32) for values in (data, positions, sequences))
    return BatchRows(tokens, places, numbers, wanted), starts


def _uncut(ready: Sequence[Task], limits: Limits) -> list[Part]:
    """Plans a step of pending tokens alone, for a cache whose sequences cannot be cut."""
    parts, room = [], limits.rows
    for task in ready:
        tokens = tuple(task.pending[:room])
        if tokens:
            parts.append(Part(task.held, tokens, 0, len(tokens), len(tokens) == task.n_pending, task))
        room -= len(tokens)
    return sorted(parts, key=lambda part: part.sequence.id)


def _choose(
    ready: Sequence[Task], drafts: Sequence[Draft], costs: StepCosts, n_sequences: int, most: int, limits: Limits
) -> int:
    """Returns the number of rows per sequence with the most expected tokens per second."""
    drafted = [*zip(ready, drafts, strict=True)]
    longest_draft = max(task.n_pending + len(draft.tokens) for task, draft in drafted)
    least = 1 if n_sequences >= limits.least else min(limits.least, most)
    numbers = {*range(1, min(longest_draft, TILE) + 1), *(task.n_pending for task in ready), longest_draft, least}
    expected = [(task.n_pending, [*itertools.accumulate(draft.chances, initial=0.0)]) for task, draft in drafted]
    best, best_rate = least, 0.0
    for n in sorted({filled(number, most) for number in numbers if least <= number <= most}):
        if n * len(ready) > limits.outputs and _n_outputs(ready, drafts, n) > limits.outputs:
            continue
        n_kept = sum(_n_kept(n_pending, chances, n) for n_pending, chances in expected)
        rate = n_kept / costs.seconds(n * n_sequences)
        if rate > best_rate:
            best, best_rate = n, rate
    return best


def filled(n_rows: int, most: int) -> int:
    """Returns this number of rows, or `TILE` where that takes no longer (from 33 rows on, if `most` allows it)."""
    return TILE if TILE // 2 < n_rows < TILE <= most else n_rows


def _n_kept(n_pending: int, chances: Sequence[float], n_rows: int) -> float:
    """Expected number of tokens that a step advances a task by. `chances`: cumulative sums of its draft's, from 0."""
    return min(n_pending, n_rows) + chances[min(max(0, n_rows - n_pending), len(chances) - 1)]


def _n_outputs(ready: Sequence[Task], drafts: Sequence[Draft], n_rows: int) -> int:
    counts = (
        1 + min(len(draft.tokens), n_rows - task.n_pending)
        for task, draft in zip(ready, drafts, strict=True)
        if task.n_pending <= n_rows
    )
    return sum(counts)
