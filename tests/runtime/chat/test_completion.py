"""Tests of completion: what is offered for the text before the cursor."""

from __future__ import annotations

from pathlib import Path

import pytest

from granite4v.runtime.chat import ChatPage, Conversation, complete
from granite4v.runtime.chat.completion import MOST_PATHS
from granite4v.runtime.formats import TASKS


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "scans").mkdir()
    for name in ("my page.png", "b.pdf", "notes.txt", "fields.json", ".hidden.png", "scans/deep.PDF", "it's.png"):
        (tmp_path / name).write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def completed(before: str, conversation: Conversation | None = None) -> list[str]:
    """Returns the line that each completion gives."""
    found = complete(before, conversation or Conversation())
    return [before[: len(before) - one.n_replaced] + one.text for one in found]


def test_commands_and_their_beginnings() -> None:
    assert completed("/s") == ["/schema", "/save", "/stats"]
    assert "/attach" in completed("/") and completed("/xyz") == [] and completed("what") == []
    assert all(one.about for one in complete("/", Conversation()))


def test_task_tags() -> None:
    tags = [task.tag for task in TASKS.values() if task.tag]
    assert completed("<") == tags
    assert completed("<tables_h") == ["<tables_html>"]
    assert completed("a <") == []


def test_paths_of_documents(folder: Path) -> None:
    assert completed("/attach ") == [
        "/attach b.pdf",
        r"/attach it\'s.png",
        r"/attach my\ page.png",
        "/attach scans/",
    ]
    assert completed(r"/attach my\ p") == [r"/attach my\ page.png"]
    assert completed("/attach 'my p") == [r"/attach my\ page.png"]
    assert completed("/attach scans/") == ["/attach scans/deep.PDF"]
    assert completed("/attach .h") == ["/attach .hidden.png"]
    assert completed(f"{folder}/b") == [f"{folder}/b.pdf"]
    assert completed("what says ./b") == ["what says ./b.pdf"]
    assert completed("/attach none/") == completed("/attach \0/") == []


def test_paths_of_sessions_and_schemas(folder: Path) -> None:
    for command in ("/load", "/save", "/schema"):
        assert completed(f"{command} ") == [f"{command} fields.json", f"{command} scans/"]


def test_choices_and_pages() -> None:
    assert completed("/copy ") == ["/copy csv", "/copy md", "/copy json"]
    assert completed("/adapter o") == ["/adapter on", "/adapter off"]
    assert completed("/undo x") == []
    pages = [ChatPage(Path(f"/{name}"), 1, 1, None, "") for name in ("a.png", "b.png")]  # type: ignore[arg-type]
    found = complete("/detach ", Conversation(waiting=pages))
    assert [(one.text, one.about) for one in found] == [("1", "a.png"), ("2", "b.png")]


def test_large_folders_are_cut(tmp_path: Path) -> None:
    for number in range(MOST_PATHS + 5):
        (tmp_path / f"{number:04}.png").touch()
    assert len(complete(f"/attach {tmp_path}/", Conversation())) == MOST_PATHS
