"""Tests of an output directory that others change during a run: removed, occupied, full of links."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from granite4v.errors import OutputError
from granite4v.paths import atomic_text_file, partial_path
from tests.helpers.fake_model import FakeModel, run
from tests.helpers.runs import image


def test_a_directory_that_is_removed_meanwhile_is_a_message(model: FakeModel, scans: Path, tmp_path: Path) -> None:
    records = run(model, scans, out=tmp_path / "out")
    next(records)
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(OutputError, match=r"results.jsonl' was removed or replaced while the run was writing to it"):
        list(records)
    assert not (tmp_path / "out").exists()


def test_a_file_that_cannot_be_written_ends_nothing(model: FakeModel, scans: Path, tmp_path: Path) -> None:
    out, remarks = tmp_path / "out", []
    records = run(model, scans, out=out, report=True, formats=["csv", "docling"], say=remarks.append)
    next(records)
    for name in ("a.kvp.json", "c.tables_html.csv", "d.docling.json"):
        (out / name).mkdir()
    assert len(list(records)) == 11 and records.state.n_unwritten == 3 and records.state.incomplete
    assert len(remarks) == 3 and all("is not written: cannot write" in remark for remark in remarks)
    assert (out / "a.tables_html.page1.csv").exists() and (out / "report.html").exists()


@pytest.mark.parametrize("name", ["results.jsonl", "run.json", ".granite4v.lock", "report.html", ".granite4v-pages"])
def test_nothing_outside_the_directory_is_written(model: FakeModel, scans: Path, tmp_path: Path, name: str) -> None:
    out, foreign = tmp_path / "out", tmp_path / "foreign"
    list(run(model, scans, out=out, report=True))
    (out / name).rename(foreign) if (out / name).exists() else foreign.write_bytes(b"")
    content = foreign.read_bytes() if foreign.is_file() else sorted(foreign.iterdir())
    (out / name).symlink_to(foreign)
    image(scans / "c.png", 77)
    remarks: list[str] = []
    if name == ".granite4v-pages":
        with run(model, scans, out=out, resume=True, report=True, say=remarks.append) as records:
            list(records)
        assert "is a symbolic link" in remarks[0]
    else:
        with pytest.raises(OutputError, match=f"{name}' is a symbolic link"):
            run(model, scans, out=out, resume=True, report=True)
    assert (foreign.read_bytes() if foreign.is_file() else sorted(foreign.iterdir())) == content


def test_links_in_place_of_results_are_not_followed(model: FakeModel, scans: Path, tmp_path: Path) -> None:
    out, foreign = tmp_path / "out", tmp_path / "foreign"
    list(run(model, scans / "c.png", ("kvp",), out=out))
    foreign.write_text("mine")
    (out / "c.kvp.json").unlink()
    (out / "c.kvp.json").symlink_to(foreign)
    partial_path(out / "c.kvp.json").symlink_to(foreign)
    list(run(model, scans / "c.png", ("kvp",), out=out, resume=True))
    partial_path(out / "x").symlink_to(foreign)
    with atomic_text_file(out / "x") as file:
        file.write("x")
    assert foreign.read_text() == "mine" and not (out / "c.kvp.json").is_symlink()
    (tmp_path / "deep").mkdir()
    (scans / "sub").mkdir()
    image(scans / "sub" / "e.png", 5)
    (out / "sub").symlink_to(tmp_path / "deep")
    remarks: list[str] = []
    list(run(model, scans, ("kvp",), out=out, resume=True, say=remarks.append))
    assert list((tmp_path / "deep").iterdir()) == [] and "sub' is a symbolic link or a file" in remarks[0]


def test_someone_elses_report_is_not_replaced(model: FakeModel, scans: Path, tmp_path: Path) -> None:
    list(run(model, scans, out=tmp_path / "out"))
    (tmp_path / "out" / "report.html").write_text("<title>My report</title>")
    with pytest.raises(OutputError, match=r"report.html' is not a report that 'granite4v extract' made"):
        run(model, scans, out=tmp_path / "out", resume=True)
    assert (tmp_path / "out" / "report.html").read_text() == "<title>My report</title>"
