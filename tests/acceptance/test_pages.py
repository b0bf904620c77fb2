"""A folder of pages has the documents that its `Batch` lists."""

from __future__ import annotations

from pathlib import Path

from granite4v.runtime.documents import Page, PageFailure, open_pages
from tests.acceptance.pages import make_batch


def test_a_batch_has_the_pages_it_says(tmp_path: Path) -> None:
    batch = make_batch(tmp_path / "batch", 24, seed=3, faults=True)
    found = list(open_pages([batch.folder]))
    assert [(item.source, item.number) for item in found] == list(batch.pages)
    pages = [item for item in found if isinstance(item, Page)]
    assert len(pages) == 24 and len({page.digest for page in pages}) == 23
    assert isinstance(found[-1], PageFailure)
    assert {Path(source).suffix for source, _ in batch.pages} == {".pdf", ".png", ".tiff", ".jpg", ".bmp"}


def test_pages_of_a_width_are_all_of_one_size(tmp_path: Path) -> None:
    batch = make_batch(tmp_path / "batch", 12, width_px=170)
    sizes = {item.size_px for item in open_pages([batch.folder]) if isinstance(item, Page)}
    assert sizes == {(170, 220)}
