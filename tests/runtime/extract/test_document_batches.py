"""Tests of batches of documents in the columns of a pipeline: by path, by content, and through Ray Data."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import granite4v
from granite4v.runtime.extract import ArgumentError
from tests.helpers.pictures import text_picture
from tests.toy.spec import PRESETS

TASKS = ("tables_html", "chart2csv")
SETTINGS: dict[str, Any] = {"n_threads": 1, "parallel": 2, "max_tokens": 12, "device": "cpu", "n_ctx": 800}


@pytest.fixture(scope="module")
def folder(make_model: Callable[..., Path]) -> Path:
    return make_model(PRESETS["tiny"], text_type="F16")


@pytest.fixture(scope="module")
def read(folder: Path) -> Iterator[granite4v.DocumentReader]:
    reader = granite4v.DocumentReader(TASKS, model=folder, **SETTINGS)
    yield reader
    reader.close()


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A PDF of two pages, an image, and an image that does not exist."""
    scans = tmp_path_factory.mktemp("scans")
    pages = [text_picture((60, 90), seed) for seed in range(3)]
    pages[0].save(scans / "a.pdf", save_all=True, append_images=pages[1:2], resolution=72)
    pages[2].save(scans / "b.png")
    return [str(scans / name) for name in ("a.pdf", "b.png", "none.png")]


def rows(table: Any) -> list[Any]:
    return [(row["source"], row["page"], row["task"], row["text"], bool(row["error"])) for row in table.to_pylist()]


def expected(folder: Path, scans: list[str]) -> list[Any]:
    with granite4v.extract(scans, TASKS, model=folder, **SETTINGS) as records:
        return [(one.source, one.page, one.task, one.text, bool(one.error)) for one in records]


def test_paths_give_the_records_of_extract(read: Any, folder: Path, scans: list[str]) -> None:
    table = read({"path": scans, "other": [1, 2, 3]})
    assert rows(table) == expected(folder, scans)
    assert [json.loads(row["size_px"] or "null") for row in table.to_pylist()][-3:] == [[60, 90], None, None]


def test_contents_are_called_what_their_row_says(read: Any, folder: Path, scans: list[str]) -> None:
    contents = [*(Path(path).read_bytes() for path in scans[:2]), b"%PDF-1.7 nothing more"]
    found = rows(read({"bytes": contents, "path": ["x.pdf", "y.png", "z.pdf"]}))
    names = {scans[0]: "x.pdf", scans[1]: "y.png", scans[2]: "z.pdf"}
    assert found == [(names[source], *rest) for source, *rest in expected(folder, scans)]
    last = read({"bytes": contents}).to_pylist()[-1]
    assert last["source"] == "row 3" and "'row 3'" in last["error"]


def test_a_batch_of_nothing_that_is_there_is_no_error(read: Any) -> None:
    found = rows(read({"path": ["/nowhere/a.png", "/nowhere/b.png"]}))
    assert found == [(f"/nowhere/{name}.png", None, task, "", True) for name in "ab" for task in TASKS]
    assert read({"path": []}).num_rows == 0


def test_what_makes_no_sense_is_refused(read: Any, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="a batch has the columns image; expected 'path' or 'bytes'"):
        read({"image": [1]})
    with pytest.raises(ArgumentError, match="leave 'out' away"):
        granite4v.DocumentReader(TASKS, model=folder, out=tmp_path / "out")
