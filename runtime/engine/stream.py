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

QUEUE_SIZE = 256  # pieces of text that wait for a reader; a full queue pauses the sequence
_POLL_S = 0.05  # how often `cancel` is polled while nothing arrives
_WAIT_S = 1.0  # bounded only because on Windows a lock does not notice Ctrl-C

Cancel = Callable[[], bool]
Progress = Callable[[str, int, int], None]  # (stage, done, total)


class Wake(Protocol):
    """Notifies the producer that it has something to do."""

    def __call__(self, *, blocking: bool = True) -> None:
        """Without `blocking` it waits for no lock; the producer then notices within a second."""
        ...


class Channel:
    """A bounded queue of text pieces with an end, between one producer (the engine) and one consumer.

    The producer never waits: it checks `is_full` before it produces more. `wake` is called in the consumer's thread
    when the producer has something to do: a piece was taken from a full queue, or the answer was cancelled. `listener`
    is called in the producer's thread when the consumer has something to read; it must not block or raise.
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
        """Reports progress before the answer begins. A slow consumer sees only the latest report."""
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
        """Returns the next piece, None if there is none yet, and the progress if there is any. Raises StopIteration at
        the end; if an error ended the answer, the error is raised once instead."""
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
        """Discards pieces from now on, so that the answer grows without a reader: for callers who want only the
        complete answer."""
        with self._changed:
            self._keeps_pieces = False
            self._pieces.clear()
        self._wake()

    def cancel(self) -> None:
        if os.getpid() != self._pid:  # a forked process has a copy of this but no engine, and locks may be held forever
            return
        with self._changed:
            if self.is_done or self.is_cancelled:
                return
            self.is_cancelled = True
        self._wake()

    def drop(self) -> None:
        """Cancels, and discards unread pieces."""
        self.cancel()
        if os.getpid() == self._pid:
            with self._changed:
                self._keeps_pieces = False
                self._pieces.clear()

    def abandon(self) -> None:
        """Does what `drop` does, for a finalizer. The garbage collector may run it at any moment in any thread, even in
        one that holds a lock of another channel or of the engine, so it waits for no lock."""
        if os.getpid() == self._pid and not self.is_done:
            self._keeps_pieces, self.is_cancelled = False, True
            self._wake(blocking=False)

    def wait(self) -> None:
        """Waits until the engine is done with the answer."""
        if os.getpid() != self._pid:
            return
        with self._changed:
            while not self.is_done:
                self._changed.wait(_WAIT_S)


class Stream:
    """Iterator over the pieces of an answer as they are generated, for one thread.

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
        """`cancel` and `progress` are called in the reading thread. `check` is called before each
        read and may raise."""
        self._channel, self._cancel, self._progress, self._check = channel, cancel, progress, check
        self._finalizer = weakref.finalize(self, channel.abandon)
        self._finalizer.atexit = False  # the engine is stopped at exit anyway

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
        """Returns the next piece. Raises the error that ended the answer: ModelFileError, DeviceError, ConstraintError,
        or ValueError for a model that was closed."""
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
        except BaseException:  # Ctrl-C, or an error in a callback: nobody will read on
            self.close()
            raise

    def let_run(self) -> None:
        """Lets the answer grow without a reader: pieces are discarded, only `answer` is kept. For use with `poll`."""
        self._channel.take_all()

    def poll(self) -> bool:
        """Returns whether the answer is complete, without waiting. Calls `progress`, and raises what reading raises.
        One thread can follow many streams this way, if each is submitted with a `listener` that says when to poll."""
        if self._check is not None:
            self._check()
        while True:  # the end may follow a progress report, and the listener is called for it only once
            try:
                piece, progress = self._channel.take(0)
            except StopIteration:
                return True
            if progress is not None and self._progress is not None:
                _called(self._progress, *progress)
            if piece is None and progress is None:
                return False

    def cancel(self) -> None:
        """Stops the answer soon, from any thread; pieces already generated can still be read."""
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
    """Calls a callback and returns its result. A StopIteration from it would look like the end of the answer, so it
    becomes a RuntimeError, as in a generator."""
    try:
        return callback(*arguments)
    except StopIteration as error:
        raise RuntimeError("a callback raised StopIteration") from error
