"""The single thread that calls native code for a model, and its shutdown."""

from __future__ import annotations

import atexit
import functools
import os
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Protocol

from granite4v.errors import DeviceError
from granite4v.runtime.llama.abort import AbortFlag


class EngineThread:
    """Runs calls one after another. The first call starts the thread; it ends with `stop`, or when its owner is garbage
    collected.

    ggml's thread pool belongs to the thread that computes, so all calls come from the same one.
    """

    def __init__(self, name: str, abort: AbortFlag) -> None:
        self._name, self._abort, self._pid = name, abort, os.getpid()
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def check_process(self) -> None:
        """Raises DeviceError in a process that was forked from the one with the thread."""
        if not self.is_ours:  # locks may have been held at the fork, and the thread does not exist here
            raise DeviceError(
                f"this model was loaded by process {self._pid} and cannot be used in process {os.getpid()}, which was "
                "forked from it: its threads stayed behind. Load the model after the fork, or start processes with "
                "multiprocessing.get_context('spawn')."
            )

    @property
    def is_ours(self) -> bool:
        return os.getpid() == self._pid

    def run(self, call: Callable[[], None]) -> None:
        """Queues a call, which must not raise."""
        self._calls.put(call)
        if self._thread is None or self._thread.ident is None:  # None: Ctrl-C came before the thread had started
            self._thread = threading.Thread(target=_loop, args=(self._calls,), name=self._name, daemon=True)
            self._thread.start()

    def stop(self, last: Callable[[], None]) -> None:
        """Aborts the running call; the thread runs `last` and ends."""
        self._abort.raise_()
        self.run(last)
        self._calls.put(None)

    def join(self) -> None:
        """Waits for the thread to end, unless called from the thread itself."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def __del__(self) -> None:
        self._calls.put(None)  # the owner is gone, so nothing is running, and nobody waits for the thread


def _loop(calls: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    """Runs calls until None arrives. It refers to the model only through the calls, so it keeps no model alive between
    them."""
    while (call := calls.get()) is not None:
        call()
        del call


class _Closes(Protocol):
    def close(self) -> object: ...


def close_at_exit(owner: _Closes) -> None:
    """Closes `owner` when the process ends, if it still exists: a computation must not outlive the objects it uses."""
    _owners().add(owner)


@functools.cache
def _owners() -> weakref.WeakSet[_Closes]:
    """The owners to close at exit.

    `atexit` runs callbacks in reverse order of registration. weakref registers its own, which frees native objects,
    with the first finalizer: here at the latest, before ours. So ours runs first, and threads end before their objects
    are freed.
    """
    owners: weakref.WeakSet[_Closes] = weakref.WeakSet()
    weakref.finalize(owners, int)

    def close_all() -> None:
        for owner in list(owners):
            owner.close()

    atexit.register(close_all)
    return owners
