"""What `open_pages` yields besides pixels: states of files, skipped pages, and a failure for whatever goes wrong."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

import pytest
from pdfs import text_pdf, write
from pictures import encoded, noise_picture, png_of

from granite4v.errors import DocumentError
from granite4v.runtime.pages import Page, PageFailure, PageSkipped, open_pages
from granite4v.runtime.pages.opening import readable


def test_pages_carry_the_state_of_their_file(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(noise_picture((8, 8))))
    os.utime(path, ns=(5, 1_234_567_890))
    bad = tmp_path / "b.png"
    bad.write_bytes(b"no image")
    page, failure, missing = open_pages([path, bad, tmp_path / "gone.png"])
    assert page.file_state == f"{path.stat().st_size}:1234567890"
    assert failure.file_state == f"8:{bad.stat().st_mtime_ns}"
    assert missing.file_state is None


def test_pages_that_are_not_wanted_are_not_rendered(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pdf", text_pdf("1", "2", "3"))
    asked: list[tuple[str, int, str | None]] = []

    def wanted(source: str, number: int, state: str | None) -> bool:
        asked.append((source, number, state))
        return number == 2

    found = list(open_pages([path], pages="1-4", wanted=wanted))
    state = f"{path.stat().st_size}:{path.stat().st_mtime_ns}"
    assert [type(item) for item in found] == [PageSkipped, Page, PageSkipped, PageFailure]
    assert found[0] == PageSkipped(str(path), 1, 3, state)
    assert asked == [(str(path), number, state) for number in (1, 2, 3)]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "page 2 of 'a.pdf' needs more memory than there is; scale it down, or split it."),
        (zlib.error("bad data"), "page 2 of 'a.pdf' cannot be read (error: bad data); it is probably damaged. Open it"),
        (RecursionError(), "page 2 of 'a.pdf' cannot be read (RecursionError); it is probably damaged."),
        (DocumentError("as it is"), "as it is"),
    ],
)
def test_every_error_becomes_one_that_a_person_can_use(error: Exception, message: str) -> None:
    assert message in str(readable(error, "page 2 of 'a.pdf'"))


def test_an_image_with_a_wrong_checksum_does_not_end_the_batch(tmp_path: Path) -> None:
    """Pillow has all rows before it meets the checksum that zlib keeps behind them; the check of the data goes on."""
    rows = zlib.compress(bytes(9 * 8 + 100))
    (tmp_path / "a.png").write_bytes(png_of(8, 8, idat=rows[:-1] + bytes([rows[-1] ^ 1])))
    (tmp_path / "b.png").write_bytes(encoded(noise_picture((8, 8))))
    found: list[Any] = list(open_pages([tmp_path]))
    assert [Path(item.source).name for item in found] == ["a.png", "b.png"]
    assert isinstance(found[1], Page)
