"""The live line of `progress`, rendered by `rich`: title, bar and as many figures as fit."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, ProgressColumn, Task
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

from granite4v.cli.progress import Activity, Progress
from granite4v.cli.terminal import clean

BAR_WIDTH = 20
MIN_WIDTH_FOR_BAR = 70  # width of the terminal in columns; the bar is also left out if the title would be cut off
FIGURES_SHARE = 0.4  # largest share of the width for figures: the title matters more


class LiveLine(RichProgress):
    """One line that shows the activity of a `Progress` until it is stopped, and then disappears."""

    def __init__(self, progress: Progress, stream: TextIO) -> None:
        console = CursorConsole(
            file=stream, force_terminal=True, force_jupyter=False, markup=False, highlight=False, emoji=False
        )
        self._source, self._console = progress, console
        self._title, self._figures = _Title(progress), _Figures(progress, console)
        self._bar = BarColumn(BAR_WIDTH)
        # Streams are not redirected: rich would interpret escape sequences in the printed text.
        super().__init__(console=console, transient=True, redirect_stdout=False, redirect_stderr=False, expand=True)
        self.add_task("")

    def get_renderables(self) -> Iterable[RenderableType]:
        """Called for every redraw. Reads the current activity, and the width, which changes when the window is
        resized."""
        activity = self._source.activity or Activity("")
        is_known = activity.total > 1
        for task in self.tasks:  # none yet when the base class draws for the first time
            task.completed, task.total = (activity.done, activity.total) if is_known else (0, None)
        n_used = sum(len(column.render(task).plain) for column in (self._title, self._figures) for task in self.tasks)
        has_bar = self._console.width >= max(MIN_WIDTH_FOR_BAR, n_used + BAR_WIDTH + 2)
        self.columns = (self._title, self._bar, self._figures) if has_bar else (self._title, self._figures)
        return super().get_renderables()


class CursorConsole(Console):
    """A console that never hides the cursor."""

    def show_cursor(self, show: bool = True) -> bool:
        """Does nothing: a process that is killed could not show the cursor again."""
        return False


class _Title(ProgressColumn):
    """The title column; it takes the width that the other columns leave."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        super().__init__(Column(ratio=1, no_wrap=True, overflow="ellipsis"))

    def render(self, task: Task) -> Text:
        activity = self._progress.activity or Activity("")
        return Text(clean(activity.title, keep=""), no_wrap=True, overflow="ellipsis")


class _Figures(ProgressColumn):
    """The column of figures: as many as fit into their share of the width."""

    def __init__(self, progress: Progress, console: Console) -> None:
        self._progress, self._console = progress, console
        super().__init__(Column(no_wrap=True, justify="right"))

    def render(self, task: Task) -> Text:
        figures = self._progress.figures(time.monotonic())
        while figures and len(", ".join(figures)) > self._console.width * FIGURES_SHARE:
            figures.pop()
        return Text(", ".join(figures), no_wrap=True)
