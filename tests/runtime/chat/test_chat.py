"""Tests of chats: answers equal those of a model that gets the complete conversation at once; no page is read twice."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pikepdf
import pytest
from PIL import Image

import granite4v
from granite4v.errors import DocumentError, PasswordError, PromptError
from granite4v.runtime.chat import Chat, ChatError, ChatPage, ContextFull, Question, Turn
from granite4v.runtime.chat.chat import MIN_ANSWER
from granite4v.runtime.chat.pages import read_pages
from granite4v.runtime.engine.page_store import PageStore
from tests.helpers.chats import INVOICE
from tests.helpers.pdfs import scan_pdf, text_pdf, write
from tests.helpers.pictures import text_picture

QUESTIONS = ("What is the total?", "What is the date?")


@pytest.fixture(scope="module")
def model() -> Iterator[granite4v.Model]:
    with granite4v.load() as loaded:
        yield loaded


@pytest.fixture
def chat(model: granite4v.Model) -> Chat:
    model.clear_cache()
    return Chat(model, max_tokens=48)


@pytest.fixture
def small(model: granite4v.Model) -> Iterator[Chat]:
    """A chat with a context of 700 tokens."""
    with granite4v.load(n_ctx=700) as loaded:
        yield Chat(loaded)


def asked(chat: Chat, text: str) -> Turn:
    """Asks a question, reads the complete answer and returns the turn."""
    reply = chat.ask(chat.question(text))
    assert "".join(reply) == reply.text
    assert reply.turn is not None and chat.conversation.turns[-1] is reply.turn
    return reply.turn


def messages_of(turns: list[Turn], question: str) -> list[dict[str, Any]]:
    """Writes a conversation out by hand: the page is in the first message, everything else is text."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        messages += [
            {"role": "user", "content": [{"type": "text", "text": turn.question.text}]},
            {"role": "assistant", "content": turn.answer},
        ]
    messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
    messages[0]["content"].insert(0, {"type": "image", "image": INVOICE})
    return messages


def test_answers_are_those_of_the_whole_conversation(chat: Chat, model: granite4v.Model) -> None:
    chat.attach(str(INVOICE))
    turns = [asked(chat, question) for question in QUESTIONS]
    for number, turn in enumerate(turns):
        model.clear_cache()
        whole = model.generate(messages_of(turns[:number], turn.question.text), max_tokens=48)
        assert turn.answer == whole.text and turn.answer


def test_a_follow_up_reads_no_page_again(chat: Chat) -> None:
    (page,), _ = chat.attach(str(INVOICE))
    first, second = (asked(chat, question).stats for question in QUESTIONS)
    assert first is not None and second is not None
    assert first.n_encoded == 1 and second.n_encoded == 0
    assert first.n_image == second.n_image == chat.n_tokens(page)
    assert second.n_reused >= first.n_prompt - 32  # all but the last batch of the first prompt
    assert second.n_prompt - second.n_reused < 64
    assert second.encode_s < 0.01 and 0 < second.first_token_s <= second.total_s


def test_a_task_is_answered_as_if_it_were_asked_alone(model: granite4v.Model) -> None:
    chat = Chat(model, max_tokens=3000)
    chat.attach(str(INVOICE))
    asked(chat, QUESTIONS[0])
    task = asked(chat, " <tables_html> ")
    assert task.question.task == "tables_html" and task.pages == () and task.about is chat.conversation.pages[0]
    assert task.stats is not None and task.stats.n_encoded == 0 and task.stats.n_reused >= task.stats.n_image
    model.clear_cache()
    alone = model.generate("<tables_html>", [INVOICE], max_tokens=3000, constraint=granite4v.grammar_for("tables_html"))
    assert task.answer == alone.text and "<td>" in task.answer
    after = asked(chat, QUESTIONS[1])
    assert after.stats is not None and after.stats.n_encoded == 0 and after.stats.n_reused >= after.stats.n_image


def test_a_task_on_another_page_costs_the_conversation_no_page(tmp_path: Path, model: granite4v.Model) -> None:
    """The task reads only the second page, and its rows replace those of the conversation; these are restored from the
    store."""
    page = Image.open(INVOICE).convert("RGB")
    path = write(tmp_path / "two.pdf", scan_pdf(page, page.rotate(180)))
    answers = []
    with granite4v.load(page_store=PageStore(tmp_path / "store")) as stored:
        for used in (model, stored):
            used.clear_cache()
            chat = Chat(used, max_tokens=48)
            chat.attach(str(path))
            turns = [asked(chat, text) for text in (QUESTIONS[0], "<tables_otsl>", QUESTIONS[1])]
            answers.append([turn.answer for turn in turns])
    assert answers[0] == answers[1]
    assert turns[1].pages == () and turns[1].about is chat.conversation.pages[1]
    last = turns[2].stats
    assert last is not None and last.n_encoded == 0 and last.n_reused + last.n_stored >= last.n_image


def test_taking_back_keeps_what_still_holds(chat: Chat) -> None:
    chat.attach(str(INVOICE))
    first = asked(chat, QUESTIONS[0])
    asked(chat, QUESTIONS[1])
    chat.conversation.undo()
    again = asked(chat, "Who is the customer?")
    assert again.stats is not None and first.stats is not None
    assert again.stats.n_encoded == 0 and again.stats.n_reused >= first.stats.n_prompt - 32
    assert [turn.question.text for turn in chat.conversation.turns] == [QUESTIONS[0], "Who is the customer?"]
    while chat.conversation.turns:
        chat.conversation.undo()
    assert len(chat.conversation.waiting) == 1
    other = asked(chat, QUESTIONS[1])
    assert other.stats is not None and other.stats.n_encoded == 0 and other.stats.n_reused >= other.stats.n_image


def test_another_answer_takes_the_place_of_the_last(chat: Chat, tmp_path: Path) -> None:
    chat.attach(str(INVOICE))
    first = asked(chat, QUESTIONS[0])
    other = tmp_path / "other.png"
    text_picture((60, 40)).save(other)
    (waiting,), _ = chat.attach(str(other))
    reply = chat.again(temperature=0)
    assert "".join(reply) == first.answer  # greedy
    assert [turn.pages for turn in chat.conversation.turns] == [first.pages]
    assert chat.conversation.waiting == [waiting]
    sampled = chat.again(temperature=2)
    list(sampled)
    assert len(chat.conversation.turns) == 1 and chat.conversation.waiting == [waiting]


def test_a_stopped_answer_is_kept_as_far_as_it_came(chat: Chat) -> None:
    chat.attach(str(INVOICE))
    reply = chat.ask(chat.question("<tables_html>"))
    for n_pieces, _ in enumerate(reply, 1):
        if n_pieces == 3:
            reply.cancel()
    assert reply.turn is not None and reply.turn.finish_reason == "cancelled" and reply.turn.answer
    assert chat.conversation.turns == [reply.turn]
    assert asked(chat, QUESTIONS[0]).answer


def test_an_answer_that_is_stopped_before_its_first_token_never_was(chat: Chat) -> None:
    pages, _ = chat.attach(str(INVOICE))
    reply = chat.ask(chat.question(QUESTIONS[0]))
    reply.cancel()
    assert list(reply) == [] and reply.turn is None
    assert chat.conversation.turns == [] and chat.conversation.waiting == pages
    turn = asked(chat, QUESTIONS[0])
    reply = chat.again()
    reply.cancel()
    list(reply)
    assert chat.conversation.turns == [turn] and chat.conversation.waiting == []
    chat.again()  # as if Ctrl-C came before anything was read
    assert chat.conversation.turns == [turn] and chat.conversation.waiting == []


def test_a_full_context_is_told_before_it_happens(small: Chat) -> None:
    (page,), _ = small.attach(str(INVOICE))
    used = small.usage().used
    assert used > small.n_tokens(page) and small.usage().left == 700 - used
    with pytest.raises(ContextFull) as found:
        small.ask(Question("word " * 600))
    (needed,) = re.findall(r"question: ([\d,]+) tokens with an answer", str(found.value))
    enough = small.usage().used + int(needed.replace(",", ""))
    assert enough > 1400 and f"--ctx-size {enough}." in str(found.value)
    assert "/detach 1 (invoice.png" in str(found.value)
    assert small.conversation.turns == [] and len(small.conversation.waiting) == 1
    n_asked = 0
    while small.shortage() is None:
        asked(small, "word " * 20)
        n_asked += 1
    assert n_asked and "--ctx-size 1400" in str(small.shortage())
    assert "/undo" in str(small.shortage()) and "/clear" in str(small.shortage())
    with pytest.raises(ContextFull, match="no room for this question"):
        small.ask(Question("word " * 200))
    assert len(small.conversation.turns) == n_asked
    small.conversation.clear()
    assert small.shortage() is None


def test_pages_that_do_not_fit_are_refused_or_left_out(small: Chat, tmp_path: Path) -> None:
    page = Image.open(INVOICE).convert("RGB")
    three = write(tmp_path / "three.pdf", scan_pdf(page, page, page))
    pages, notes = small.attach(str(three))
    assert [page.number for page in pages] == [1]
    assert "has 3 pages, too many for the context; attached page 1" in notes[0]
    with pytest.raises(ContextFull, match=r"no room for 2 pages of 'three.pdf'"):
        small.attach(f"{three}#2-3")
    assert small.conversation.pages == pages


def test_no_more_pages_are_read_than_there_is_room_for(
    small: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Image.open(INVOICE).convert("RGB")
    many = write(tmp_path / "many.pdf", scan_pdf(*[page] * 9))
    read: list[ChatPage | DocumentError] = []

    def noting(*arguments: Any) -> Iterator[ChatPage | DocumentError]:
        for found in read_pages(*arguments):
            read.append(found)
            yield found

    monkeypatch.setattr("granite4v.runtime.chat.chat.read_pages", noting)
    with pytest.raises(ContextFull, match=r"no room for 9 pages of 'many.pdf'"):
        small.attach(f"{many}#1-9")
    n_each = small.n_tokens(next(found for found in read if isinstance(found, ChatPage)))
    assert len(read) == (700 - MIN_ANSWER) // n_each + 1 < 9


def test_pages_of_a_pdf(chat: Chat, tmp_path: Path) -> None:
    path = write(tmp_path / "two words.pdf", text_pdf("one", "two", "three"))
    pages, notes = chat.attach(str(path))
    assert [page.name for page in pages] == ["two words.pdf#1", "two words.pdf#2", "two words.pdf#3"] and notes == []
    assert chat.read_page(str(path), 2).digest == pages[1].digest
    again, notes = chat.attach(f"{path}#1")
    assert again == [] and "attached already" in notes[0] and chat.conversation.current is pages[0]
    for page in pages:
        chat.conversation.detach(page)
    some, _ = chat.attach(f"{path}#3,1")
    assert [page.number for page in some] == [1, 3] and [p.digest for p in some] == [pages[0].digest, pages[2].digest]
    more, notes = chat.attach(f"{path}#2,4")
    assert [page.number for page in more] == [2] and "there is no page 4" in notes[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.png", "there is no file"),
        ("missing.png#2", "there is no file"),
        ("{folder}", "is a directory; attach the files in it"),
        ("/dev/null", "is a device or a pipe"),
        ("{folder}/broken.png", "damaged|cannot be read"),
        ("{folder}/empty.pdf", "is empty"),
        ("{folder}/text.png", "holds text; expected PNG"),
        ("{folder}/one.png#3", "has 1 page; there is no page 3"),
        ("{folder}/one.png#x", "pages"),
        ("nul\0.png", "cannot be read"),
        ("", "there is no file ''"),
    ],
)
def test_what_cannot_be_attached_is_said(chat: Chat, tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "broken.png").write_bytes(INVOICE.read_bytes()[:200])
    (tmp_path / "empty.pdf").write_bytes(b"")
    (tmp_path / "text.png").write_text("hello")
    text_picture((60, 40)).save(tmp_path / "one.png")
    with pytest.raises(granite4v.Granite4vError, match=message):
        chat.attach(name.format(folder=tmp_path))
    assert chat.conversation.pages == []


def test_the_password_of_a_pdf_is_asked_for(chat: Chat, tmp_path: Path) -> None:
    lock = pikepdf.Encryption(owner="o", user="secret")
    locked = write(tmp_path / "locked.pdf", text_pdf("Total 5"), encryption=lock)
    other = write(tmp_path / "other.pdf", text_pdf("Total 7"), encryption=lock)
    [plain], _ = chat.attach(str(write(tmp_path / "plain.pdf", text_pdf("Total 5"))))
    chat.conversation.detach(plain)
    with pytest.raises(PasswordError):
        chat.attach(str(locked))
    for nothing in ("", None):
        names: list[str] = []
        chat.ask_password = answering(names, nothing)
        with pytest.raises(PasswordError):
            chat.attach(str(locked))
        assert names == ["locked.pdf"] and not chat.conversation.pages
    chat.ask_password = answering(names, "wrong", "secret")
    [page], _ = chat.attach(str(locked))
    [again], _ = chat.attach(str(other))  # opened with the password that opened the first
    assert chat.conversation.pages == [page, again]
    assert page.digest == plain.digest != again.digest
    assert names == ["locked.pdf"] * 3


def answering(names: list[str], *passwords: str | None) -> Callable[[str], str | None]:
    """Returns a function that gives these passwords one after the other and appends the names it was asked about."""
    left = iter(passwords)

    def ask(name: str) -> str | None:
        names.append(name)
        return next(left)

    return ask


def test_questions_that_cannot_be_asked(chat: Chat) -> None:
    with pytest.raises(PromptError, match="empty"):
        chat.question("  ")
    with pytest.raises(ChatError, match="<tables_html> reads a page, and none is attached"):
        chat.ask(chat.question("<tables_html>"))
    with pytest.raises(ChatError, match="no question to answer again"):
        chat.again()
    chat.attach(str(INVOICE))
    with pytest.raises(PromptError, match="beside other text"):
        chat.ask(chat.question("<tables_html> please"))
    asked(chat, "<tables_otsl>")
    chat.conversation.detach(chat.conversation.pages[0])
    with pytest.raises(ChatError, match="no longer attached"):
        chat.again()
    assert len(chat.conversation.turns) == 1


def test_a_model_without_a_vision_file_takes_no_page(make_model: Callable[..., Path], tmp_path: Path) -> None:
    text = next(Path(granite4v.default_model.embedded_model(str)).glob("text-*.gguf"))
    alone = tmp_path / "text.gguf"
    alone.write_bytes(text.read_bytes())
    with granite4v.load(alone) as model:
        chat = Chat(model, max_tokens=4)
        with pytest.raises(granite4v.ModelFileError, match="vision file|mmproj"):
            chat.attach(str(INVOICE))
        assert asked(chat, "Hello?").stats is not None
        with pytest.raises(DocumentError):
            chat.read_page("missing.png", 1)
