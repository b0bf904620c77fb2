"""Tests of the record of attempts that a process leaves when it dies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from granite4v.errors import OutputError
from granite4v.runtime.extract.attempts import FILE, Attempts


def die(path: Path, *digests: str) -> None:
    """Runs a child process that ends while these pages are in flight."""
    if (child := os.fork()) == 0:
        attempts = Attempts(path)
        for digest in digests:
            attempts.begin(digest)
        os._exit(9)
    os.waitpid(child, 0)


def test_deaths_add_up_and_an_end_takes_them_back(tmp_path: Path) -> None:
    path = tmp_path / FILE
    die(path, "p1")
    assert not Attempts(path).exhausted("p1")
    die(path, "p2")
    attempts = Attempts(path)
    attempts.begin("p2")
    attempts.finish("p2")
    die(path, "p2")
    assert not Attempts(path).exhausted("p2")
    attempts = Attempts(path)
    attempts.begin("p1")
    attempts.end()
    assert not Attempts(path).exhausted("p1")
    die(path, "p1")
    attempts = Attempts(path)
    assert attempts.exhausted("p1") and not attempts.exhausted("p2")
    attempts.forget("p1")
    assert not Attempts(path).exhausted("p1") and not Attempts(path).is_suspect("p1")


def test_pages_in_flight_together_are_suspects_and_their_deaths_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / FILE
    for _ in range(5):
        die(path, "p1", "p2")
    attempts = Attempts(path)
    assert not attempts.exhausted("p1") and not attempts.exhausted("p2")
    assert attempts.is_suspect("p1") and attempts.is_suspect("p2") and not attempts.is_suspect("p3")
    attempts.begin("p1")
    attempts.finish("p1")
    assert not Attempts(path).is_suspect("p1") and Attempts(path).is_suspect("p2")
    for _ in range(2):
        assert not Attempts(path).exhausted("p2")
        die(path, "p2")
    assert Attempts(path).exhausted("p2")


def test_a_note_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"p1": 2, "p2": 1}')
    attempts = Attempts(tmp_path / FILE)
    assert attempts.exhausted("p1") and not attempts.exhausted("p2") and attempts.is_suspect("p2")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\0", b'{"p": "x", "q": -1, "r": true}', b"[" * 100_000])
def test_a_damaged_note_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    attempts = Attempts(tmp_path / FILE)
    assert not attempts.exhausted("p")
    attempts.begin("p")
    assert b'"p": 1' in (tmp_path / FILE).read_bytes()


def test_without_a_directory_nothing_is_kept_and_links_are_refused(tmp_path: Path) -> None:
    Attempts(None).begin("p")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / FILE).symlink_to(tmp_path / "x")
    with pytest.raises(OutputError, match="symbolic link"):
        Attempts(tmp_path / FILE)
