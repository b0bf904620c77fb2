"""The cache folder: its location for each user, and that none of its states stops a command."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import platformdirs
import pytest

from granite4v import paths


@pytest.fixture
def homeless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user without a home directory; the temporary folder is the test's own."""

    def no_home(*args: Any, **options: Any) -> str:
        raise RuntimeError("could not determine the home directory for '~/.cache'")

    monkeypatch.delenv("GRANITE4V_CACHE", raising=False)
    monkeypatch.setattr(platformdirs, "user_cache_dir", no_home)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    paths.temporary_folder.cache_clear()
    yield tmp_path
    paths.temporary_folder.cache_clear()


def test_without_a_home_it_is_a_private_folder_below_the_temporary_one(homeless: Path) -> None:
    folder = paths.cache_folder()
    assert folder.parent == homeless and paths.cache_folder() == folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    paths.write_json_cache("a.json", {"b": 1})
    assert paths.read_json_cache("a.json") == {"b": 1}


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="this system has no user numbers")
@pytest.mark.parametrize("state", ["open to others", "a link", "a file", "somebody else's"])
def test_a_folder_that_others_can_write_to_is_not_used(
    homeless: Path, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = homeless / f"granite4v-{os.getuid()}"
    if state == "a link":
        (homeless / "elsewhere").mkdir(mode=0o700)
        known.symlink_to(homeless / "elsewhere")
    elif state == "a file":
        known.write_text("")
    else:
        known.mkdir()
        known.chmod(0o777 if state == "open to others" else 0o700)
    if state == "somebody else's":
        user = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: user)
        known.rename(homeless / f"granite4v-{user + 1}")
        monkeypatch.setattr(os, "getuid", lambda: user + 1)
        known = homeless / f"granite4v-{user + 1}"
    folder = paths.cache_folder()
    assert folder != known and folder.parent == homeless and paths.is_private(folder) == (state != "somebody else's")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\0", b"[1]", b"{", b'{"a": ' + b"[" * 100_000, b"null"])
def test_damaged_files_count_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setenv("GRANITE4V_CACHE", str(tmp_path))
    (tmp_path / "a.json").write_bytes(content)
    assert paths.read_json_cache("a.json") == {}
    paths.write_json_cache("a.json", {"b": 1})
    assert paths.read_json_cache("a.json") == {"b": 1} and [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("place", ["a file", "below a file", "a NUL", "a folder in its place", "a FIFO in its place"])
def test_a_cache_that_cannot_be_used_costs_time_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "file").write_text("")
    folder = {"a file": "file", "below a file": "file/x", "a NUL": "a\0b"}.get(place, "good")
    monkeypatch.setattr(paths, "cache_folder", lambda: tmp_path / folder)
    if folder == "good":
        (tmp_path / folder).mkdir()
        target = tmp_path / folder / "a.json"
        target.mkdir() if "folder" in place else os.mkfifo(target)
    assert paths.read_json_cache("a.json") == {}
    paths.write_json_cache("a.json", {"b": 1})
    assert paths.read_json_cache("a.json") == ({"b": 1} if "FIFO" in place else {})
    if folder == "good":
        assert [path.name for path in (tmp_path / folder).iterdir()] == ["a.json"]
