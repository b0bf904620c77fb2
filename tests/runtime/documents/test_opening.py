"""Tests of what `open_pages` yields in addition to pixels: file states, skipped pages, and failures."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import psutil
import pytest

from granite4v.errors import DocumentError
from granite4v.runtime.documents import (
    Page,
    PageFailure,
    PageSkipped,
    open_pages,
)
from granite4v.runtime.documents.content import readable
from tests.helpers.page_tests import GOOD, SMALL_VIEW, TIFF_PAGES, tiff
from tests.helpers.pdfs import scan_pdf, text_pdf, write
from tests.helpers.pictures import encoded, noise_picture, png_of


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
        (MemoryError(), "page 2 of 'a.pdf' needs more memory than is available; scale it down, or split it."),
        (zlib.error("bad data"), "page 2 of 'a.pdf' cannot be read (error: bad data); it is probably damaged. Open it"),
        (RecursionError(), "page 2 of 'a.pdf' cannot be read (RecursionError); it is probably damaged."),
        (DocumentError("as it is"), "as it is"),
    ],
)
def test_every_error_becomes_one_that_a_person_can_use(error: Exception, message: str) -> None:
    assert message in str(readable(error, "page 2 of 'a.pdf'"))


def test_an_image_with_a_wrong_checksum_does_not_end_the_batch(tmp_path: Path) -> None:
    """Pillow has all rows before it reaches zlib's checksum, which follows them; our own check reads on to it."""
    rows = zlib.compress(bytes(9 * 8 + 100))
    (tmp_path / "a.png").write_bytes(png_of(8, 8, idat=rows[:-1] + bytes([rows[-1] ^ 1])))
    (tmp_path / "b.png").write_bytes(encoded(noise_picture((8, 8))))
    found: list[Any] = list(open_pages([tmp_path]))
    assert [Path(item.source).name for item in found] == ["a.png", "b.png"]
    assert isinstance(found[1], Page)


def test_documents_are_opened_one_at_a_time_and_closed(tmp_path: Path) -> None:
    write(tmp_path / "a.pdf", text_pdf("1", "2"))
    write(tmp_path / "b.pdf", text_pdf("3"))
    (tmp_path / "c.tif").write_bytes(tiff(*TIFF_PAGES))
    others = set(psutil.Process().children())  # e.g. the child process that tries grammars, which stays

    def opened() -> list[str]:
        me = psutil.Process()
        files = [file.path for process in (me, *me.children()) for file in process.open_files()]
        return [Path(path).name for path in files if path.startswith(str(tmp_path))]

    pages = open_pages([tmp_path], view=SMALL_VIEW)
    assert opened() == []
    seen = []
    for page in pages:  # the reader may already open the next document meanwhile
        seen.append(page.source[-5:])
        assert len(set(opened())) <= 1
    assert seen == ["a.pdf"] * 2 + ["b.pdf"] + ["c.tif"] * 4
    assert opened() == []
    pages = open_pages([tmp_path], view=SMALL_VIEW)
    next(pages)
    pages.close()
    assert opened() == []
    assert set(psutil.Process().children()) <= others  # no reader of these pages is left


def test_a_document_that_vanishes_on_the_way_is_a_failure(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png", "d.png"):
        (tmp_path / name).write_bytes(GOOD.read_bytes())
    write(tmp_path / "e.pdf", text_pdf(*map(str, range(12))))
    pages = open_pages([tmp_path], view=SMALL_VIEW)
    next(pages)
    (tmp_path / "c.png").unlink()  # b.png is being read
    gone = list(itertools.islice(pages, 2))[1]
    assert isinstance(gone, PageFailure)
    assert "c.png' cannot be read: No such file or directory." in str(gone.error)
    assert [Path(next(pages).source).name for _ in range(2)] == ["d.png", "e.pdf"]
    (tmp_path / "e.pdf").unlink()
    gone = list(pages)[-1]
    assert isinstance(gone, PageFailure)
    assert "e.pdf' cannot be read; is it still there?" in str(gone.error)


def test_importing_loads_pillow_and_no_other_library() -> None:
    code = "import sys, granite4v.runtime.documents; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"pypdfium2", "numpy", "llama_cpp"} & set(loaded)


MEMORY = """
import sys, psutil
from tests.helpers.page_tests import SMALL_VIEW
from granite4v.runtime.documents import Page, open_pages

seen = []
for page in open_pages(sys.argv[1:], view=SMALL_VIEW):
    assert isinstance(page, Page)
    me = psutil.Process()
    seen.append(sum(process.memory_info().rss for process in (me, *me.children())) >> 20)
print(max(seen[:20]), max(seen[20:]), len(seen))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["scans", "text", "tiff"])
def test_memory_stays_flat_over_hundreds_of_pages(kind: str, tmp_path: Path) -> None:
    """PDFium keeps what it has read of a document until the document is closed; 200 scans of 1.2 MB would show that."""
    if kind == "scans":
        pdf = scan_pdf(*(noise_picture((700, 600), seed) for seed in range(200)))
        path = write(tmp_path / "a.pdf", pdf, compress_streams=False)
        assert path.stat().st_size > 200 << 20
    elif kind == "text":
        path = write(tmp_path / "a.pdf", text_pdf(*(f"page {i}" for i in range(200))))
    else:
        path = tmp_path / "a.tif"
        path.write_bytes(tiff(*(noise_picture((400, 300), seed) for seed in range(200))))
    here = str(Path(__file__).parents[3])
    environment = {**os.environ, "PYTHONPATH": here}
    command = [sys.executable, "-c", MEMORY, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    early, late, n_pages = map(int, done.stdout.split())
    assert n_pages == 200
    assert late <= early + 30, f"{early} MB in the first 20 pages, then up to {late} MB"
