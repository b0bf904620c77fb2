"""Tests of watching a folder: new files are returned when they are complete, and again when they change."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from granite4v.errors import DocumentError
from granite4v.runtime.extract.watching import arrivals


def picture(path: Path, shade: int = 5) -> None:
    Image.new("RGB", (20, 30), (shade,) * 3).save(path)


def names(paths: list[str]) -> list[str]:
    return sorted(Path(path).name for path in paths)


def test_what_is_there_comes_and_then_what_is_new_or_changed(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "sub/b.png"):
        picture(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no document")
    (tmp_path / ".hidden.png").write_bytes((tmp_path / "a.png").read_bytes())
    found = arrivals(tmp_path, settled_s=0.05, poll_s=0.01)
    assert names(next(found)) == ["a.png", "b.png"]
    picture(tmp_path / "c.png")
    assert names(next(found)) == ["c.png"]
    picture(tmp_path / "a.png", 200)
    (tmp_path / "sub" / "b.png").unlink()
    assert names(next(found)) == ["a.png"]


def test_a_file_that_is_being_written_waits(tmp_path: Path) -> None:
    picture(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "in").mkdir()
    done = threading.Event()

    def write_slowly() -> None:
        with (tmp_path / "in" / "slow.png").open("wb", buffering=0) as file:
            for at in range(0, len(content), 8):
                file.write(content[at : at + 8])
                time.sleep(0.02)
        done.set()

    (tmp_path / "in" / "empty.png").write_bytes(b"")
    writer = threading.Thread(target=write_slowly)
    writer.start()
    (path,) = next(arrivals(tmp_path / "in", settled_s=1.0, poll_s=0.01))
    assert done.is_set() and Path(path).read_bytes() == content
    writer.join()


def test_a_folder_may_be_empty_and_must_be_there(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    with pytest.raises(DocumentError, match="there is no directory '.*in' to watch"):
        next(arrivals(folder))
    folder.mkdir()
    threading.Timer(0.1, picture, [folder / "a.png"]).start()
    found = arrivals(folder, settled_s=0.05, poll_s=0.01)
    assert names(next(found)) == ["a.png"]


def test_a_folder_that_vanishes_for_a_while_is_waited_for(tmp_path: Path) -> None:
    folder, away, said = tmp_path / "in", tmp_path / "away", list[str]()
    folder.mkdir()
    picture(folder / "a.png")
    found = arrivals(folder, settled_s=0.05, poll_s=0.01, say=said.append)
    assert names(next(found)) == ["a.png"]
    folder.rename(away)

    def bring_back() -> None:
        picture(away / "b.png")
        away.rename(folder)

    threading.Timer(0.3, bring_back).start()
    assert names(next(found)) == ["b.png"]  # not a.png again
    assert said == [f"'{folder}' is gone; waiting for it", f"'{folder}' is there again"]
