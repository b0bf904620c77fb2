"""Tests of the chat commands: what each prints and what it changes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import granite4v
from granite4v.converter import Options, convert
from granite4v.default_model import checkpoint_folder
from granite4v.runtime.chat import Chat, ChatError, Question, Turn, handle
from granite4v.runtime.extract.schema import load_schema
from granite4v.runtime.formats import TASKS, read_csv, read_html
from tests.helpers.chats import INVOICE, Kept, ask
from tests.helpers.pdfs import text_pdf, write

SCHEMA = {"type": "object", "properties": {"total": {"type": ["string", "null"]}}, "required": ["total"]}


@pytest.fixture(scope="module")
def model() -> Iterator[granite4v.Model]:
    with granite4v.load() as loaded:
        yield loaded


@pytest.fixture
def chat(model: granite4v.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chat:
    monkeypatch.chdir(tmp_path)
    return Chat(model, load_schema=load_schema)


def test_attach_says_what_the_model_sees(chat: Chat) -> None:
    kept = ask(chat, f"/attach {INVOICE}")
    page = chat.conversation.pages[0]
    assert len(kept.said) == 1
    assert kept.said[0].startswith("attached invoice.png: ")
    width, height = page.image.size
    for part in (f"{width:,}x{height:,} px", f"{chat.n_tokens(page):,} tokens"):
        assert part in kept.said[0]


def test_files_dropped_into_a_line_are_attached_first(chat: Chat) -> None:
    kept = ask(chat, f"'{INVOICE}' What is the total?")
    turn = chat.conversation.turns[0]
    assert turn.question.text == "What is the total?" and len(turn.pages) == 1
    assert kept.answers == [turn.answer] and "attached invoice.png" in kept.said[0]
    again = ask(chat, str(INVOICE))
    assert again.answers == [] and again.said == ["invoice.png is attached already"]
    assert len(chat.conversation.pages) == 1


def test_pages_are_listed_chosen_and_detached(chat: Chat, tmp_path: Path) -> None:
    path = write(tmp_path / "two.pdf", text_pdf("one", "two"))
    ask(chat, f"/attach {path}")
    kept = ask(chat, "/pages")
    assert [name for name, _ in kept.listed] == ["1 two.pdf#1", "2 two.pdf#2"]
    assert kept.listed[1][1].startswith("current, ") and "current" not in kept.listed[0][1]
    assert "dpi" in kept.listed[0][1] and "not asked about yet" in kept.listed[0][1]
    assert ask(chat, "/pages 1").listed[0][1].startswith("current, ")
    assert "detached two.pdf#1" in ask(chat, "/detach").said[0]
    assert "detached two.pdf#2" in ask(chat, "/detach 1").said[0]
    ask(chat, f"/attach {path}")
    assert "detached 2 pages; " in ask(chat, "/detach all").said[0]
    assert chat.conversation.pages == []


def test_a_schema_reads_fields(chat: Chat, tmp_path: Path) -> None:
    (tmp_path / "my schema.json").write_text(json.dumps(SCHEMA))
    kept = ask(chat, f"/attach {INVOICE}", "/schema my schema.json")
    assert set(json.loads(kept.answers[0])) == {"total"}
    assert chat.conversation.turns[0].question.task == "kvp"
    assert ask(chat, "/regen 0").answers == kept.answers


def test_undo_clear_and_regen(chat: Chat) -> None:
    ask(chat, f"/attach {INVOICE}", "What is the total?", "What is the date?")
    assert ask(chat, "/undo").said == ["took back: What is the date?"]
    assert len(chat.conversation.turns) == 1
    kept = ask(chat, "/regen")
    assert len(kept.answers) == 1 and len(chat.conversation.turns) == 1
    assert ask(chat, "/clear").said == ["forgot 1 question; 1 page still attached (/detach all)"]
    assert chat.conversation.turns == [] and len(chat.conversation.waiting) == 1


def test_a_stopped_answer_is_said(chat: Chat) -> None:
    kept = Kept()
    kept.stop_after = 1  # not later: a slow reader gets a short answer in two pieces
    handle(chat, f"/attach {INVOICE}", kept)
    handle(chat, "<tables_html>", kept)
    assert any(said.startswith("stopped after ") for said in kept.said)
    kept.stop_after = 0
    handle(chat, "<tables_otsl>", kept)
    assert kept.said[-1] == "stopped before the first word; nothing was added."
    assert len(chat.conversation.turns) == 1


def test_saved_and_loaded_the_chat_goes_on_alike(chat: Chat, model: granite4v.Model, tmp_path: Path) -> None:
    page = tmp_path / "page.png"
    page.write_bytes(INVOICE.read_bytes())
    ask(chat, "/attach page.png", "What is the total?")
    assert "saved to " in ask(chat, "/save talk").said[0]
    expected = ask(chat, "What is the date?").answers
    ask(chat, "/save")  # again, to the same file
    assert len(json.loads((tmp_path / "talk").read_text())["turns"]) == 2
    other = Chat(model)
    kept = ask(other, f"/load {tmp_path / 'talk'}")
    assert kept.said == ["loaded 2 questions and 1 page; the last: What is the date?"]
    assert ask(other, "/undo", "What is the date?").answers == expected
    page.write_bytes(page.read_bytes() + b"\0")
    assert "page.png has changed since this was saved" in ask(Chat(model), "/load talk").said[0]
    page.unlink()
    gone = ask(Chat(model), "/load talk")
    assert "there is no file" in gone.said[0] and "loaded 2 questions and 0 pages" in gone.said[1]


def test_no_file_is_overwritten(chat: Chat, tmp_path: Path) -> None:
    ask(chat, f"/attach {INVOICE}", "<tables_html>")
    (tmp_path / "there").write_text("mine")
    for command in ("/save there", "/copy csv there"):
        with pytest.raises(ChatError, match="'there' exists already"):
            ask(chat, command)
    assert (tmp_path / "there").read_text() == "mine"
    with pytest.raises(granite4v.OutputError):
        ask(chat, "/save none/there")


def test_tables_are_copied_to_the_clipboard_or_a_file(chat: Chat, tmp_path: Path) -> None:
    kept = ask(chat, f"/attach {INVOICE}", "<tables_html>", "/copy", "/copy md", "/copy csv my table.csv")
    table = read_html(chat.conversation.turns[0].answer)[0]
    assert read_csv(kept.copied[0]).texts() == table.texts() and kept.copied[1].startswith("|")
    assert (tmp_path / "my table.csv").read_text().strip() == kept.copied[0].strip()
    assert "as csv to 'my table.csv'" in kept.said[-1].replace(f"{tmp_path}/", "")


def test_stats_tell_where_the_time_and_the_context_went(chat: Chat) -> None:
    ask(chat, f"/attach {INVOICE}", "What is the total?", "What is the date?")
    rows = dict(ask(chat, "/stats").listed)
    stats = chat.conversation.turns[-1].stats
    assert stats is not None
    usage = chat.usage()
    assert rows["context"] == f"{usage.used:,} of {usage.n_ctx:,} tokens used, {usage.left:,} left"
    assert rows["reused"] == f"{stats.n_reused:,} tokens of it; 0 images encoded"
    assert "tiles" in rows["invoice.png"] and "tokens/s" in rows["last answer"]
    assert rows["first token"] == f"after {stats.first_token_s:.2f} s"


def test_help_lists_every_command_and_task(chat: Chat) -> None:
    text = " ".join(f"{name} {about}" for name, about in ask(chat, "/help").listed)
    assert all(task.tag in text for task in TASKS.values() if task.tag)
    for name in ("/attach", "/detach", "/pages", "/schema", "/undo", "/regen", "/save", "/load", "/copy", "/stats"):
        assert name in text
    for name in ("/adapter", "/clear", "/help", "/quit", "Alt-Enter", "Ctrl-C"):
        assert name in text


def test_quit_ends_and_beginnings_are_enough(chat: Chat) -> None:
    assert not handle(chat, "/quit", Kept()) and not handle(chat, "/q", Kept())
    assert handle(chat, "  ", Kept())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/nothing", "there is no command '/nothing'; /help lists them"),
        ("/", "there is no command '/'"),
        ("/s", "'/s' may be /schema or /save or /stats"),
        ("/tmp/no such.png", "there is no file '/tmp/no'"),
        ("/attach", "a file is missing: /attach FILE"),
        ("/attach none.png", "there is no file 'none.png'"),
        ("/detach", "no page is attached"),
        ("/pages", "no page is attached"),
        ("/pages ²", "no page is attached"),
        ("/schema none.json", "none.json"),
        ("/undo", "no question to take back"),
        ("/regen", "no question to answer again"),
        ("/copy", "no answer yet"),
        ("/copy html", "'html' is no format that '/copy' knows; the formats are csv, md, json."),
        ("/pages 3", "no page is attached; '/attach FILE' attaches one"),
        ("/save", "nothing to save yet"),
        ("/load none.json", "there is no file"),
        ("/load", "a file is missing: /load FILE"),
        ("/load ~nobody-of-that-name/x.json", "there is no file"),
        ("/load nul\0.json", "there is no file"),
        ("/adapter on", "no separate adapter"),
        ("<tables_html>", "none is attached"),
    ],
)
def test_what_is_wrong_is_one_line(chat: Chat, line: str, message: str) -> None:
    with pytest.raises(granite4v.Granite4vError) as found:
        ask(chat, line)
    assert message in str(found.value) and "\n" not in str(found.value)
    assert chat.conversation.turns == [] and chat.conversation.pages == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nul\0.json", "'nul\\x00.json' cannot be the name of a file"),
        ("x" * 300, "x' cannot be the name of a file"),
        ("folder", "'folder' exists already"),
        ("link", "'link' exists already"),
        ("/dev/null", "'/dev/null' exists already"),
        ("~nobody-of-that-name/x.json", "cannot write"),
        ("none/x.json", "cannot write"),
        ("file/x.json", "cannot write"),
    ],
)
def test_what_cannot_be_written_is_one_line(chat: Chat, tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    before = sorted(tmp_path.iterdir())
    chat.conversation.turns.append(Turn(Question("?"), (), "|a|\n|-|\n|1|"))
    for line in (f"/save {name}", f"/copy csv {name}"):
        with pytest.raises(granite4v.Granite4vError) as found:
            ask(chat, line)
        assert message in str(found.value) and "\n" not in str(found.value)
    assert sorted(tmp_path.iterdir()) == before


def test_home_is_the_users(chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "schema.json").write_text(json.dumps(SCHEMA))
    ask(chat, f"/attach {INVOICE}", "/schema ~/schema.json", "/save ~/chat.json", "/load ~/chat.json")
    assert chat.saved_as == tmp_path / "home" / "chat.json" and len(chat.conversation.turns) == 1


def test_wrong_arguments_of_regen_and_copy(chat: Chat) -> None:
    ask(chat, "Hello?")
    for text in ("hot", "-1", "nan", "3"):
        with pytest.raises(ChatError, match="is no temperature"):
            ask(chat, f"/regen {text}")
    with pytest.raises(ChatError, match="no answer so far has a table"):
        ask(chat, "/copy csv")
    assert len(chat.conversation.turns) == 1


def test_the_adapter_is_switched(tmp_path: Path) -> None:
    convert(checkpoint_folder(), tmp_path / "separate", Options("F16", "F16", lora="separate"))
    with granite4v.load(tmp_path / "separate") as model:
        chat = Chat(model, max_tokens=12)
        assert ask(chat, "/adapter").said == ["the adapter is auto: on while a page is attached"]
        answers = {}
        for state, wanted in (("on", True), ("off", False)):
            assert ask(chat, f"/adapter {state}").said == [f"the adapter is {state}"]
            answers[state] = ask(chat, "What is the total?", "/undo").answers[0]
            assert answers[state] == model.generate("What is the total?", max_tokens=12, lora=wanted).text
        with pytest.raises(ChatError, match="neither on, off nor auto"):
            ask(chat, "/adapter maybe")
        assert chat.adapter is False
