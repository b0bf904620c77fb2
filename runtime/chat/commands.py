"""The commands of a chat, as a table, and their implementation. Knows no terminal: a `Display` shows what happens."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from granite4v.clip_projector.files import shown
from granite4v.clip_projector.grid_anyres import Layout
from granite4v.clip_projector.grid_canvas import CanvasLayout, FramedLayout
from granite4v.paths import atomic_text_file
from granite4v.runtime.chat import session_file
from granite4v.runtime.chat.chat import REGEN_TEMPERATURE, Chat, Reply
from granite4v.runtime.chat.conversation import ChatError, Turn
from granite4v.runtime.chat.line import argument, split_files, starts_with_file, words
from granite4v.runtime.chat.pages import ChatPage
from granite4v.runtime.chat.values import COPY_FORMATS, to_copy
from granite4v.runtime.formats.tasks import TASKS
from granite4v.runtime.prompt.messages import counted

SWITCH = {"on": True, "off": False, "auto": None}
MOST_DEGREES = 2.0  # the highest temperature; above it, answers are noise


class Display(Protocol):
    """Shows a chat to the user."""

    def say(self, text: str) -> None:
        """Shows the result of a command or an answer, in one or more lines."""
        ...

    def note(self, text: str) -> None:
        """Shows a line that the user can do without."""
        ...

    def listing(self, rows: list[tuple[str, str]]) -> None:
        """Shows names and their meanings, one per line."""
        ...

    def progress(self, stage: str, done: int, total: int) -> None:
        """Shows what is going on before an answer begins; a model's progress callback."""
        ...

    def answer(self, reply: Reply) -> None:
        """Reads an answer to its end and shows it."""
        ...

    def copy(self, text: str) -> None:
        """Copies a text to the clipboard. Raises ChatError if there is no clipboard."""
        ...


@dataclass(frozen=True)
class Command:
    """A command. `takes`: the kind of its argument, for completion: 'file', 'session', 'schema', 'page', 'copy',
    'switch' or ''."""

    name: str
    usage: str
    help: str
    run: Callable[[Chat, str, Display], bool | None]
    takes: str = ""


def handle(chat: Chat, text: str, display: Display) -> bool:
    """Executes a line: a command, files to attach, a question. Returns False when the chat should end.

    Raises Granite4vError for anything that cannot be done; files attached by the same line before that stay attached.
    """
    text = text.strip()
    if not text:
        return True
    if text.startswith("/") and not starts_with_file(text):
        name, rest = [*text[1:].split(maxsplit=1), "", ""][:2]
        return find_command(name, text).run(chat, rest, display) is not False
    line = split_files(text)
    for file in line.files:
        attach(chat, file, display)
    if line.text:
        _answer(chat, chat.ask(chat.question(line.text), display.progress), display)
    return True


def find_command(name: str, text: str) -> Command:
    """The command with this name, or the only one whose name begins with it. Raises ChatError."""
    if name in COMMANDS:
        return COMMANDS[name]
    found = [command for command in COMMANDS.values() if name and command.name.startswith(name)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ChatError(f"'/{shown(name)}' may be {' or '.join(f'/{command.name}' for command in found)}.")
    if "/" in name or "." in name:
        raise ChatError(f"there is no file '{shown(text.split()[0])}', nor such a command; /help lists the commands.")
    raise ChatError(f"there is no command '/{shown(name)}'; /help lists them.")


def _answer(chat: Chat, reply: Reply, display: Display) -> None:
    display.answer(reply)
    if reply.turn is None:
        display.say("stopped before the first word; nothing was added.")
        return
    display.note(summary(chat, reply.turn))
    if reply.turn.finish_reason == "repetition":
        display.say("the answer began to repeat itself and was stopped.")
    elif reply.turn.finish_reason == "length":
        display.say("the answer was cut off: it had no more room (--max-tokens, or the context).")
    shortage = chat.shortage()
    if shortage is not None:
        display.say(shortage)


def summary(chat: Chat, turn: Turn) -> str:
    """One line about an answer: tokens and times, and how full the context is."""
    stats, usage = turn.stats, chat.usage()
    if stats is None:
        return ""
    speed = f", {_speed(stats.tokens_per_s)}" if stats.tokens_per_s else ""
    stopped = "stopped after " if turn.finish_reason == "cancelled" else ""
    return (
        f"{stopped}{counted(stats.n_generated, 'token')}, first after {_seconds(stats.first_token_s)}{speed}; "
        f"{usage.left:,} of {usage.n_ctx:,} left"
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2f} s"


def _speed(tokens_per_s: float) -> str:
    return f"{tokens_per_s:,.0f} tokens/s" if tokens_per_s >= 20 else f"{tokens_per_s:.1f} tokens/s"


# --- pages ---


def _attach(chat: Chat, text: str, display: Display) -> None:
    attach(chat, _needed(argument(text), "attach"), display)


def attach(chat: Chat, file: str, display: Display) -> None:
    """Attaches what 'FILE' or 'FILE#PAGES' names, and reports it. Raises what `Chat.attach` raises."""
    pages, notes = chat.attach(file, display.progress)
    for note in notes:
        display.say(note)
    for page in pages:
        display.note(f"attached {page.name}: {_size(page)}, {chat.n_tokens(page):,} tokens")


def _size(page: ChatPage) -> str:
    width, height = page.image.size
    frames = "" if page.n_frames is None else f", {counted(page.n_frames, 'frame')}"
    return f"{width:,}x{height:,} px{frames}"


def _seen(chat: Chat, page: ChatPage) -> str:
    """What the model sees of a page."""
    tiles = chat.layout(page)
    dpi = "" if page.dpi is None else f" at {page.dpi:g} dpi"
    if page.n_frames is not None:
        return f"{_size(page)}, {chat.n_tokens(page):,} tokens"
    grid = counted(tiles.n_tiles, "tile")
    if isinstance(tiles, Layout) and tiles.rows:
        grid += f" (overview, {tiles.rows}x{tiles.columns})"
    elif isinstance(tiles, CanvasLayout) and tiles.n_tiles > 1:
        grid += f" ({tiles.rows}x{tiles.columns})"
    elif isinstance(tiles, FramedLayout) and tiles.has_overview:
        grid += f" ({tiles.canvas.rows}x{tiles.canvas.columns}, overview)"
    return f"{_size(page)}{dpi}, {grid}, {chat.n_tokens(page):,} tokens"


def _detach(chat: Chat, text: str, display: Display) -> None:
    if not chat.conversation.pages:
        raise ChatError("no page is attached.")
    current = chat.conversation.current
    assert current is not None
    pages = chat.conversation.pages if text == "all" else [_page(chat, text) if text else current]
    for page in pages:
        chat.conversation.detach(page)
    what = pages[0].name if len(pages) == 1 else counted(len(pages), "page")
    display.say(f"detached {what}; {chat.usage().left:,} of {chat.model.n_ctx:,} tokens left")


def _pages(chat: Chat, text: str, display: Display) -> None:
    conversation = chat.conversation
    if text:
        conversation.chosen = _page(chat, text)
    if not conversation.pages:
        raise ChatError("no page is attached; '/attach FILE' attaches one.")
    rows = []
    for number, page in enumerate(conversation.pages, 1):
        marks = [*(["current"] if page is conversation.current else []), _seen(chat, page)]
        marks += ["not asked about yet"] if page in conversation.waiting else []
        rows.append((f"{number} {page.name}", ", ".join(marks)))
    display.listing(rows)


def _page(chat: Chat, text: str) -> ChatPage:
    pages = chat.conversation.pages
    if not pages:
        raise ChatError("no page is attached; '/attach FILE' attaches one.")
    if not text.isdecimal() or not 1 <= int(text[:9]) <= len(pages):
        raise ChatError(f"there is no page '{shown(text)}' here; /pages lists them, from 1 to {len(pages)}.")
    return pages[int(text) - 1]


# --- questions ---


def _schema(chat: Chat, text: str, display: Display) -> None:
    question, warnings = chat.fields_question(os.path.expanduser(_needed(argument(text), "schema")))
    for warning in warnings:
        display.say(f"warning: {warning}")
    _answer(chat, chat.ask(question, display.progress), display)


def _undo(chat: Chat, text: str, display: Display) -> None:
    turn = chat.conversation.undo()
    display.say(f"took back: {_short(turn.question.label)}")


def _regen(chat: Chat, text: str, display: Display) -> None:
    temperature = None
    if text:
        try:
            temperature = float(text)
        except ValueError:
            temperature = -1.0
        if not 0 <= temperature <= MOST_DEGREES:
            raise ChatError(f"'{shown(text)}' is no temperature; expected a number from 0 to {MOST_DEGREES:g}.")
    reply = chat.again(display.progress, temperature)
    if temperature is None and chat.options.temperature == 0:
        display.say(f"sampled at temperature {REGEN_TEMPERATURE:g}, as the most likely answer would be the same again")
    _answer(chat, reply, display)


def _clear(chat: Chat, text: str, display: Display) -> None:
    n_turns, pages = len(chat.conversation.turns), len(chat.conversation.pages)
    chat.conversation.clear()
    kept = f"; {counted(pages, 'page')} still attached (/detach all)" if pages else ""
    display.say(f"forgot {counted(n_turns, 'question')}{kept}")


def _adapter(chat: Chat, text: str, display: Display) -> None:
    if not chat.model.has_lora:
        raise ChatError("this model has no separate adapter; 'granite4v convert --lora separate' keeps one.")
    if text:
        if text not in SWITCH:
            raise ChatError(f"'{shown(text)}' is neither on, off nor auto.")
        chat.adapter = SWITCH[text]
    states = {True: "on", False: "off", None: "auto: on while a page is attached"}
    display.say(f"the adapter is {states[chat.adapter]}")


# --- results ---


def _stats(chat: Chat, text: str, display: Display) -> None:
    usage, turns = chat.usage(display.progress), chat.conversation.turns
    rows = [("context", f"{usage.used:,} of {usage.n_ctx:,} tokens used, {usage.left:,} left")]
    stats = turns[-1].stats if turns else None
    if stats is not None:
        images = f", {stats.n_image:,} of them of images" if stats.n_image else ""
        stored = f", {stats.n_stored:,} read from disk" if stats.n_stored else ""
        rows += [
            ("last prompt", f"{counted(stats.n_prompt, 'token')}{images}"),
            ("reused", f"{stats.n_reused:,} tokens of it{stored}; {counted(stats.n_encoded, 'image')} encoded"),
            ("first token", f"after {stats.first_token_s:.2f} s"),
            ("", f"images {stats.encode_s:.2f} s, prompt {stats.prefill_s:.2f} s"),
            ("last answer", f"{counted(stats.n_generated, 'token')}, {_speed(stats.tokens_per_s)}"),
        ]
    rows += [(page.name, _seen(chat, page)) for page in chat.conversation.pages]
    display.listing(rows)


def _copy(chat: Chat, text: str, display: Display) -> None:
    form, rest = None, text
    first = words(text)[:1]
    if first and first[0].value in COPY_FORMATS:
        form, rest = first[0].value, text[first[0].end :]
    elif len(words(text)) == 1 and not re.search(r"[./\\~]", first[0].value):
        raise ChatError(
            f"'{shown(first[0].value)}' is no format that '/copy' knows; the formats are {', '.join(COPY_FORMATS)}. "
            "For a file of that name, give the format before it."
        )
    content, what = to_copy(chat.conversation.turns, form)
    if not rest.strip():
        display.copy(content)
        display.say(f"sent {what} to the terminal's clipboard; if nothing arrives there: /copy {form or 'csv'} FILE")
        return
    path = _new_file(argument(rest), own=None)
    with atomic_text_file(path) as file:
        file.write(content if content.endswith("\n") else f"{content}\n")
    display.say(f"wrote {what} to '{shown(str(path))}'")


def _save(chat: Chat, text: str, display: Display) -> None:
    if not chat.conversation.turns and not chat.conversation.waiting:
        raise ChatError("there is nothing to save yet.")
    name = argument(text) or str(chat.saved_as or time.strftime("granite4v-chat-%Y%m%d-%H%M%S.json"))
    path = _new_file(name, own=chat.saved_as)
    session_file.save(chat.conversation, path, str(chat.model.files.text.path))
    chat.saved_as = path
    display.say(f"saved to '{shown(str(path))}': text, and the paths of pages; their pixels stay in their files")


def _load(chat: Chat, text: str, display: Display) -> None:
    path = _path(_needed(argument(text), "load"))
    loaded = session_file.load(path, chat.read_page)
    chat.conversation, chat.saved_as = loaded.conversation, path
    for note in loaded.notes:
        display.say(note)
    turns, pages = loaded.conversation.turns, loaded.conversation.pages
    last = f"; the last: {_short(turns[-1].question.label)}" if turns else ""
    display.say(f"loaded {counted(len(turns), 'question')} and {counted(len(pages), 'page')}{last}")
    shortage = chat.shortage()
    if shortage is not None:
        display.say(shortage)


def _new_file(name: str, own: Path | None) -> Path:
    """The path to write to; an existing file is replaced only if it is `own`. Raises ChatError."""
    path = _path(name)
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return path
    except (OSError, ValueError):  # a name that is too long, or holds a NUL
        raise ChatError(f"'{shown(name)}' cannot be the name of a file.") from None
    if path != own:
        raise ChatError(f"'{shown(name)}' exists already; give another name.")
    return path


def _path(name: str) -> Path:
    """The absolute path; the `~` of an unknown user is kept as it is, where `Path.expanduser` would fail."""
    return Path(os.path.expanduser(name)).absolute()


def _needed(text: str, name: str) -> str:
    if not text:
        raise ChatError(f"a file is missing: {COMMANDS[name].usage}")
    return text


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:57]}..."


# --- the chat itself ---


def _help(chat: Chat, text: str, display: Display) -> None:
    rows = [(command.usage, command.help) for command in COMMANDS.values()]
    tags = " ".join(task.tag for task in TASKS.values() if task.tag)
    rows += [
        ("TASK TAG", f"alone on a line: reads the current page as 'granite4v extract' does; {tags}"),
        ("FILE", "dropped into the line: attaches it"),
        ("Alt-Enter, or \\ at the end", "another line of the same question"),
        ("Ctrl-C", "stops the answer; twice at an empty prompt, or Ctrl-D: leaves the chat"),
    ]
    display.listing(rows)


def _quit(chat: Chat, text: str, display: Display) -> bool:
    return False


COMMANDS = {
    command.name: command
    for command in (
        Command(
            "attach",
            "/attach FILE[#PAGES]",
            "attach an image, a video, or pages of a PDF: a.pdf#1-3,7",
            _attach,
            "file",
        ),
        Command("detach", "/detach [N|all]", "take out a page: the current one, number N, or all", _detach, "page"),
        Command("pages", "/pages [N]", "list the pages; with N, make that one the current page", _pages, "page"),
        Command("schema", "/schema FILE", "read the fields of a JSON schema from the current page", _schema, "schema"),
        Command("undo", "/undo", "take back the last question and its answer", _undo),
        Command("regen", "/regen [TEMPERATURE]", "answer the last question again", _regen),
        Command("copy", "/copy [csv|md|json] [FILE]", "the last table to the clipboard, or to a file", _copy, "copy"),
        Command("save", "/save [FILE]", "write the conversation to a JSON file", _save, "session"),
        Command("load", "/load FILE", "go on with a saved conversation", _load, "session"),
        Command("stats", "/stats", "tokens, times, the context, and what the model sees of the pages", _stats),
        Command("adapter", "/adapter [on|off|auto]", "apply the model's separate LoRA, or not", _adapter, "switch"),
        Command("clear", "/clear", "forget all questions; pages stay", _clear),
        Command("help", "/help", "this list", _help),
        Command("quit", "/quit", "leave", _quit),
    )
}
