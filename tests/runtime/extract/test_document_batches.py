"""Tests of batches of documents in the columns of a pipeline: by path, by content, and through Ray Data."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas
import pyarrow
import pytest

import granite4v
from granite4v.runtime.extract import ArgumentError, document_batches
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
    table = read({"path": scans})
    assert rows(table) == expected(folder, scans)
    assert table.column_names == [field.name for field in fields(granite4v.Record)]
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


def arrays(columns: dict[str, list[Any]]) -> Any:
    """Returns a dict of NumPy arrays, the default batch format of Ray."""
    return {name: np.array(values, dtype=None if name == "id" else object) for name, values in columns.items()}


FORMS: list[Callable[[dict[str, list[Any]]], Any]] = [
    dict,
    arrays,
    pandas.DataFrame,
    pyarrow.table,
    lambda columns: pyarrow.record_batch(columns),
]


@pytest.mark.parametrize("form", FORMS)
def test_batches_of_every_form_repeat_their_other_columns(read: Any, form: Any, folder: Path, scans: list[str]) -> None:
    """They match records with rows even if names are duplicate or missing."""
    contents = [None, *(Path(path).read_bytes() for path in scans[:2]), None]
    ids, labels = [7, 8, 9, 10], [["x"], None, ["y", "z"], []]
    table = read(form({"bytes": contents, "path": ["same", "same", None, None], "id": ids, "labels": labels}))
    by_id = {number: [row for row in table.to_pylist() if row["id"] == number] for number in ids}
    for number, source, label in zip(ids, ["same", "same", "row 3", "row 4"], labels, strict=True):
        assert {row["source"] for row in by_id[number]} == {source}
        assert all(row["labels"] == label for row in by_id[number])
    for number, path in ((8, scans[0]), (9, scans[1])):
        texts = [(row["page"], row["task"], row["text"]) for row in by_id[number]]
        assert texts == [row[1:4] for row in expected(folder, scans[:2]) if row[0] == path]
    for number, name in ((7, "same"), (10, "row 4")):
        assert [(row["task"], row["page"], row["error_type"]) for row in by_id[number]] == [
            (task, None, "DocumentError") for task in TASKS
        ]
        message = f"'{name}' has nothing in the column 'bytes'; expected the content of a file."
        assert {row["error"] for row in by_id[number]} == {message}
    assert table.schema.field("id").type == "int64"


@pytest.mark.parametrize("form", FORMS)
def test_paths_that_are_none_cost_no_other_row(read: Any, form: Any, folder: Path, scans: list[str]) -> None:
    given = ["-", scans[1], None, "", scans[1], str(Path(scans[1]).parent)]
    table = read(form({"path": given, "id": list(range(6))}))
    found = [(row["id"], row["source"], row["page"], row["text"], row["error"]) for row in table.to_pylist()]
    (first, second) = (row[3] for row in expected(folder, scans[1:2]))
    read_all = [(row[0], row[1], row[3]) for row in expected(folder, scans[:2])]
    assert [row[:4] for row in found if row[0] in (1, 4)] == [
        (number, scans[1], 1, text) for number in (1, 4) for text in (first, second)
    ]
    assert [row[1:4] for row in found if row[0] == 5] == read_all
    errors = {
        0: ("-", "row 1 of the batch has the 'path' '-', standard input, which is not a pipeline's to read; "),
        2: ("row 3", "row 3 of the batch has no 'path'; expected a path or a URL."),
        3: ("row 4", "row 4 of the batch has no 'path'; expected a path or a URL."),
    }
    for number, (source, message) in errors.items():
        lost = [row for row in found if row[0] == number]
        assert [row[1:4] for row in lost] == [(source, None, "")] * len(TASKS)
        assert all(row[4].startswith(message) for row in lost)


def test_rows_of_one_document_by_several_names_and_by_url(read: Any, folder: Path, scans: list[str]) -> None:
    fsspec.filesystem("memory").pipe("/scans/b.png", Path(scans[1]).read_bytes())
    other = os.path.relpath(scans[1])
    found = read({"path": [scans[1], "memory://scans/b.png", other], "id": [1, 2, 3]}).to_pylist()
    texts = [row[3] for row in expected(folder, scans[1:2])]
    assert [(row["id"], row["source"], row["text"]) for row in found] == [
        (number, source, text)
        for number, source in ((1, scans[1]), (2, "memory:///scans/b.png"), (3, scans[1]))
        for text in texts
    ]


@pytest.mark.parametrize("n_kept", [0, 1])
def test_files_that_go_while_a_batch_is_begun_are_errors(
    read: Any, scans: list[str], n_kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [Path(shutil.copy(scans[1], tmp_path / f"{number}.png")) for number in range(2)]
    begin = document_batches.begin

    def late(*given: Any, **options: Any) -> Any:
        for path in paths[n_kept:]:
            path.unlink()
        return begin(*given, **options)

    monkeypatch.setattr(document_batches, "begin", late)
    found = read({"path": list(map(str, paths)), "id": [1, 2]}).to_pylist()
    assert [(row["id"], row["error_type"]) for row in found] == [
        (number, None if number <= n_kept else "DocumentError") for number in (1, 2) for _ in TASKS
    ]


def test_missing_values_and_tensors(read: Any, scans: list[str]) -> None:
    """Missing values include pandas.NA; a value of another type is an error of its row."""
    found = read({"path": [3, np.float32("nan"), pandas.NA], "pixels": np.arange(12).reshape(3, 2, 2)}).to_pylist()
    assert [row["error"] for row in found[:: len(TASKS)]] == [
        "row 1 of the batch has the 'path' 3; expected a path or a URL, as text.",
        *(f"row {number} of the batch has no 'path'; expected a path or a URL." for number in (2, 3)),
    ]
    assert [row["pixels"] for row in found[:: len(TASKS)]] == np.arange(12).reshape(3, 2, 2).tolist()
    (row, _) = read({"bytes": [5], "path": ["x"]}).to_pylist()
    assert row["error"] == "'x' has a value of type int in the column 'bytes'; expected the content of a file."
    empty = read(pyarrow.table({"path": pyarrow.array([], "string"), "id": pyarrow.array([], "int8")}))
    assert empty.num_rows == 0 and empty.schema.field("id").type == "int8"


def test_what_makes_no_sense_is_refused(read: Any, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="a batch has the columns image; expected 'path' or 'bytes'"):
        read({"image": [1]})
    for batch, message in (
        ({"path": [], "text": []}, "the batch has a column 'text', as the records do; rename it, for instance to"),
        ({"path": "a.png"}, "the column 'path' is 'a.png'; expected a list or an array of values"),
        ({"path": [], "id": [1]}, "the columns of a batch have different lengths: {'path': 0, 'id': 1}"),
        ({"path": ["a.png"], "id": [object()]}, "the column 'id' cannot be repeated beside the records"),
        (["a.png"], "a batch is a list; expected a dict of columns, a pandas.DataFrame or a pyarrow.Table"),
        (pyarrow.table([[1], [1]], names=["path", "path"]), "two columns of a batch have the same name: path, path"),
    ):
        with pytest.raises(ArgumentError, match=re.escape(message)):
            read(batch)
    files: dict[str, Any] = {
        "out": tmp_path / "out",
        "formats": "csv",
        "resume": True,
        "report": True,
        "csv_safe": True,
    }
    for name, value in files.items():
        with pytest.raises(
            ArgumentError,
            match=f"'{name}' is about output files, but a pipeline writes its records itself; leave it out",
        ):
            granite4v.DocumentReader(TASKS, model=folder, **{name: value})
