"""Tests of a conversation as data: the messages that the model gets after each change of turns and pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image as Pillow

from granite4v.clip_projector import Image
from granite4v.runtime.chat import ChatError, ChatPage, Conversation, Question, Turn


def page(shade: int, n_pages: int = 1) -> ChatPage:
    image = Image(Pillow.new("RGB", (8, 8), (shade,) * 3))
    return ChatPage(Path(f"/x/page{shade}.png"), 1, n_pages, image, "00")


def shown(messages: list[dict[str, Any]]) -> list[str]:
    """Writes each message as a line: 'user: i i text' with an i for each image."""

    def parts(content: Any) -> str:
        if isinstance(content, str):
            return content
        return " ".join("i" if part["type"] == "image" else part["text"] for part in content)

    return [f"{message['role']}: {parts(message['content'])}" for message in messages]


def test_pages_go_with_the_next_question_and_stay_with_it() -> None:
    first, second, third = map(page, (1, 2, 3))
    conversation = Conversation("Be brief.")
    conversation.attach(first)
    conversation.attach(second)
    messages, pages = conversation.messages("one?")
    assert shown(messages) == ["system: Be brief.", "user: i i one?"] and pages == [first, second]
    conversation.add(Turn(Question("one?"), (first, second), "1."))
    conversation.attach(third)
    messages, pages = conversation.messages("two?")
    assert shown(messages)[1:] == ["user: i i one?", "assistant: 1.", "user: i two?"]
    assert pages == [first, second, third] == conversation.pages
    assert conversation.messages()[1] == [first, second]


def test_a_task_sees_one_page_and_nothing_else() -> None:
    conversation = Conversation("Be brief.", waiting=[page(1)])
    conversation.add(Turn(Question("one?"), tuple(conversation.waiting), "1."))
    messages, pages = conversation.messages_about("<tables_html>", conversation.pages[0])
    assert shown(messages) == ["system: Be brief.", "user: i <tables_html>"] and pages == conversation.pages


def test_the_current_page_is_the_last_one_or_the_chosen_one() -> None:
    first, second = page(1), page(2)
    conversation = Conversation()
    assert conversation.current is None
    conversation.attach(first)
    conversation.attach(second)
    assert conversation.current is second
    conversation.chosen = first
    assert conversation.current is first
    conversation.detach(first)
    assert conversation.current is second
    conversation.chosen = second
    third = page(3)
    conversation.attach(third)
    assert conversation.current is third


def test_undo_gives_the_pages_back_in_their_place() -> None:
    first, second = page(1), page(2)
    conversation = Conversation()
    conversation.attach(first)
    turn = Turn(Question("one?"), (first,), "1.")
    conversation.add(turn)
    conversation.attach(second)
    assert conversation.undo() is turn
    assert conversation.waiting == [first, second] and conversation.turns == []
    with pytest.raises(ChatError, match="no question to take back"):
        conversation.undo()


def test_detaching_leaves_the_text() -> None:
    first, second = page(1), page(2)
    conversation = Conversation(turns=[Turn(Question("one?"), (first, second), "1.")])
    conversation.detach(first)
    messages, pages = conversation.messages("two?")
    assert shown(messages) == ["user: i one?", "assistant: 1.", "user: two?"] and pages == [second]


def test_clearing_leaves_the_pages() -> None:
    first, second = page(1), page(2)
    conversation = Conversation(turns=[Turn(Question("one?"), (first,), "1.")], waiting=[second])
    conversation.clear()
    assert conversation.turns == [] and conversation.waiting == [first, second]


def test_names_tell_the_pages_of_a_document() -> None:
    assert page(1).name == "page1.png" and page(1, n_pages=3).name == "page1.png#1"
    assert Question("How much?").label == "How much?"
    assert Question("<tables_html>", "tables_html").label == "<tables_html>"
    assert Question("Extract ...", "kvp").label == "kvp"
