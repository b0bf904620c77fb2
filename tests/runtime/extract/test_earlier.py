"""Tests that failures of an earlier run are not tried again while the file is unchanged, with a reader that dies on
purpose."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from granite4v.runtime.documents import reader
from granite4v.runtime.extract import Record
from tests.helpers.fake_model import FakeModel, run

Asked = list[tuple[str, int | None]]


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asked:
    """The requests to readers that know the documents of `strange_reader`, as (operation, page)."""
    monkeypatch.setattr(reader, "WORKER", "tests.helpers.strange_reader")
    monkeypatch.chdir(tmp_path)
    asked: Asked = []
    ask = reader.Reader.ask

    def recorded(self: reader.Reader, request: dict[str, Any], content: bytes) -> None:
        asked.append((request["op"], request.get("number")))
        ask(self, request, content)

    monkeypatch.setattr(reader.Reader, "ask", recorded)
    return asked


def document(stem: str) -> Path:
    path = Path(f"{stem}.strange")
    path.write_text("strange")
    return path


def read(model: FakeModel, path: Path, **options: Any) -> list[tuple[int | None, str | None]]:
    """Runs once and returns (page, error type) of each new record."""
    records: list[Record] = list(run(model, path, ("tables_html",), out="out", **options))
    return [(record.page, record.error_type) for record in records]


def test_a_document_whose_opening_ended_the_reader_is_not_opened_again(model: FakeModel, asked: Asked) -> None:
    path = document("kill-0")
    assert read(model, path) == [(None, "ReaderEnded")]
    assert asked == [("open", None)] * 2
    kept = Path("out/results.jsonl").read_bytes()

    asked.clear()
    assert read(model, path, resume=True) == [] and asked == []
    assert Path("out/results.jsonl").read_bytes() == kept

    assert read(model, path, resume=True, retry_failed=True) == []  # tried again, with the same failure
    assert asked == [("open", None)] * 2

    asked.clear()
    os.utime(path, ns=(1, 1))
    assert read(model, path, resume=True) == [(None, "ReaderEnded")]
    assert asked == [("open", None)] * 2


def test_another_task_does_not_open_it_again(model: FakeModel, asked: Asked) -> None:
    path = document("kill-0")
    read(model, path)
    asked.clear()
    records = list(run(model, path, ("tables_html", "kvp"), out="out", resume=True))
    assert [(record.task, record.error_type) for record in records] == [("kvp", "ReaderEnded")] and asked == []


def test_a_document_that_was_given_up_is_given_up_at_the_same_page(model: FakeModel, asked: Asked) -> None:
    path = document("kill-1-2-3-4")  # given up after three pages that ended the reader; page 4 is not tried
    ended = [(page, "ReaderEnded") for page in (1, 2, 3)]
    assert read(model, path) == [*ended, (None, "DocumentError")]
    asked.clear()
    assert read(model, path, resume=True) == []
    assert not [number for op, number in asked if op == "render"]
    assert read(model, path, resume=True, pages="4") == [(4, "ReaderEnded")]  # as its message advises
