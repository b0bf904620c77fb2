"""The progress display, on stderr: a live line on a terminal, periodic plain lines elsewhere.

The live line is rendered by `rich`, which is imported when it is first needed: most commands never need it, and
`--help` must be fast.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TextIO, cast

from granite4v.cli.streams import Messages, Results
from granite4v.cli.terminal import clean
from granite4v.cli.verbosity import is_quiet

if TYPE_CHECKING:
    from granite4v.converter import Progress as Written
    from granite4v.models import PullProgress

PLAIN_INTERVAL_S = 10.0  # between two plain lines of one stage
# The time left is estimated only after this much time and this share of the work.
MIN_ESTIMATE_S, MIN_ESTIMATE_SHARE = 2.0, 0.02

_STAGES = {
    "check": "checking the model files",
    "measure": "measuring the fastest kernels of this CPU, once",
    "checksum": "computing the checksums of the model's files, once",
    "stored": "reading the page from the store",
    "load": "loading weights",
    "read": "reading pages",
    "encode": "encoding images",
    "prefill": "processing the prompt",
    "generate": "generating",
}


@dataclass(frozen=True)
class Activity:
    """What a command is doing.

    `stage`: the kind of work; a new stage restarts the clock, and prints a plain line immediately. `detail` may
    change at any time. `total`: 0 or 1 if the end is not known. `left_s`: time left; None to estimate it from the share
    that is done.
    """

    stage: str
    done: float = 0
    total: float = 0
    detail: str = ""
    n_tokens: int = 0
    tokens_per_s: float = 0.0
    left_s: float | None = None

    @property
    def title(self) -> str:
        return f"{self.stage} {self.detail}".strip()

    @property
    def share(self) -> float | None:
        return min(self.done / self.total, 1.0) if self.total > 1 else None


def model_activity(stage: str, done: int, total: int) -> Activity:
    """Converts a report of a model's progress callback. The total number of generated tokens is not known."""
    name = _STAGES.get(stage, stage)
    return Activity(name, n_tokens=done) if stage == "generate" else Activity(name, done, total)


class Display(Protocol):
    """A live line on a terminal."""

    def start(self) -> None: ...
    def stop(self) -> None: ...


class Progress:
    """Shows one activity at a time.

    May be called from any thread: the callbacks of a model run on its engine's thread. Text that is written to the same
    terminal through `sys.stdout` or `sys.stderr` replaces the live line, which returns with the next activity. Use it
    as a context manager, so that the line is removed when a command ends, also after an error.
    """

    def __init__(self, stream: TextIO | None = None, *, delay_s: float = 0.0) -> None:
        """`stream`: by default stderr. `delay_s`: nothing is shown before this time has passed."""
        self._stream = stream or sys.stderr
        self._is_terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._lock = threading.RLock()
        self._not_before = time.monotonic() + delay_s
        self._last_line = -PLAIN_INTERVAL_S
        self._display: Display | None = None
        self._is_closed = False
        self.activity: Activity | None = None
        # the first activity of the stage, and its time: only work done since then counts for the speed
        self._first = Activity("")
        self._began = 0.0

    def show(self, activity: Activity) -> None:
        """Shows an activity in place of the previous one."""
        now = time.monotonic()
        with self._lock:
            is_new = self.activity is None or activity.stage != self.activity.stage
            if is_new:
                self._first, self._began = activity, now
            self.activity = activity
            if self._is_closed or now < self._not_before or is_quiet():
                return
            if self._is_terminal:
                self._show_live()
            elif is_new or now - self._last_line >= PLAIN_INTERVAL_S:
                self._last_line = now
                print(self.line(now), file=self._stream, flush=True)

    def stage(self, stage: str, done: int, total: int) -> None:
        """A model's progress callback."""
        self.show(model_activity(stage, done, total))

    def written(self, progress: Written) -> None:
        """A converter's progress callback."""
        detail = f"{progress.file}: {progress.tensor}"
        self.show(Activity("writing", progress.done_bytes, progress.total_bytes, detail))

    def pulled(self, progress: PullProgress) -> None:
        """A download's progress callback."""
        self.show(Activity(progress.stage, progress.done_bytes, progress.total_bytes, progress.file))

    def note(self, text: str) -> None:
        """Like `say`, but prints nothing with --quiet."""
        if not is_quiet():
            self.say(text)

    def say(self, text: str) -> None:
        """Prints one or more permanent lines."""
        with self._lock:
            self.clear()
            print(clean(text), file=self._stream, flush=True)

    def clear(self) -> None:
        """Removes the live line until the next activity."""
        with self._lock:
            display, self._display = self._display, None
            if display is not None:
                _before_writing(None)
                display.stop()

    def close(self) -> None:
        """Removes the live line for good."""
        with self._lock:
            self._is_closed = True
            self.clear()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def line(self, now: float) -> str:
        """Formats the activity as a plain line. `now`: from time.monotonic."""
        activity = self.activity or Activity("")
        title = clean(activity.title, keep="")
        figures = self.figures(now)
        if activity is self._first and not activity.share:
            return f"{title} ..."
        return f"{title}: {', '.join(figures)}" if figures else title

    def figures(self, now: float) -> list[str]:
        """The known figures, most important first: share done, time left, tokens per second, tokens, time elapsed."""
        activity = self.activity or Activity("")
        elapsed_s, left_s = now - self._began, self._left_s(now)
        speed = activity.tokens_per_s or (activity.n_tokens / elapsed_s if elapsed_s >= MIN_ESTIMATE_S else 0.0)
        known = (
            None if activity.share is None else f"{activity.share:.0%}",
            None if left_s is None else f"{duration(left_s)} left",
            f"{speed:.1f} tokens/s" if speed else None,
            plural(activity.n_tokens, "token") if activity.n_tokens else None,
            f"{duration(elapsed_s)} elapsed" if elapsed_s >= 1 else None,
        )
        return [text for text in known if text is not None]

    def _left_s(self, now: float) -> float | None:
        activity = self.activity
        if activity is None or activity.left_s is not None or activity.share is None:
            return None if activity is None else activity.left_s
        done, took_s = activity.done - self._first.done, now - self._began
        if took_s < MIN_ESTIMATE_S or done < MIN_ESTIMATE_SHARE * activity.total:
            return None
        return took_s * (activity.total - activity.done) / done

    def _show_live(self) -> None:
        if self._display is not None:
            return  # it redraws itself ten times a second
        from granite4v.cli.live import LiveLine

        stream = self._stream.unescaped() if isinstance(self._stream, Messages) else self._stream
        self._display = LiveLine(self, cast("TextIO", stream))
        _before_writing(self.clear)
        self._display.start()


def _before_writing(clear: Callable[[], None] | None) -> None:
    """Sets the function that the process's own streams call before they write to a terminal."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Results | Messages):
            stream.before_write = clear


def plural(n: int, noun: str) -> str:
    """Formats a count: '1 page', '2,000 pages'."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def duration(seconds: float) -> str:
    """Formats a duration: '42 s', '5 min', '2 h 10 min'."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
