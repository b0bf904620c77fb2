"""Schedules sequences: admits requests, prefills their prompts in chunks, and decodes their answers together.

Plain logic on a KV cache and a context. It knows no thread, no file and no model, so tests run it on a fake context of
a few lines. What a step computes for one sequence does not depend on the others: a prompt is cut into the same chunks
as when it runs alone, and each sequence adds its own rows to a batch.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np

from granite4v.ggml.backend import Aborted
from granite4v.runtime.engine.cached_sequence import Batch, CachedSequence
from granite4v.runtime.engine.kv_cache import KvCache
from granite4v.runtime.engine.sequence import Step
from granite4v.runtime.engine.step import Limits, Part, filled, joined, plan_step
from granite4v.runtime.engine.step_costs import StepCosts
from granite4v.runtime.engine.stored_pages import StoredPrefix
from granite4v.runtime.engine.task import Chunk, Resources, Task, chunks_after, n_alike, plan_prefill
from granite4v.runtime.llama.context import BatchRows
from granite4v.runtime.prompt.spans import ImageSpan, TextSpan


@dataclass
class Counters:
    """Totals since the model was loaded: rows of prompts and of answers, decode calls and their seconds, draft tokens
    and how many of them were accepted, and requests that lost their sequence to another because nobody read their
    answers."""

    n_prefilled: int = 0
    n_decoded: int = 0
    n_steps: int = 0
    decode_s: float = 0.0
    n_drafted: int = 0
    n_accepted: int = 0
    n_preempted: int = 0


class Scheduler:
    """Runs any number of tasks, as many at once as the cache has sequences. Not thread-safe."""

    def __init__(
        self,
        cache: KvCache,
        resources: Resources,
        n_ubatch: int,
        *,
        least_rows: int = 1,
        fills_questions: bool = False,
        most_rows: int | None = None,
        costs: StepCosts | None = None,
    ) -> None:
        """`n_ubatch`: the most rows of one call, and the most prompt rows that one step computes while others wait.
        `least_rows`: minimum rows of a decode step when there are several sequences; 2 where a row's values depend on
        whether it is alone. `fills_questions`: whether text at the end of a prompt is padded with rows that are cut off
        again, where attention takes less time for that many rows. `most_rows`: maximum rows of a decode step, beyond
        which a row's values would depend on their number. `costs`: step costs known in advance."""
        self._cache, self._resources, self._n_ubatch, self._least_rows = cache, resources, n_ubatch, least_rows
        self._most_rows = min(n_ubatch, most_rows or n_ubatch)
        self.costs = costs or StepCosts()
        self._fills_questions = fills_questions
        self._waiting: list[Task] = []
        self._running: list[Task] = []
        self.counters = Counters()

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not self._running

    @property
    def n_tasks(self) -> int:
        return len(self._waiting) + len(self._running)

    def add(self, task: Task) -> None:
        self._wait(task, len(self._waiting))

    def step(self) -> bool:
        """Does the next piece of work. Returns False if there is none until a consumer reads on or cancels."""
        self._end_cancelled()
        self._restart_lost()
        n_before = self.n_tasks
        restarted = self._admit()
        decoded = self._decode()
        prefilled = self._prefill()
        return restarted or decoded or prefilled or self.n_tasks < n_before

    def end_all(self, error: BaseException) -> None:
        if not isinstance(error, Exception):  # e.g. KeyboardInterrupt, which readers would take for their own
            error = RuntimeError(f"the engine was interrupted: {error!r}")
        for task in [*self._waiting, *self._running]:
            with contextlib.suppress(BaseException):  # a task that fails to end must not keep the others from ending
                self._cancel(task, error)

    # --- admission and ending ---

    def _end_cancelled(self) -> None:
        for task in [*self._waiting, *self._running]:
            if task.channel.is_cancelled:
                self._cancel(task)

    def _cancel(self, task: Task, error: BaseException | None = None) -> None:
        try:
            task.channel.put(task.advances.cancel().text)
        finally:
            self._finish(task, error)

    def _finish(self, task: Task, error: BaseException | None = None) -> None:
        for tasks in (self._waiting, self._running):
            if task in tasks:
                tasks.remove(task)
        try:
            self._leave(task)
        finally:
            task.channel.finish(error)

    def _wait(self, task: Task, place: int) -> None:
        # tokens generated before the task lost its sequence are now part of its prompt
        spans = (*task.spans, TextSpan(tuple(task.tokens))) if task.tokens else task.spans
        task.planned = plan_prefill(spans, self._n_ubatch)
        self._waiting.insert(place, task)

    def _leave(self, task: Task) -> None:
        """Takes a task out of the cache and drops its remaining chunks."""
        sequence, task.sequence = task.sequence, None
        task.rows, task.logits = None, None
        task.chunks.clear()
        if sequence is not None:
            self._cache.release(sequence)

    def _admit(self) -> bool:
        """Starts the waiting tasks that there is room for. Returns True if running tasks lost their sequences in the
        process and are waiting again: the next step can start them even if nothing else happens."""
        restarted = False
        for task in list(self._waiting):
            if task.channel.is_full:  # preempted, and still nobody reads
                continue
            if self._shares_with_another(task):
                continue
            try:
                admitted = self._start(task)
            except Aborted:
                continue  # cancelled: the next step handles it
            except Exception as error:
                self._finish(task, error)
                admitted = True
            restarted = self._restart_lost() or restarted
            if not admitted:
                break  # first come, first served
        return restarted

    def _shares_with_another(self, task: Task) -> bool:
        """Whether a prompt that is being prefilled shares a longer prefix with this task than the cache has. Prompts
        are computed one after another, so waiting costs nothing, and the shared rows are computed only once."""
        beside = [other for other in self._running if other.chunks and other.adapter == task.adapter]
        if not beside:
            return False
        plan = task.plan()
        n_shared = max(n_alike(other.held.plan, plan) for other in beside)
        return n_shared > self._cache.n_reusable(plan, adapter=task.adapter)

    def _start(self, task: Task) -> bool:
        """Gives a task a sequence. Returns False if there is none for it."""
        if self._cache.n_in_use >= self._cache.n_seq_max and not self._preempt():
            return False
        plan = task.plan()
        stored = self._resources.find_stored(task, self._cache.n_reusable(plan, adapter=task.adapter))
        self._resources.prepare(task, stored.n_tokens if stored is not None else 0)
        while (sequence := self._acquire(task, plan, stored)) is None:
            if not self._preempt():
                return False
        task.sequence, task.n_pending = sequence, 0
        n_known = sequence.n_tokens
        if not task.was_started:  # on a restart, the prefix was computed by this task itself
            task.answer.timings.n_stored = n_known if stored is not None and stored.is_taken else 0
            task.answer.timings.n_reused = n_known - task.answer.timings.n_stored
        task.was_started = True
        task.logits = sequence.known_logits(plan)
        if task.logits is None:
            task.chunks.extend(chunks_after(task.planned, n_known))
            sequence.plan, sequence.logits = plan, None
        task.channel.report("prefill", n_known, sum(batch.n_tokens for batch in plan))
        self._waiting.remove(task)
        self._running.append(task)
        return True

    def _acquire(self, task: Task, plan: SequenceOf[Batch], stored: StoredPrefix | None) -> CachedSequence | None:
        n_new = task.max_tokens - len(task.tokens)
        n_wanted = self.n_tasks + self._resources.n_arriving()
        if stored is None:
            return self._cache.acquire(plan, n_new, adapter=task.adapter, n_wanted=n_wanted)
        task.channel.report("stored", 0, 1)
        start = time.perf_counter()
        with self._resources.computing([task]):
            sequence = self._cache.acquire(plan, n_new, adapter=task.adapter, n_wanted=n_wanted, stored=stored)
        task.answer.timings.load_s += time.perf_counter() - start
        return sequence

    def _preempt(self) -> bool:
        """Takes the sequence of a task whose consumer reads nothing, so that others can run. The task restarts, with
        what it has generated so far, when somebody reads. Returns False if there is no such task."""
        for task in self._running:
            if task.channel.is_full:
                self._running.remove(task)
                self._leave(task)
                self._wait(task, len(self._waiting))
                self.counters.n_preempted += 1
                return True
        return False

    def _restart_lost(self) -> bool:
        """Requeues tasks whose sequences were lost when the cache was resized. Returns whether there were any."""
        lost = [task for task in self._running if task.sequence is not None and task.sequence.is_lost]
        for place, task in enumerate(lost):
            self._running.remove(task)
            self._leave(task)
            self._wait(task, place)
        return bool(lost)

    # --- computing ---

    def _prefill(self) -> bool:
        """Computes chunks of prompts, in the order of the requests, until the step's row budget is used up."""
        budget, done = self._n_ubatch, False
        while budget > 0:
            task = next((task for task in self._running if task.is_prefilling), None)
            n_rows = task.chunks[0].batch.n_tokens if task is not None and task.chunks else 0
            if task is None or (done and n_rows > budget) or task.channel.is_cancelled:
                break
            budget -= max(n_rows, 1)
            done = True
            try:
                logits = self._prefill_chunk(task)
            except Aborted:
                break
            except Exception as error:
                self._finish(task, error)
                continue
            if logits is not None:
                self._resources.prefilled(task)
                self._advance(task, logits)
        return done

    def _prefill_chunk(self, task: Task) -> np.ndarray | None:
        """Computes a task's next chunk. Returns the logits after the prompt if it was the last one."""
        if task.logits is not None:
            logits, task.logits = task.logits, None
            return logits
        sequence, chunk = task.held, task.chunks[0]
        n, is_last = chunk.batch.n_tokens, len(task.chunks) == 1
        data = self._data(task, chunk)
        n_rows = self._n_filled(sequence, n) if is_last and isinstance(chunk.span, TextSpan) else n
        self._resources.look([task])
        timings, start = task.answer.timings, time.perf_counter()
        rows = BatchRows.of(
            np.resize(data, n_rows) if n_rows > n else data, sequence.n_tokens, sequence.id, output=False
        )
        rows.outputs[n - 1] = is_last
        self._compute(rows, [task], is_prompt=True)
        elapsed = time.perf_counter() - start
        if isinstance(chunk.span, ImageSpan):
            timings.prefill_image_s += elapsed
        else:
            timings.prefill_text_s += elapsed
        self._cache.append(sequence, Batch(chunk.batch.keys))
        if n_rows > n:
            self._cache.truncate(sequence)
        task.chunks.popleft()
        self.counters.n_prefilled += n
        task.channel.report("prefill", sequence.n_tokens, sum(batch.n_tokens for batch in sequence.plan))
        if isinstance(chunk.span, ImageSpan) and chunk.start + n == chunk.span.n_tokens:
            self._resources.store(task)
        if not is_last:
            return None
        task.rows = None  # a page's embeddings take 0.1 GB, which many answers would otherwise hold until they end
        sequence.logits = self._cache.context.logits(n - 1)
        return sequence.logits.copy()

    def _n_filled(self, sequence: CachedSequence, n: int) -> int:
        if not (self._fills_questions and self._cache.can_cut):
            return n
        return filled(n, min(self._n_ubatch, self._cache.context.n_cells - sequence.n_tokens))

    def _data(self, task: Task, chunk: Chunk) -> np.ndarray:
        span = chunk.span
        if not isinstance(span, ImageSpan):
            return np.asarray(chunk.batch.keys, dtype=np.int32)
        if task.rows is None or task.rows[0] != span.digest:
            task.rows = (span.digest, self._resources.rows(task, span))
        return task.rows[1][chunk.start : chunk.start + chunk.batch.n_tokens]

    def _decode(self) -> bool:
        """Runs one decode step, for every answer that can go on and has the adapter state of the one that has waited
        longest."""
        ready = [task for task in self._running if task.n_pending and not task.channel.is_full]
        if not ready:
            return False
        ready.sort(key=lambda task: task.last_step)
        if not self._make_room(ready):
            return True
        limits = self._limits()
        ready = [task for task in ready if task.adapter == ready[0].adapter][: min(limits.rows, limits.outputs)]
        parts = plan_step(ready, self._between(ready), self.costs, limits)
        tasks = [part.task for part in parts if part.task is not None]
        rows, starts = joined(parts, limits.least)
        try:
            self._resources.look(tasks)
            start = time.perf_counter()
            self._compute(rows, tasks, is_prompt=False)
        except Aborted:
            return True
        except Exception as error:
            for task in tasks:
                self._finish(task, error)
            return True
        finally:
            for part in parts:
                if part.task is None:
                    self._cache.truncate(part.sequence)
        elapsed = time.perf_counter() - start
        self.costs.note(len(rows), elapsed)
        self.counters.n_steps += 1
        self.counters.decode_s += elapsed
        for part, first in zip(parts, starts, strict=True):
            if part.task is not None:
                part.task.answer.timings.decode_s += elapsed
                self._take_over(part.task, part, first)
        return True

    def _limits(self) -> Limits:
        context = self._cache.context
        least = self._least_rows if self._cache.n_sequences > 1 else 1
        return Limits(self._most_rows, context.max_outputs, context.n_cells, least, self._cache.can_cut)

    def _make_room(self, ready: SequenceOf[Task]) -> bool:
        """Makes room in the cache for the pending tokens of these tasks. Returns False if tasks lost their sequences
        for it; they wait again."""
        for task in ready:
            try:
                n_rows = max(self._least_rows, min(task.n_pending, self._most_rows))
                if self._cache.ensure_room(task.held, n_rows):
                    continue
            except Exception as error:  # not enough memory even for this one alone
                self._finish(task, error)
            self._restart_lost()
            return False
        return True

    def _between(self, ready: SequenceOf[Task]) -> list[CachedSequence]:
        """The sequences whose numbers lie in the gaps of a batch. llama.cpp passes over all weights once for each run
        of neighbouring sequences, so a filler token that is cut off again costs less than a gap.

        For example, if sequences 1, 2 and 5 are ready, 3 and 4 are returned: one pass over the weights instead of two.
        """
        numbers = {task.held.id for task in ready}
        return [self._cache.sequence(n) for n in range(min(numbers), max(numbers)) if n not in numbers]

    def _take_over(self, task: Task, part: Part, first: int) -> None:
        """Takes over the results of a step: records the rows of a sequence that are kept, and adds the tokens that
        follow from them. `first`: index of its first row in the batch."""
        task.last_step = self.counters.n_steps
        task.n_pending -= len(part.pending)
        error, finished, n_accepted = None, False, 0
        if part.is_complete:
            task.answer.timings.n_steps += 1
            error, finished, n_accepted = self._verify(task, part.draft, first + len(part.pending) - 1)
        kept = part.tokens[: len(part.pending) + n_accepted]
        self._cache.append(part.sequence, Batch(kept))
        if len(kept) < part.n_rows:
            self._cache.truncate(part.sequence)
        self.counters.n_decoded += len(kept)
        task.answer.timings.n_decoded += len(kept)
        if error is not None or finished:
            self._finish(task, error)

    def _verify(self, task: Task, draft: SequenceOf[int], row: int) -> tuple[Exception | None, bool, int]:
        """Advances an answer by the logits of `row`, the row of its last token, and then by those of the draft's rows
        after it for as long as the draft agrees with the answer. Returns the answer's error if it failed, whether it
        has ended, and how many draft tokens were accepted.

        For example, with the draft a b c: the logits of `row` give a (accepted), those of a's row give x. The answer
        grows by a and x. The rows of b and c are cut off, and x is pending.
        """
        error, finished, n_accepted = None, False, 0
        try:
            while True:
                step = task.advances.advance(self._cache.context.logits(row + n_accepted))
                n_equal = _n_equal(step.tokens, draft[n_accepted:])
                n_accepted += n_equal
                self._add(task, step, n_equal)
                finished = bool(step.finish)
                if finished or not n_equal or n_equal < len(step.tokens):
                    break
        except Exception as raised:  # including non-finite logits, from a damaged file
            error = raised
        if draft:
            for counters in (self.counters, task.answer.timings):
                counters.n_drafted += len(draft)
                counters.n_accepted += n_accepted
        return error, finished, n_accepted

    def _compute(self, rows: BatchRows, tasks: SequenceOf[Task], *, is_prompt: bool) -> None:
        """Decodes rows. On failure the sequences are as they were before."""
        context = self._cache.context
        try:
            with self._resources.computing(tasks):
                context.set_adapter(tasks[0].adapter)
                context.decode(rows, is_prompt=is_prompt)
        except BaseException:
            for task in tasks:
                self._cache.truncate(task.held)
            raise

    def _advance(self, task: Task, logits: np.ndarray) -> None:
        """Generates the first tokens of an answer from the logits after its prompt."""
        try:
            step = task.advances.advance(logits)
        except Exception as error:
            self._finish(task, error)
            return
        self._add(task, step)
        if step.finish:
            self._finish(task)

    def _add(self, task: Task, step: Step, n_decoded: int = 0) -> None:
        """Adds what an answer has grown by. The first `n_decoded` of its new tokens are already decoded."""
        task.tokens += step.tokens
        task.n_pending = len(step.tokens) - n_decoded
        task.channel.put(step.text)


def _n_equal(tokens: SequenceOf[int], others: SequenceOf[int]) -> int:
    """Length of the common prefix."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(tokens, others, strict=False))
    return sum(1 for _ in pairs)
