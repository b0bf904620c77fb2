"""A reader process for `reader.WORKER` with documents that misbehave on purpose, controlled by their file names.

'kill-2.strange' has four pages, and reading page 2 kills the process; with '-0' that happens on opening. Other words in
place of 'kill': 'once' (a second reader succeeds), 'sleep', 'eat' (memory), 'raise'.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from granite4v.runtime.documents import worker
from granite4v.runtime.documents.page_source import RenderedPage


class StrangeDocument:
    n_pages = 4
    damage = None
    index = None

    def __init__(self, path: Path) -> None:
        self._path = path
        what, *numbers = path.stem.split("-")
        self._what, self._numbers = what, [int(number) for number in numbers]
        self._misbehave(0)

    def render(self, number: int, crop: Any, tiling: Any) -> RenderedPage:
        from PIL import Image

        self._misbehave(number)
        return RenderedPage(Image.new("RGB", (2, 3), (number, 0, 0)))

    def close(self) -> None:
        pass

    def _misbehave(self, number: int) -> None:
        if number not in self._numbers:
            return
        if self._what == "once":
            mark = self._path.with_suffix(".read")
            if mark.exists():
                return
            mark.touch()
        if self._what in ("kill", "once"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self._what == "sleep":
            time.sleep(600)
        if self._what == "raise":
            raise RecursionError("too deep")
        if self._what == "eat":
            eaten = [b"x" * (1 << 20) for _ in range(2000)]
            del eaten


def main(setup: str) -> None:
    opened = worker.open_page_source

    def open_page_source(document: Any, *rest: Any) -> Any:
        if document.path is not None and document.path.suffix == ".strange":
            return StrangeDocument(document.path)
        return opened(document, *rest)

    loaded = worker.load

    def load(source: str | bytes, *rest: Any) -> Any:
        if isinstance(source, str) and source.endswith(".strange"):
            StrangeDocument(Path(source))
        return loaded(source, *rest)

    worker.open_page_source = open_page_source  # type: ignore[assignment]
    worker.load = load  # type: ignore[assignment]
    worker.main(setup)
