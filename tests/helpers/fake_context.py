"""A minimal fake of a llama.cpp context: it records the content of each sequence, and its logits depend on nothing
else."""

from __future__ import annotations

import contextlib
import hashlib
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from granite4v.errors import DeviceError
from granite4v.runtime.answer import Answer
from granite4v.runtime.engine.kv_cache import KvCache
from granite4v.runtime.engine.sampler import Sampling
from granite4v.runtime.engine.scheduler import Scheduler
from granite4v.runtime.engine.sequence import Advances
from granite4v.runtime.engine.sequence import Sequence as AnswerSequence
from granite4v.runtime.engine.stored_pages import StoredPages, StoredPrefix
from granite4v.runtime.engine.stream import Channel
from granite4v.runtime.engine.task import Task
from granite4v.runtime.llama.context import BatchRows
from granite4v.runtime.prompt.spans import ImageSpan, Span

N_VOCAB, EOS = 64, 63
MAX_OUTPUTS, N_UBATCH = 8, 16


def next_token(content: Sequence[Any]) -> int:
    """Returns the token that follows a content; about one in thirty is the end of an answer."""
    number = int.from_bytes(hashlib.sha256(repr(list(content)).encode()).digest()[:4], "little")
    return EOS if number % 30 == 0 else number % EOS


class Letters:
    """A text stream in which each token is one letter."""

    def push(self, token: int) -> str:
        return chr(ord("0") + token)

    def flush(self) -> str:
        return ""


def text_of(tokens: Sequence[int]) -> str:
    return "".join(map(Letters().push, tokens))


class FakeContext:
    """Asserts the preconditions that llama.cpp checks and would end the process over."""

    def __init__(self, n_cells: int, n_seq_max: int, n_ubatch: int = N_UBATCH) -> None:
        self.n_cells, self.n_seq_max, self.n_ubatch, self.max_outputs = n_cells, n_seq_max, n_ubatch, MAX_OUTPUTS
        self.content: list[list[Any]] = [[] for _ in range(n_seq_max)]
        self.copies: set[int] = set()
        self.batches: list[BatchRows] = []
        self.adapter, self.closed = False, False
        self._logits: dict[int, int] = {}

    def set_adapter(self, on: bool) -> None:
        self.adapter = on

    def decode(self, rows: BatchRows, *, is_prompt: bool = False) -> None:
        assert not self.closed and 0 < len(rows) <= self.n_ubatch
        assert rows.outputs.sum() <= MAX_OUTPUTS
        numbers = rows.sequences.tolist()
        assert numbers == sorted(numbers)
        self.batches.append(rows)
        self._logits, self.copies = {}, set()
        for i, (value, position, number) in enumerate(zip(rows.data, rows.positions, numbers, strict=True)):
            content = self.content[number]
            assert position == len(content) < self.n_cells
            content.append((int(value) if rows.data.ndim == 1 else ("image", float(value[0])), self.adapter))
            if rows.outputs[i]:
                self._logits[i] = next_token(content)

    def logits(self, row: int) -> np.ndarray:
        logits = np.zeros(N_VOCAB, dtype=np.float32)
        logits[self._logits[row]] = 1
        return logits

    def truncate(self, sequence: int, n_tokens: int) -> bool:
        assert not self.closed
        del self.content[sequence][n_tokens:]
        return True

    def copy(self, source: int, target: int, n_tokens: int) -> None:
        self.content[target] = self.content[source][:n_tokens]
        self.copies.add(target)

    def state(self, sequence: int) -> np.ndarray:
        assert not self.closed and sequence not in self.copies
        return np.frombuffer(pickle.dumps(self.content[sequence]), dtype=np.uint8)

    def restore(self, sequence: int, state: np.ndarray) -> None:
        content = pickle.loads(state.tobytes())
        assert 0 < len(content) <= self.n_cells and not self.content[sequence]
        assert not self.copies  # llama.cpp makes them at the next decode, with the restored state as target or source
        self.content[sequence] = content

    def close(self) -> None:
        self.closed = True


class FakeEngine:
    """A scheduler on fake contexts, stepped by the test. An image is its digest; the first byte of the digest fills its
    rows."""

    def __init__(
        self,
        n_ctx: int = 256,
        n_seq_max: int = 4,
        most_cells: int = 1 << 20,
        budget: int | None = None,
        pages: StoredPages | None = None,
        n_ubatch: int = N_UBATCH,
        fills_questions: bool = False,
    ) -> None:
        """`most_cells`: the number of cells that fit into memory. `budget`: the limit for several sequences that the
        cache is given."""
        self.pages, self.n_ubatch = pages, n_ubatch
        self.contexts: list[FakeContext] = []
        self.most_cells = most_cells
        self.n_encoded = 0
        self.cache = KvCache(self._open, n_ctx, n_seq_max, most_cells=budget)
        self.scheduler = Scheduler(self.cache, self, n_ubatch, fills_questions=fills_questions)

    def _open(self, n_cells: int, n_sequences: int) -> FakeContext:
        assert not self.contexts or self.contexts[-1].closed  # never two open at once
        if n_cells * n_sequences > self.most_cells:
            raise DeviceError(f"no memory for {n_sequences} x {n_cells} tokens")
        self.contexts.append(FakeContext(n_cells, n_sequences, self.n_ubatch))
        return self.contexts[-1]

    def submit(
        self,
        *spans: Span,
        max_tokens: int = 20,
        adapter: bool = False,
        size: int = 256,
        advances: Advances | None = None,
    ) -> Channel:
        channel = Channel(Answer(), lambda blocking=True: None, size=size)
        answer = AnswerSequence(
            channel.answer, Letters(), sampling=Sampling(), stop_tokens=frozenset({EOS}), max_tokens=max_tokens
        )
        self.scheduler.add(Task(spans, advances or answer, channel, max_tokens=max_tokens, adapter=adapter))
        return channel

    def run(self) -> None:
        """Runs steps until nothing is left to do."""
        while self.scheduler.step():
            pass

    def find_stored(self, task: Task, n_known: int) -> StoredPrefix | None:
        if self.pages is None:
            return None
        return self.pages.find(
            task.plan(), n_known, adapter=task.adapter, announce=lambda text: None, check=lambda: None
        )

    def prepare(self, task: Task, n_stored: int) -> None: ...

    def store(self, task: Task) -> None:
        if self.pages is not None:
            held, context = task.held, self.cache.context
            self.pages.save(task.plan(), len(held.batches), lambda: context.state(held.id), adapter=task.adapter)

    def look(self, tasks: Sequence[Task]) -> None:
        pass

    def rows(self, task: Task, span: ImageSpan) -> np.ndarray:
        self.n_encoded += 1
        return np.full((span.n_tokens, 1), span.digest[0], dtype=np.float32)

    def n_arriving(self) -> int:
        return 0

    def prefilled(self, task: Task) -> None: ...

    @contextlib.contextmanager
    def computing(self, tasks: Sequence[Task]) -> Iterator[None]:
        yield


def read(channel: Channel, most: int = 1 << 30) -> str:
    """Returns what can be read without waiting."""
    text = ""
    for _ in range(most):
        try:
            piece, progress = channel.take(0)
        except StopIteration:
            break
        if piece is None and progress is None:
            break
        piece = piece or ""
        text += piece
    return text


def expected(spans: Sequence[Span], max_tokens: int, adapter: bool = False) -> str:
    """Returns the answer that is given when nothing else runs."""
    content: list[Any] = []
    for span in spans:
        values = [("image", float(span.digest[0]))] * span.n_tokens if isinstance(span, ImageSpan) else span.tokens
        content += [(value, adapter) for value in values]
    tokens: list[int] = []
    while len(tokens) < max_tokens and (token := next_token(content)) != EOS:
        tokens.append(token)
        content.append((token, adapter))
    return text_of(tokens)
