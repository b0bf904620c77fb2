"""What a process that died leaves behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from granite4v.errors import OutputError
from granite4v.runtime.extract.attempts import FILE, Attempts


def die(path: Path, digest: str) -> None:
    """A process that ends within a page."""
    if (child := os.fork()) == 0:
        with Attempts(path).begin(digest):
            os._exit(9)
    os.waitpid(child, 0)


def test_deaths_add_up_and_an_end_takes_them_back(tmp_path: Path) -> None:
    path = tmp_path / FILE
    die(path, "p1")
    assert not Attempts(path).exhausted("p1")
    die(path, "p2")
    with Attempts(path).begin("p2"):
        pass
    die(path, "p2")
    assert not Attempts(path).exhausted("p2")
    with pytest.raises(KeyboardInterrupt), Attempts(path).begin("p1"):
        raise KeyboardInterrupt
    assert not Attempts(path).exhausted("p1")
    die(path, "p1")
    attempts = Attempts(path)
    assert attempts.exhausted("p1") and not attempts.exhausted("p2")
    attempts.forget("p1")
    assert not Attempts(path).exhausted("p1")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\0", b'{"p": "x", "q": -1, "r": true}', b"[" * 100_000])
def test_a_damaged_note_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    attempts = Attempts(tmp_path / FILE)
    assert not attempts.exhausted("p")
    with attempts.begin("p"):
        assert b'"p": 1' in (tmp_path / FILE).read_bytes()


def test_without_a_directory_nothing_is_kept_and_links_are_refused(tmp_path: Path) -> None:
    with Attempts(None).begin("p"):
        assert list(tmp_path.iterdir()) == []
    (tmp_path / FILE).symlink_to(tmp_path / "x")
    with pytest.raises(OutputError, match="symbolic link"):
        Attempts(tmp_path / FILE)
