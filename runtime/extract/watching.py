"""Watches a folder and returns each file once it has not changed for a while."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from granite4v.errors import DocumentError
from granite4v.runtime.documents.sources import Document, file_state, find_documents

SETTLED_S = 2.0  # a file that has not changed for this long is complete
POLL_S = 0.5


def arrivals(
    folder: str | Path,
    *,
    settled_s: float = SETTLED_S,
    poll_s: float = POLL_S,
    say: Callable[[str], None] | None = None,
) -> Iterator[list[str]]:
    """Yields the paths of documents in a folder and below it, each once it is complete, and again after every change.

    Never ends. Files that exist at the beginning are included. An empty file is not complete. If the folder vanishes,
    as a network drive may, waits for it and calls `say`. Raises DocumentError if it does not exist at the beginning.
    """
    check_folder(folder)
    is_there = True
    seen: dict[str, tuple[str, float]] = {}  # source: its state, and since when it has had it
    handed: dict[str, str] = {}
    while True:
        if is_there != os.path.isdir(folder):
            is_there = not is_there
            if say is not None:
                say(f"'{folder}' is {'there again' if is_there else 'gone; waiting for it'}")
        now, states = time.monotonic(), _states(folder)
        seen = {
            source: seen[source] if source in seen and seen[source][0] == state else (state, now)
            for source, state in states.items()
        }
        complete = [
            source
            for source, (state, since) in seen.items()
            if now - since >= settled_s and handed.get(source) != state
        ]
        handed.update({source: states[source] for source in complete})
        if complete:
            yield complete
        else:
            time.sleep(poll_s)


def check_folder(folder: str | Path) -> None:
    """Raises DocumentError if the folder does not exist."""
    if not os.path.isdir(folder):
        raise DocumentError(f"there is no directory '{folder}' to watch.")


def _states(folder: str | Path) -> dict[str, str]:
    """Returns the state of each file that is not empty."""
    try:
        found = find_documents([folder])
    except DocumentError:  # nothing in it yet, or no folder
        return {}
    states = {item.source: file_state(item) for item in found if isinstance(item, Document)}
    return {source: state for source, state in states.items() if state is not None and not state.startswith("0:")}
