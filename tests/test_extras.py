"""Extras: the message when one is missing, and that it needs no other extra."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import granite4v
from granite4v.default_model import on_ray
from granite4v.errors import Granite4vError
from granite4v.extras import check_installed
from granite4v.runtime.documents.urls import find_remote
from granite4v.runtime.extract import ExtractOptions
from granite4v.runtime.extract.arguments import checked
from granite4v.runtime.extract.record import Record, encode
from granite4v.runtime.formats import Cell, Table
from tests.helpers.source_tree import ROOT


def extract_as(name: str) -> Callable[[Path], Any]:
    return lambda folder: checked("a.png", ExtractOptions(tasks="tables_html", formats=name, out=folder / "new"))


USES: list[tuple[str, str, Callable[[Path], Any]]] = [
    ("pandas", "pandas", granite4v.read_results),
    ("pandas", "pandas", lambda folder: Table(1, 1, 0, (Cell(0, 0, ""),)).to_pandas()),
    ("arrow", "pyarrow", lambda folder: granite4v.read_results(folder, arrow=True)),
    ("parquet", "pyarrow", extract_as("parquet")),
    ("xlsx", "openpyxl", extract_as("xlsx")),
    ("docling", "docling-core", extract_as("docling")),
    ("parquet", "pyarrow", lambda folder: granite4v.export_results(folder, "parquet")),
    ("xlsx", "openpyxl", lambda folder: granite4v.export_results(folder, "xlsx")),
    ("fsspec", "fsspec", lambda folder: find_remote(f"file://{folder}/results.jsonl", ())),
    ("ray", "ray", lambda folder: on_ray("nano", folder, "local")),
    ("docling", "docling-core", lambda folder: granite4v.export_results(folder, "docling")),
]


@pytest.mark.parametrize(("extra", "package", "use"), USES)
def test_what_to_install_is_said(
    extra: str, package: str, use: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "results.jsonl").write_bytes(encode(Record("a.png", 1, 1, "tables_html", value=[], valid=True)))
    use(tmp_path)
    before = sorted(tmp_path.iterdir())
    find, module = importlib.util.find_spec, package.replace("-", "_")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find(name))
    expected = f"needs {package}; install it with pip install 'granite4v[{extra}]'."
    with pytest.raises(Granite4vError, match=re.escape(expected)):
        use(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_extras_that_are_named_are_there() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra, package, _ in USES:
        brings = {"docling-core": "docling-slim"}.get(package, package)
        assert re.search(rf'^{extra} = \["{brings}[>"[]', text, re.MULTILINE), extra


def test_a_package_that_is_there_is_none() -> None:
    check_installed("this test", "pytest", "dev")
