"""Completes the text before the cursor: commands, their arguments, task tags, paths."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from granite4v.runtime.chat.commands import COMMANDS, SWITCH, Command
from granite4v.runtime.chat.conversation import Conversation
from granite4v.runtime.chat.line import words
from granite4v.runtime.chat.pages import ATTACHED
from granite4v.runtime.chat.values import COPY_FORMATS
from granite4v.runtime.formats.tasks import TASKS

MOST_PATHS = 200  # per directory
_SPECIAL = re.compile(r"([\s'\"\\])")


@dataclass(frozen=True)
class Completion:
    """`text` replaces the last `n_replaced` characters before the cursor. `about`: a few words about it."""

    text: str
    n_replaced: int
    about: str = ""


def complete(before: str, conversation: Conversation) -> list[Completion]:
    """The completions of a line up to the cursor."""
    if before.startswith("/") and " " not in before:
        found = [Completion(f"/{c.name}", len(before), c.help) for c in _beginning(before[1:])]
        return found or list(_paths(before, ATTACHED))
    if before.startswith("<") and " " not in before:
        tags = [task.tag for task in TASKS.values() if task.tag is not None]
        return [Completion(tag, len(before), "task") for tag in tags if tag.startswith(before)]
    if before.startswith("/"):
        name, _, rest = before[1:].partition(" ")
        if name in COMMANDS:
            return list(_arguments(COMMANDS[name].takes, rest, conversation))
    word = _last_word(before)
    return list(_paths(word, ATTACHED)) if "/" in word else []


def _beginning(name: str) -> list[Command]:
    return [command for command in COMMANDS.values() if command.name.startswith(name)]


def _arguments(takes: str, rest: str, conversation: Conversation) -> Iterator[Completion]:
    rest = rest.lstrip()
    if takes == "file":
        yield from _paths(rest, ATTACHED)
    elif takes in ("session", "schema"):
        yield from _paths(rest, (".json",))
    elif takes == "page":
        for number, page in enumerate(conversation.pages, 1):
            if str(number).startswith(rest):
                yield Completion(str(number), len(rest), page.name)
    elif takes in ("copy", "switch"):
        choices = COPY_FORMATS if takes == "copy" else SWITCH
        yield from (Completion(choice, len(rest)) for choice in choices if choice.startswith(rest))


def _last_word(text: str) -> str:
    found = words(text)
    return text[found[-1].start :] if found and found[-1].end == len(text) else ""


def _paths(typed: str, suffixes: tuple[str, ...]) -> Iterator[Completion]:
    """Yields directories, and files with one of the suffixes, that begin with `typed`; white space, quotes and
    backslashes are escaped."""
    bare = re.sub(r"\\(.)", r"\1", typed.lstrip("'\""))
    folder, _, beginning = bare.rpartition("/")
    where = os.path.expanduser(f"{folder}/" if folder or bare.startswith("/") else ".")
    n_found = 0
    try:
        with os.scandir(where) as entries:
            names = sorted((entry.name, entry.is_dir()) for entry in entries)
    except (OSError, ValueError):
        return
    for name, is_folder in names:
        if not name.startswith(beginning) or (name.startswith(".") and not beginning):
            continue
        if not is_folder and os.path.splitext(name)[1].lower() not in suffixes:
            continue
        path = f"{folder}/{name}" if folder or bare.startswith("/") else name
        yield Completion(_SPECIAL.sub(r"\\\1", path) + ("/" if is_folder else ""), len(typed))
        n_found += 1
        if n_found == MOST_PATHS:
            return
