"""Streams an answer from the engine's thread to the thread that reads it."""

from __future__ import annotations

import collections
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

from granite4v.runtime.answer import Answer

T = TypeVar("T")

QUEUE_SIZE = 256  # pieces of text that wait for a reader; the sequence pauses when there are as many
_POLL_S = 0.05  # how often `cancel` is asked while nothing arrives
_WAIT_S = 1.0  # waits are that short only for the sake of Windows, where a lock does not notice Ctrl-C

Cancel = Callable[[], bool]
Progress = Callable[[str, int, int], None]  # (stage, done, total)


class Wake(Protocol):
    """Tells the producer that it has something to do."""

    def __call__(self, *, blocking: bool = True) -> None:
        """Without `blocking` it waits for no lock; the producer then notices within a second."""
        ...


class Channel:
    """A bounded queue of pieces with an end, between one producer (the engine) and one consumer.

    The producer never waits: it asks `is_full` before it produces more. `wake` is called, from the consumer's thread,
    when the producer has something to do: a piece was taken from a full queue, or the answer was cancelled. `listener`
    is called, from the producer's thread, when the consumer has something to look at; it must not block or raise.
    """

    def __init__(
        self, answer: Answer, wake: Wake, *, size: int | None = None, listener: Callable[[], None] | None = None
    ) -> None:
        self.answer = answer
        self._listener = listener
        self._wake, self._size = wake, QUEUE_SIZE if size is None else size
        self._changed = threading.Condition()
        self._pieces: collections.deque[str] = collections.deque()
        self._progress: tuple[str, int, int] | None = None
        self._error: BaseException | None = None
        self._keeps_pieces = True
        self._pid = os.getpid()
        self.is_done = False
        self.is_cancelled = False

    # --- the engine's side ---

    @property
    def is_full(self) -> bool:
        return len(self._pieces) >= self._size

    def put(self, piece: str) -> None:
        if piece and self._keeps_pieces:
            with self._changed:
                self._pieces.append(piece)
                self._changed.notify_all()
        self._tell()

    def report(self, stage: str, done: int, total: int) -> None:
        """Progress of what comes before the answer. Only the latest is kept for a consumer that is slow."""
        with self._changed:
            self._progress = (stage, done, total)
            self._changed.notify_all()
        self._tell()

    def finish(self, error: BaseException | None = None) -> None:
        with self._changed:
            if not self.is_done:
                self._error, self.is_done = error, True
            self._changed.notify_all()
        self._tell()

    def _tell(self) -> None:
        if self._listener is not None:
            self._listener()

    # --- the consumer's side ---

    def take(self, timeout: float) -> tuple[str | None, tuple[str, int, int] | None]:
        """The next piece, None if there is none yet, and progress if there is any. Raises StopIteration at the end,
        and once what ended the answer if that was an error."""
        with self._changed:
            if not self._pieces and self._progress is None and not self.is_done:
                self._changed.wait(timeout)
            progress, self._progress = self._progress, None
            if self._pieces:
                was_full = self.is_full
                piece = self._pieces.popleft()
                if was_full:
                    self._wake()
                return piece, progress
            if self.is_done and progress is None:
                error, self._error = self._error, None
                if error is not None:
                    raise error
                raise StopIteration
            return None, progress

    def take_all(self) -> None:
        """Lets the answer grow without a reader from now on: for those who want nothing but its end."""
        with self._changed:
            self._keeps_pieces = False
            self._pieces.clear()
        self._wake()

    def cancel(self) -> None:
        if os.getpid() != self._pid:  # a forked process has a copy of this, and no engine; locks may be held for ever
            return
        with self._changed:
            if self.is_done or self.is_cancelled:
                return
            self.is_cancelled = True
        self._wake()

    def drop(self) -> None:
        """Cancels, and forgets what nobody has read."""
        self.cancel()
        if os.getpid() == self._pid:
            with self._changed:
                self._keeps_pieces = False
                self._pieces.clear()

    def abandon(self) -> None:
        """`drop` for a finalizer. The garbage collector runs it at any moment, in any thread, even in one that has a
        lock of another channel or of the engine, so it waits for no lock."""
        if os.getpid() == self._pid and not self.is_done:
            self._keeps_pieces, self.is_cancelled = False, True
            self._wake(blocking=False)

    def wait(self) -> None:
        """Until the engine is done with the answer."""
        if os.getpid() != self._pid:
            return
        with self._changed:
            while not self.is_done:
                self._changed.wait(_WAIT_S)


class Stream:
    """The pieces of an answer as they are generated, for one thread to iterate over.

    The answer is generated up to `QUEUE_SIZE` pieces ahead of the reader. Closing or dropping the stream cancels the
    answer. `answer` grows while the engine generates, and is complete when the iteration has ended.
    """

    def __init__(
        self,
        channel: Channel,
        *,
        cancel: Cancel | None = None,
        progress: Progress | None = None,
        check: Callable[[], None] | None = None,
    ) -> None:
        """`cancel` and `progress` are called in the reading thread. `check` may raise before each read."""
        self._channel, self._cancel, self._progress, self._check = channel, cancel, progress, check
        self._finalizer = weakref.finalize(self, channel.abandon)
        self._finalizer.atexit = False  # the engine is stopped at exit anyhow

    @property
    def answer(self) -> Answer:
        return self._channel.answer

    @property
    def is_done(self) -> bool:
        """Whether the answer is complete; there may still be pieces to read."""
        return self._channel.is_done

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        """Raises the error that ended it: ModelFileError, DeviceError, ConstraintError, or ValueError for a model that
        was closed."""
        if self._check is not None:
            self._check()
        timeout = _WAIT_S if self._cancel is None else _POLL_S
        try:
            while True:
                if self._cancel is not None and _called(self._cancel):
                    self._channel.drop()
                piece, progress = self._channel.take(timeout)
                if progress is not None and self._progress is not None:
                    _called(self._progress, *progress)
                if piece is not None:
                    return piece
        except StopIteration:
            raise
        except BaseException:  # Ctrl-C, or an error of a callback: nobody will read on
            self.close()
            raise

    def let_run(self) -> None:
        """Lets the answer grow without a reader: its pieces are not kept, only `answer`. For `poll`."""
        self._channel.take_all()

    def poll(self) -> bool:
        """Whether the answer is complete, without waiting. Calls `progress`, and raises what reading raises. One thread
        can so follow many streams, each submitted with a `listener` that tells when to look."""
        if self._check is not None:
            self._check()
        while True:  # the end may stand behind progress, and the listener is called for it once
            try:
                piece, progress = self._channel.take(0)
            except StopIteration:
                return True
            if progress is not None and self._progress is not None:
                _called(self._progress, *progress)
            if piece is None and progress is None:
                return False

    def cancel(self) -> None:
        """Stops the answer soon, from any thread; pieces that are already generated can still be read."""
        self._channel.cancel()

    def close(self) -> None:
        """Stops the answer and waits until it has ended."""
        self._channel.drop()
        self._channel.wait()

    def result(self) -> Answer:
        """Waits for the complete answer and returns it."""
        if self._check is not None:
            self._check()
        self._channel.take_all()
        for _ in self:
            pass
        return self.answer


def _called(callback: Callable[..., T], *arguments: object) -> T:
    """What a callback returns. Its StopIteration would pass for the end of the answer, so it becomes a RuntimeError,
    as in a generator."""
    try:
        return callback(*arguments)
    except StopIteration as error:
        raise RuntimeError("a callback raised StopIteration") from error
