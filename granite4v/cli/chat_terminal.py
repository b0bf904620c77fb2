"""The chat on a terminal: the line editor, its history and completion, and Ctrl-C.

Imported only in the body of the command, because it imports `prompt_toolkit` and the runtime.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, cast

from prompt_toolkit import PromptSession
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent, Completer
from prompt_toolkit.completion import Completion as Choice
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output, create_output
from prompt_toolkit.output.plain_text import PlainTextOutput
from prompt_toolkit.utils import is_dumb_terminal

from granite4v.cli.chat_display import TerminalDisplay
from granite4v.cli.outcome import explain
from granite4v.cli.signals import Interrupted
from granite4v.cli.streams import Messages, PipeClosed, Results, ResultsLost
from granite4v.cli.terminal import clean
from granite4v.paths import cache_folder, new_file
from granite4v.runtime.chat import Chat, Reply, attach, complete, handle

HISTORY = "chat-history"
MAX_HISTORY_BYTES = 1 << 20  # if it is longer, the older half is removed
PROMPT = "> "
MORE = "  "  # prompt for the second and further lines of a question


def converse(chat: Chat, files: list[str]) -> None:
    """Runs the chat until the user leaves it. `files` are attached first. A line that fails prints a message."""
    with Interrupts() as interrupts, create_app_session(output=_output()):
        display = TerminalDisplay(interrupts.stopping)
        chat.ask_password = functools.partial(_password, display)
        display.note("/help lists the commands; Alt-Enter or \\ at the end: another line; Ctrl-D leaves")
        for file in files:
            _do(chat, display, functools.partial(attach, chat, file, display))
        session = _session(chat)
        n_refused = 0  # number of consecutive Ctrl-C at an empty prompt
        while n_refused < 2 and not chat.model.closed:
            try:
                if n_refused == 1:
                    display.say("once more, or Ctrl-D, leaves the chat")
                text = session.prompt(PROMPT)
            except EOFError:
                return
            except Interrupted:  # SIGTERM or SIGHUP
                raise
            except KeyboardInterrupt:
                n_refused += 1
                continue
            n_refused = 0
            if not _do(chat, display, functools.partial(handle, chat, text, display)):
                return


def _do(chat: Chat, display: TerminalDisplay, step: Callable[[], bool | None]) -> bool:
    """Executes a line; returns False if the chat should end. A failure prints one message."""
    try:
        return step() is not False
    except (ResultsLost, PipeClosed, Interrupted):  # stdout is gone, or SIGTERM
        raise
    except KeyboardInterrupt:
        display.say("interrupted")
    except Exception as error:
        explained = explain(error)
        if explained is None or chat.model.closed:
            raise
        display.say(" ".join(explained[1].split()))
    finally:
        display.end_progress()
    return True


class Interrupts:
    """Context manager that sets what Ctrl-C does in a chat: it stops the current answer, if any, and otherwise raises a
    plain KeyboardInterrupt, instead of the Interrupted that ends a command."""

    def __init__(self) -> None:
        self._reply: Reply | None = None
        self._before: Any = None

    @contextlib.contextmanager
    def stopping(self, reply: Reply) -> Iterator[None]:
        """Makes Ctrl-C stop this answer while the context is active."""
        self._reply = reply
        try:
            yield
        finally:
            self._reply = None

    def __enter__(self) -> Interrupts:
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._reply is None:
            raise KeyboardInterrupt
        self._reply.cancel()


# --- the line editor ---


def _password(display: TerminalDisplay, name: str) -> str | None:
    """A password that is typed unseen. None: an empty line, or Ctrl-D."""
    display.end_progress()
    try:
        return PromptSession[str](is_password=True).prompt(f"Password of {clean(name, keep='')}: ") or None
    except EOFError:
        return None


def _output() -> Output:
    """The terminal where lines are edited: stdout, or stderr if answers are redirected."""
    stream = sys.stdout if sys.stdout.isatty() else sys.stderr
    raw = stream.unescaped() if isinstance(stream, Results | Messages) else stream
    return PlainTextOutput(cast(Any, raw)) if is_dumb_terminal() else create_output(cast(Any, raw))


def _session(chat: Chat) -> PromptSession[str]:
    """Creates the line editor. No output is passed to it, because only then it handles a terminal that cannot move its
    cursor."""
    session: PromptSession[str] = PromptSession(
        multiline=True,
        history=_history(cache_folder() / HISTORY),
        completer=_Completer(chat),
        key_bindings=_keys(),
        prompt_continuation=MORE,
        reserve_space_for_menu=5,
        complete_while_typing=Condition(lambda: session.default_buffer.text.startswith(("/", "<"))),
    )
    return session


class _Completer(Completer):
    def __init__(self, chat: Chat) -> None:
        self._chat = chat

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Choice]:
        for found in complete(document.text_before_cursor, self._chat.conversation):
            name = clean(found.text, keep="")
            yield Choice(found.text, -found.n_replaced, display=name, display_meta=clean(found.about, keep=""))


def _keys() -> KeyBindings:
    """Key bindings. Enter submits the question, or inserts a newline in place of a backslash at its end. Alt-Enter
    always inserts a newline. Ctrl-C clears the line, or raises KeyboardInterrupt from an empty prompt."""
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        before = buffer.document.text_before_cursor
        if before.endswith("\\") and not buffer.document.text_after_cursor:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    @keys.add("<sigint>")
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    return keys


class _FileHistory(FileHistory):
    """A history that ignores errors of its file: only the history is lost, and the chat goes on."""

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):
            super().store_string(string)

    def load_history_strings(self) -> Iterable[str]:
        try:
            return list(super().load_history_strings())
        except OSError:
            return []


def _history(path: Path) -> History:
    """Opens the history of earlier lines, in a file that only this user can read; in memory if that is not possible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() and not path.is_symlink():
            os.close(new_file(path, 0o600))
        status = path.lstat()
        if not path.is_file() or path.is_symlink() or status.st_mode & 0o077 or status.st_uid != os.getuid():
            return InMemoryHistory()
        if status.st_size > MAX_HISTORY_BYTES:
            _halve(path)
    except (OSError, ValueError):
        return InMemoryHistory()
    return _FileHistory(str(path))


def _halve(path: Path) -> None:
    """Keeps the newer half of a history file. The cut is before the first entry in that half: entries begin with an
    empty line. Nothing is kept if one entry fills that half."""
    content = path.read_bytes()
    _, _, kept = content[len(content) // 2 :].partition(b"\n\n")
    kept = b"\n" + kept if kept else b""
    os.close(new_file(path, 0o600))
    path.write_bytes(kept)
