"""Saves a conversation in a JSON file: messages, and the paths and digests of pages; the pixels stay in their files.

A file may come from an untrusted source, so its size, its format and each page's entry are checked before a page is
opened.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from granite4v.clip_projector.files import shown
from granite4v.errors import ConstraintError, Granite4vError
from granite4v.paths import atomic_text_file
from granite4v.runtime.chat.chat import schema_question
from granite4v.runtime.chat.conversation import ChatError, Conversation, Question, Turn
from granite4v.runtime.chat.pages import ChatPage
from granite4v.runtime.formats.task_grammar import grammar_for
from granite4v.runtime.formats.tasks import find_task

FORMAT = "granite4v-chat"
VERSION = 1
MAX_BYTES = 64 << 20
MAX_PAGES = 500  # each takes some megabytes; no context has room for more
_REASONS = ("stop", "length", "repetition", "cancelled")
ReadPage = Callable[..., ChatPage]


@dataclass(frozen=True)
class Loaded:
    """A loaded conversation. `notes`: about pages that are missing or have changed since."""

    conversation: Conversation
    notes: tuple[str, ...]


def save(conversation: Conversation, path: Path, model: str) -> None:
    """Writes the file completely or not at all. `model`: where the answers came from, for people who read the file.
    Raises OutputError."""
    pages = conversation.pages
    about = [turn.about for turn in conversation.turns]
    known = [*pages, *dict.fromkeys(page for page in about if page is not None and page not in pages)]
    content = {
        "format": FORMAT,
        "version": VERSION,
        "model": model,
        "system": conversation.system,
        "pages": [_page(page) for page in known],
        "turns": [_turn(turn, known) for turn in conversation.turns],
        "waiting": [known.index(page) for page in conversation.waiting],
        "chosen": known.index(conversation.chosen) if conversation.chosen in known else None,
    }
    with atomic_text_file(path) as file:
        json.dump(content, file, ensure_ascii=False, indent=1)
        file.write("\n")


def _page(page: ChatPage) -> dict[str, Any]:
    return {
        "path": str(page.path),
        "number": page.number,
        "file_sha256": page.file_sha256,
        "pixels_sha256": page.digest,
        "size_px": list(page.image.size),
        **({} if page.n_frames is None else {"n_frames": page.n_frames}),
    }


def _turn(turn: Turn, pages: list[ChatPage]) -> dict[str, Any]:
    return {
        "question": turn.question.text,
        "task": turn.question.task,
        "schema": turn.question.schema,
        "pages": [pages.index(page) for page in turn.pages],
        "about": None if turn.about is None else pages.index(turn.about),
        "answer": turn.answer,
        "finish_reason": turn.finish_reason,
    }


def load(path: Path, read_page: ReadPage) -> Loaded:
    """Loads the conversation of a file that `save` wrote. `read_page(path, number)` reads a page or, with `n_frames=`,
    that many frames of a video, and raises Granite4vError.

    A page that cannot be read is left out, with a note; one whose file has changed is used as it is now, with a note.
    Raises ChatError for any other kind of file.
    """
    content = _content(path)
    read: list[ChatPage | None] = []
    notes: list[str] = []
    try:
        if len(content["pages"]) > MAX_PAGES:
            raise ChatError(f"'{shown(str(path))}' has {len(content['pages']):,} pages; expected at most {MAX_PAGES}.")
        for page in content["pages"]:
            saved_path, number = _text(page, "path"), _whole(page["number"], "the number of a page", least=1)
            of_video = {"n_frames": _whole(page["n_frames"], "n_frames")} if "n_frames" in page else {}
            try:
                found = read_page(saved_path, number, **of_video)
            except Granite4vError as error:
                read.append(None)
                notes.append(f"{error} The page is left out; what was said about it stays.")
                continue
            if found.file_sha256 != page["file_sha256"]:
                notes.append(
                    f"{found.name} has changed since this was saved: the answers so far are about what it was then."
                )
            read.append(found)
        turns = [_read_turn(turn, read) for turn in content["turns"]]
        waiting = [page for page in (_place(read, i) for i in content["waiting"]) if page is not None]
        chosen = None if content["chosen"] is None else _place(read, content["chosen"])
        system = None if content["system"] is None else _text(content, "system")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ChatError(f"'{shown(str(path))}' is damaged: {_reason(error)}. It is not loaded.") from None
    except ConstraintError as error:
        raise ChatError(f"'{shown(str(path))}' holds an invalid schema: {error}") from None
    return Loaded(Conversation(system, turns, waiting, chosen), tuple(notes))


def _content(path: Path) -> Mapping[str, Any]:
    name = shown(str(path))
    try:
        if not path.is_file():
            raise ChatError(f"there is no file '{name}'.")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        content = json.loads(raw) if len(raw) <= MAX_BYTES else None
    except OSError as error:
        raise ChatError(f"'{name}' cannot be read: {error.strerror or error}.") from None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ChatError(f"'{name}' is not a saved chat; '/save FILE' writes one.")
    if content.get("version") != VERSION:
        raise ChatError(
            f"'{name}' has version {content.get('version')!r:.20}, but this program reads version {VERSION}; update it."
        )
    return content


def _read_turn(turn: Mapping[str, Any], pages: list[ChatPage | None]) -> Turn:
    question = _question(turn)
    about = None if turn["about"] is None else _place(pages, turn["about"])
    own = tuple(page for i in turn["pages"] if (page := _place(pages, i)) is not None)
    reason = turn["finish_reason"]
    if reason not in _REASONS:
        raise _Damage(f"finish_reason is {reason!r:.40}; expected {', '.join(_REASONS)}")
    return Turn(question, own, _text(turn, "answer"), reason, about)


def _question(turn: Mapping[str, Any]) -> Question:
    task = find_task(_text(turn, "task"))
    if turn["schema"] is not None:
        if not isinstance(turn["schema"], dict):
            raise _Damage(f"schema is {turn['schema']!r:.40}; expected an object")
        return schema_question(turn["schema"])
    text = _text(turn, "question")
    return Question(text, task.name, constraint=grammar_for(task.name) if task.rule is not None else None)


class _Damage(ValueError):
    """What is wrong with a file, in words."""


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"'{shown(str(error.args[0]))}' is missing"
    if isinstance(error, _Damage | Granite4vError):
        return str(error).rstrip(".")
    return "an entry has a different type than expected"  # Python's own message would name no entry


def _text(entry: Mapping[str, Any], name: str) -> str:
    if not isinstance(entry[name], str):
        raise _Damage(f"{name} is {entry[name]!r:.40}; expected text")
    return str(entry[name])


def _whole(value: Any, what: str, least: int = 0) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise _Damage(f"{what} is {value!r:.40}; expected an integer of {least} or more")
    return value


def _place(pages: list[ChatPage | None], index: Any) -> ChatPage | None:
    """The page with an index. Raises _Damage."""
    if _whole(index, "the index of a page") >= len(pages):
        raise _Damage(f"the index of a page is {index}, but there are {len(pages)} pages")
    return pages[index]
