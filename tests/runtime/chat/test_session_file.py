"""Tests of saved conversations: what is loaded again, and what is reported about pages that are missing or changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as Pillow

from granite4v.clip_projector import Image
from granite4v.errors import DocumentError
from granite4v.runtime.chat import ChatError, ChatPage, Conversation, Question, Turn
from granite4v.runtime.chat.chat import schema_question
from granite4v.runtime.chat.session_file import load, save

SCHEMA = {"type": "object", "properties": {"total": {"type": "string"}}, "required": ["total"]}


def page(name: str, number: int = 1) -> ChatPage:
    image = Image(Pillow.new("RGB", (8, 8), (number,) * 3))
    return ChatPage(Path(f"/x/{name}"), number, 3, image, f"{name} of yesterday")


@pytest.fixture
def conversation() -> Conversation:
    first, second = page("scan.pdf"), page("scan.pdf", 2)
    turns = [
        Turn(Question("What is it?"), (first, second), "An invoice – é 東京 \ud800."),
        Turn(schema_question(SCHEMA), (), '{"total": "1"}', "cancelled", first),
        Turn(Question("<tables_html>", "tables_html"), (), "<table>", "length", second),
    ]
    return Conversation("Be brief.", turns, [page("other.png")], first)


@pytest.fixture
def saved(conversation: Conversation, tmp_path: Path) -> Path:
    path = tmp_path / "chat.json"
    save(conversation, path, "model.gguf")
    return path


def shown(conversation: Conversation) -> Any:
    """Returns a complete conversation as plain data."""
    pages = conversation.pages
    names = [(str(page.path), page.number) for page in pages]
    turns = [
        (
            turn.question.text,
            turn.question.task,
            turn.question.schema,
            turn.answer,
            turn.finish_reason,
            len(turn.pages),
            None if turn.about is None else pages.index(turn.about),
        )
        for turn in conversation.turns
    ]
    chosen = None if conversation.chosen is None else pages.index(conversation.chosen)
    return conversation.system, names, turns, len(conversation.waiting), chosen


def test_everything_comes_back(conversation: Conversation, saved: Path) -> None:
    loaded = load(saved, lambda path, number: page(Path(path).name, number))
    assert loaded.notes == ()
    assert shown(loaded.conversation) == shown(conversation)
    questions = [turn.question for turn in loaded.conversation.turns]
    assert questions[1].constraint is not None and questions[2].constraint is not None
    assert questions[0].constraint is None


def test_no_pixels_are_kept(saved: Path) -> None:
    content = json.loads(saved.read_text(encoding="utf-8"))
    assert [sorted(one) for one in content["pages"]] == [
        ["file_sha256", "number", "path", "pixels_sha256", "size_px"]
    ] * 3
    assert content["model"] == "model.gguf"


def test_a_page_that_changed_is_told(saved: Path) -> None:
    def today(path: str, number: int) -> ChatPage:
        found = page(Path(path).name, number)
        return found if found.path.name != "other.png" else ChatPage(found.path, 1, 1, found.image, "today")

    loaded = load(saved, today)
    assert len(loaded.notes) == 1 and "other.png has changed since this was saved" in loaded.notes[0]
    assert len(loaded.conversation.pages) == 3


def test_a_page_that_is_gone_is_left_out(saved: Path) -> None:
    def read(path: str, number: int) -> ChatPage:
        if number == 1:
            raise DocumentError(f"there is no file '{path}'.")
        return page(Path(path).name, number)

    loaded = load(saved, read)
    assert [note.split(".")[0] for note in loaded.notes] == ["there is no file '/x/scan", "there is no file '/x/other"]
    assert [p.number for p in loaded.conversation.pages] == [2]
    first, second, third = loaded.conversation.turns
    assert len(first.pages) == 1 and second.about is None and third.about is first.pages[0]
    assert loaded.conversation.chosen is None


def damaged(path: Path, change: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(format="other"), "not a saved chat"),
        (lambda content: content.update(version=2), "has version 2, but this program reads version 1"),
        (lambda content: content.pop("turns"), "is damaged: 'turns' is missing. It is not loaded"),
        (
            lambda content: content["turns"][0].update(pages=[7]),
            "damaged: the index of a page is 7, but there are 3 pages",
        ),
        (
            lambda content: content["turns"][0].update(pages=[-1]),
            "damaged: the index of a page is -1; expected an integer",
        ),
        (lambda content: content["turns"][0].update(pages=3), "damaged: an entry has a different type than expected"),
        (lambda content: content["turns"][0].update(task="other"), "damaged: unknown task 'other'; known: chart2csv"),
        (lambda content: content["turns"][0].update(answer=None), "damaged: answer is None; expected text"),
        (lambda content: content["turns"][0].update(finish_reason="x"), "damaged: finish_reason is 'x'; expected stop"),
        (lambda content: content["turns"][1].update(schema={"type": 3}), "damaged|schema"),
        (lambda content: content["turns"][1].update(schema="x"), "damaged: schema is 'x'; expected an object"),
        (lambda content: content["pages"][0].update(path=3), "damaged: path is 3; expected text"),
        (lambda content: content["pages"][0].update(number=True), "damaged"),
        (
            lambda content: content["pages"][0].update(number=0),
            "damaged: the number of a page is 0; expected an integer of 1",
        ),
        (lambda content: content.update(pages=content["pages"] * 200), "has 600 pages; expected at most 500"),
        (lambda content: content.update(system=3), "damaged"),
        (lambda content: content.update(chosen=9), "damaged: the index of a page is 9, but there are 3 pages"),
        (lambda content: content.update(waiting=["x"]), "damaged"),
    ],
)
def test_other_files_are_refused(saved: Path, change: Any, message: str) -> None:
    damaged(saved, change)
    with pytest.raises(ChatError, match=message):
        load(saved, lambda path, number: page(Path(path).name, number))


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff\xfe", b"{", b"[" * 100_000, b"null"])
def test_what_is_no_session_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ChatError, match="not a saved chat"):
        load(path, lambda path, number: page(path))
    with pytest.raises(ChatError, match="there is no file"):
        load(tmp_path, lambda path, number: page(path))
