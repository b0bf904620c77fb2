"""Tests of documents in fsspec's file systems: found, fetched within limits, recognized in a later run."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from granite4v.clip_projector import load_image
from granite4v.errors import DocumentError
from granite4v.runtime.documents import Page, PageFailure, count_pages, open_pages
from granite4v.runtime.documents.limits import Limits
from granite4v.runtime.extract import extract
from tests.helpers.fake_model import FakeModel, make_scans
from tests.helpers.page_tests import same


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Any]:
    """memory://scans with the documents of a folder, and one whose name is unusual."""
    system = fsspec.filesystem("memory")
    folder = make_scans(tmp_path / "scans")
    for path in folder.iterdir():
        system.pipe_file(f"/scans/{path.name}", path.read_bytes())
    system.pipe_file("/scans/deep/e#2.png", (folder / "c.png").read_bytes())
    system.pipe_file("/scans/notes.txt", b"no document")
    yield system
    system.rm("/scans", recursive=True)


def read(*inputs: str, **options: Any) -> list[tuple[str, int | None]]:
    return [(item.source, item.number) for item in open_pages(inputs, **options)]


A = [("memory:///scans/a.pdf", number) for number in (1, 2, 3)]
REST = [("memory:///scans/b.pdf", None), ("memory:///scans/c.png", 1), ("memory:///scans/d.bmp", 1)]
DEEP = [("memory:///scans/deep/e#2.png", 1)]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("memory://scans/", A + REST + DEEP),
        ("memory://scans/a.pdf", A),
        ("memory:/scans/a.pdf", A),  # what `Path` makes of it
        ("memory://scans/[ac].*", A + REST[1:2]),
        ("memory://scans/deep/e#2.png", DEEP),
    ],
)
def test_what_a_url_stands_for(memory: Any, given: str, expected: list[Any]) -> None:
    assert read(given) == expected
    assert count_pages([given]).pages is None


def test_pages_are_those_of_the_file_and_copies_do_not_stay(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = tmp_path / "copies"
    copies.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(copies))
    (page,) = open_pages(["memory://scans/c.png"])
    assert isinstance(page, Page) and page.file_state is not None
    same(page.image, load_image(tmp_path / "scans/c.png"))
    with_three = open_pages(["memory://scans/a.pdf"])
    next(with_three)
    assert len(list(copies.iterdir())) == 1
    with_three.close()
    assert not list(copies.iterdir())


def test_what_is_too_large_or_gone_is_a_failure_of_its_own(memory: Any) -> None:
    size = memory.size("/scans/c.png")
    found = list(open_pages(["memory://scans/c.png", "memory://scans/a.pdf"], limits=Limits(url_bytes=size)))
    assert isinstance(found[0], Page) and isinstance(found[1], PageFailure) and len(found) == 2
    assert str(found[1].error) == f"'memory:///scans/a.pdf' has more than {size:,} bytes; split it."
    pages = open_pages(["memory://scans/c.png"])
    memory.rm("/scans/c.png")
    (failure,) = pages
    assert isinstance(failure, PageFailure) and "'memory:///scans/c.png' cannot be read (FileNotFound" in str(
        failure.error
    )
    memory.pipe_file("/scans/c.png", b"")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("memory://nowhere/", "there is no supported file at 'memory://nowhere/'"),
        ("memory://scans/*.tif", "there is no supported file at"),
        ("sftp://me:secret@host/a.pdf", "a URL holds a password"),
    ],
)
def test_what_is_not_there_is_said(memory: Any, given: str, message: str) -> None:
    with pytest.raises(DocumentError, match=message) as caught:
        open_pages([given])
    assert "secret" not in str(caught.value)


def test_a_run_recognizes_what_it_has_read(memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRANITE4V_CACHE", str(tmp_path / "cache"))
    model: Any = FakeModel(tmp_path / "text.gguf")
    inputs, out = ["memory://scans/a.pdf", "memory://scans/c.png"], tmp_path / "out"
    assert len(list(extract(inputs, "tables_html", model=model, out=out, unconstrained=True))) == 4
    assert {path.name[0] for path in out.glob("*.html")} == {"a", "c"}
    model.asked.clear()
    assert not list(extract(inputs, "tables_html", model=model, out=out, unconstrained=True, resume=True))
    memory.pipe_file("/scans/c.png", (tmp_path / "scans/d.bmp").read_bytes())
    memory.pipe_file("/scans/a.pdf", (tmp_path / "scans/c.png").read_bytes())
    again = list(extract(inputs, "tables_html", model=model, out=out, unconstrained=True, resume=True))
    assert [(record.source, record.page, record.value[0].texts()[1][0]) for record in again] == [
        ("memory:///scans/a.pdf", 1, "20")
    ]
