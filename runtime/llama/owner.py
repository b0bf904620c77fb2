"""Manages the lifetime of a C handle, for the owners of llama.cpp's objects."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any


class Owner:
    """A C handle that is freed once: by `close`, by the garbage collector, or at exit (the youngest first).

    Is a context manager, may be closed twice, and raises ValueError when used afterwards.
    """

    def _own(self, handle: Any, free: Callable[..., Any], *kept_alive: Any) -> None:
        """Takes ownership of a handle. `kept_alive`: objects that C uses until the handle is freed.

        The finalizer refers to the handle and these objects, never to `self`, which would then live until exit. A
        context keeps its model alive this way, so the model is freed after it whatever order they are dropped in.
        """
        self._handle = handle
        self._finalizer = weakref.finalize(self, _free, free, handle, kept_alive)

    @property
    def handle(self) -> Any:
        if not self._finalizer.alive:
            raise ValueError(f"the {type(self).__name__} is closed")
        return self._handle

    def close(self) -> None:
        finalizer = getattr(self, "_finalizer", None)
        if finalizer is not None:
            finalizer()

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _free(free: Callable[..., Any], handle: Any, kept_alive: tuple[Any, ...]) -> None:
    free(handle)
