"""Displays a chat: as plain text for pipes, as rendered Markdown and tables on a terminal.

Imported only in the body of the command, because it imports `rich` and the runtime.
"""

from __future__ import annotations

import base64
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, TextIO, cast

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.syntax import Syntax
from rich.table import Table as Grid
from rich.text import Text

from granite4v.cli.chat_render import Lines, complete_blocks, fields_or_table, markdown, rendered_table
from granite4v.cli.live import CursorConsole
from granite4v.cli.progress import Progress
from granite4v.cli.streams import Messages, Results
from granite4v.cli.terminal import clean
from granite4v.cli.verbosity import is_quiet
from granite4v.errors import PromptError
from granite4v.runtime.chat import Chat, ChatError, Reply, value_of
from granite4v.runtime.formats import Table

MAX_QUESTION_BYTES = 16 << 20  # far more than any context holds
MAX_CLIPBOARD_BYTES = 74_994  # before base64: terminals drop longer OSC 52 sequences (xterm, tmux)
REDRAW_S = 0.1
PARSE_S = 0.25  # between two attempts to parse an incomplete answer
LEFT_OVER_ROWS = 4  # rows of the screen that a growing answer leaves for the text above it


def question_from_stdin() -> str:
    """Reads all of standard input. Raises PromptError if it is empty, too long or cannot be read."""
    try:
        data = sys.stdin.buffer.read(MAX_QUESTION_BYTES + 1)
    except OSError as error:
        raise PromptError(f"standard input cannot be read: {error.strerror or error}.") from None
    if len(data) > MAX_QUESTION_BYTES:
        raise PromptError(f"the question on standard input is longer than {MAX_QUESTION_BYTES:,} bytes.")
    text = data.decode("utf-8", "surrogateescape").strip()
    if not text:
        raise PromptError("standard input is empty; pipe a question into it, or run this on a terminal to talk.")
    return text


class PlainDisplay:
    """Prints answers on stdout as they are generated, and everything else on stderr. As a context manager, it ends its
    progress line."""

    def __init__(self) -> None:
        self._activity: Progress | None = None

    def say(self, text: str) -> None:
        self.end_progress()
        print(text, file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        if not is_quiet():
            self.say(text)

    def listing(self, rows: list[tuple[str, str]]) -> None:
        self.say("\n".join(f"{name}: {about}" for name, about in rows))

    def progress(self, stage: str, done: int, total: int) -> None:
        if self._activity is None:
            self._activity = Progress()
        self._activity.stage(stage, done, total)

    def end_progress(self) -> None:
        activity, self._activity = self._activity, None
        if activity is not None:
            activity.close()

    def answer(self, reply: Reply) -> None:
        """Prints an answer piece by piece, like `granite4v ask`."""
        last = ""
        for last in reply:
            self.end_progress()
            print(last, end="", flush=True)
        self.end_progress()
        if last and not last.endswith("\n"):
            print(flush=True)

    def copy(self, text: str) -> None:
        raise ChatError("only a terminal has a clipboard; '/copy csv FILE' writes a file.")

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end_progress()


class TerminalDisplay(PlainDisplay):
    """Renders prose paragraph by paragraph, and tables row by row while they grow.

    `stopping`: context manager that is active while an answer is read. On a terminal that cannot move its cursor
    (TERM=dumb), prose is printed as it is generated, and tables when they are complete.
    """

    def __init__(self, stopping: Callable[[Reply], contextlib.AbstractContextManager[Any]]) -> None:
        super().__init__()
        self._stopping = stopping
        self._is_rendered = sys.stdout.isatty()
        self._console, self._notes = _console(sys.stdout), _console(sys.stderr)

    def say(self, text: str) -> None:
        self.end_progress()
        self._notes.print(Text(clean(text), style="dim"))

    def listing(self, rows: list[tuple[str, str]]) -> None:
        self.end_progress()
        self._notes.print(rendered_listing(rows, self._notes.width))

    def answer(self, reply: Reply) -> None:
        with self._stopping(reply):
            if not self._is_rendered:
                super().answer(reply)
            elif reply.question.kind.kind == "prose":
                self._show_prose(reply)
            else:
                self._show_value(reply)

    def copy(self, text: str) -> None:
        data = text.encode("utf-8", "backslashreplace")
        if not self._is_rendered:
            super().copy(text)
        if len(data) > MAX_CLIPBOARD_BYTES:
            raise ChatError(
                f"{len(data):,} bytes are too many for a terminal's clipboard; '/copy csv FILE' writes them."
            )
        stream = self._console.file
        stream.write(f"\x1b]52;c;{base64.b64encode(data).decode()}\x07")
        stream.flush()

    # --- prose ---

    def _show_prose(self, reply: Reply) -> None:
        if self._console.is_dumb_terminal:
            super().answer(reply)
            return
        prose = _Prose(reply, self._console)
        for _ in self._redrawn(reply, prose.tail):
            prose.print(is_complete=False)
        prose.print(is_complete=True)

    # --- tables, fields, code ---

    def _show_value(self, reply: Reply) -> None:
        if self._console.is_dumb_terminal:
            for _ in reply:
                self.end_progress()
        else:
            growing = _Growing(reply, self._console)
            for _ in self._redrawn(reply, growing.drawn):
                pass
        self.end_progress()
        value = value_of(reply.question, reply.text, complete=reply.finish_reason == "stop")
        if value is None and reply.text:
            self.say("the answer is not in the format of its task; here it is as it came:")
        for renderable in _rendered(reply, value, self._console.width):
            self._console.print(renderable)

    def _redrawn(self, reply: Reply, draw: Callable[[], RenderableType]) -> Iterator[None]:
        """Reads an answer. At most every `REDRAW_S` it yields, then shows the result of `draw` below the printed text;
        that is removed at the end."""
        live = Live(
            console=self._console, transient=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )
        drawn_at = 0.0
        try:
            for _ in reply:
                if not live.is_started:
                    self.end_progress()
                    live.start()
                if time.monotonic() - drawn_at >= REDRAW_S:
                    yield
                    live.update(draw(), refresh=True)
                    drawn_at = time.monotonic()
        finally:
            if live.is_started:
                live.update(Text(""))
                live.stop()
            self.end_progress()


class _Prose:
    """A growing text: complete blocks are rendered permanently, the rest is shown as plain text."""

    def __init__(self, reply: Reply, console: Console) -> None:
        self._reply, self._console = reply, console
        self._n_printed = 0

    def print(self, *, is_complete: bool) -> None:
        """Renders the blocks that were completed since the last call."""
        rest = clean(self._reply.text)[self._n_printed :]
        block = rest if is_complete else rest[: complete_blocks(rest)]
        if block.strip():
            if self._n_printed:
                self._console.print()
            self._console.print(markdown(block))
            self._n_printed += len(block)

    def tail(self) -> RenderableType:
        """The last lines of the text that is not rendered yet, as many as fit on the screen."""
        return last_lines(Text(clean(self._reply.text)[self._n_printed :]), self._console)


class _Growing:
    """Draws the value of an incomplete answer, which is parsed every `PARSE_S`."""

    def __init__(self, reply: Reply, console: Console) -> None:
        self._reply, self._console = reply, console
        self._looked_at = 0.0
        self._drawn: RenderableType = Text("")

    def drawn(self) -> RenderableType:
        if time.monotonic() - self._looked_at >= PARSE_S:
            value = value_of(self._reply.question, self._reply.text, complete=False)
            self._drawn = self._draw(value)
            self._looked_at = time.monotonic()
        return self._drawn

    def _draw(self, value: Any) -> RenderableType:
        table = fields_or_table(value)
        if table is None:
            return last_lines(Text(clean(self._reply.text)), self._console)
        return last_lines(rendered_table(table, self._console.width, self._console.height), self._console)


def last_lines(content: RenderableType, console: Console) -> RenderableType:
    """The last lines of the content, as many as fit on the screen."""
    return Lines(content, max(1, console.height - LEFT_OVER_ROWS))


def _rendered(reply: Reply, value: Any, width: int) -> Iterator[RenderableType]:
    if value is None:
        yield Text(clean(reply.text))
    elif reply.question.kind.kind == "code":
        yield Syntax(clean(value), "python", theme="ansi_dark", background_color="default", word_wrap=True)
    elif reply.question.kind.kind == "fields":
        table = fields_or_table(value)
        yield rendered_table(table, width) if table is not None else Text(clean(json.dumps(value)))
    elif isinstance(value, Table | list):
        for number, table in enumerate([value] if isinstance(value, Table) else value):
            if number:
                yield Text("")
            yield rendered_table(table, width)
        if not value:
            yield Text("no table", style="dim")
    else:
        yield markdown(clean(value))


def attach(chat: Chat, file: str, display: PlainDisplay) -> None:
    """Attaches a file that was named on the command line, and prints its notes on stderr."""
    pages, notes = chat.attach(file, display.progress)
    for note in notes:
        display.say(note)
    del pages


def rendered_listing(rows: list[tuple[str, str]], width: int) -> RenderableType:
    """Renders names and their meanings: side by side if the names take at most half of the width, otherwise one below
    the other."""
    grid = Grid.grid(padding=(0, 2, 0, 0), expand=False)
    longest = max((len(name) for name, _ in rows), default=0)
    if longest <= width // 2:
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        for name, about in rows:
            grid.add_row(Text(clean(name, keep="")), Text(clean(about, keep=""), style="dim"))
        return grid
    parts: list[RenderableType] = []
    for name, about in rows:
        parts += [Text(clean(name, keep="")), Padding(Text(clean(about, keep=""), style="dim"), (0, 0, 0, 2))]
    return Group(*parts)


def _console(stream: TextIO) -> Console:
    """A console that may write control sequences; callers must clean the text that they print."""
    file = stream.unescaped() if isinstance(stream, Results | Messages) else stream
    return CursorConsole(file=cast("TextIO", file), force_jupyter=False, markup=False, highlight=False, emoji=False)
