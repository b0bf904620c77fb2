"""Tests of a second run on the same directory, with a fake model: what it keeps, reads again and replaces."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from granite4v.errors import OutputError
from tests.helpers.fake_model import FakeModel, run
from tests.helpers.runs import TASKS, image, kept, keys, shades


def test_a_repaired_file_is_read_and_its_failure_leaves_everywhere(
    model: FakeModel, scans: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    list(run(model, scans, TASKS, out=out, report=True))
    assert ("b.pdf", None, "kvp") in keys(out) and "b.pdf" in (out / "report.html").read_text().partition("<main>")[0]
    image(scans / "b.pdf", 40, 50)
    with run(model, scans, TASKS, out=out, resume=True) as again:  # renews the existing report
        new = list(again)
        state = again.state
    assert [(Path(r.source).name, r.page, r.task) for r in new] == [
        ("b.pdf", page, task) for page in (1, 2) for task in TASKS
    ]
    pages = [("a.pdf", 1), ("a.pdf", 2), ("a.pdf", 3), ("b.pdf", 1), ("b.pdf", 2), ("c.png", 1), ("d.bmp", 1)]
    assert keys(out) == [(*page, task) for page in pages for task in TASKS]  # where the failure was
    assert (state.counts.n_records, state.counts.n_failed, state.incomplete) == (14, 0, False)
    assert state.n_replaced == 2
    assert "without a valid answer" not in (out / "report.html").read_text()
    assert json.loads((out / "b.kvp.json").read_text())[1] == {"page": 2, "fields": {"shade": 50}}


@pytest.mark.parametrize(
    ("before", "now"),
    [((10, 20, 30), (10, 60)), ((10,), (70, 20, 30)), ((10,), (10, 60)), ((10, 20), None), ((), (5,))],
)
def test_a_changed_file_gives_what_it_would_have_given_at_first(
    model: FakeModel, tmp_path: Path, before: tuple[int, ...], now: tuple[int, ...] | None
) -> None:
    """Compares all files of the directory, except the times in the report."""

    def write(shades: tuple[int, ...] | None) -> None:
        if shades:
            image(scans / "a.pdf", *shades)
        else:
            (scans / "a.pdf").write_bytes(b"%PDF-1.7 broken" + b" " * (shades is None))

    scans, out, fresh = tmp_path / "scans", tmp_path / "out", tmp_path / "fresh"
    scans.mkdir()
    image(scans / "z.png", 99)
    options: dict[str, Any] = {"formats": ["csv", "md", "docling"], "tasks": ("tables_html", "kvp", "chart2csv")}
    write(before)
    list(run(model, scans, out=out, **options))
    write(now)
    list(run(model, scans, out=out, resume=True, **options))
    list(run(model, scans, out=fresh, **options))
    assert _content(out) == _content(fresh)
    asked = len(model.asked)
    assert list(run(model, scans, out=out, resume=True, **options)) == [] and len(model.asked) == asked


def _content(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    found["results.jsonl"] = [{**record.as_dict(), "timings": {}} for record in kept(out)]
    return found


def test_an_unchanged_file_is_neither_rendered_nor_asked_about(
    model: FakeModel, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(run(model, scans, out=tmp_path / "out"))
    model.asked.clear()
    wanted: list[tuple[str, bool]] = []
    from granite4v.runtime.extract.earlier import Earlier

    ask = Earlier.wanted
    monkeypatch.setattr(
        Earlier,
        "wanted",
        lambda self, source, *rest: wanted.append((Path(source).name, found := ask(self, source, *rest))) or found,
    )
    assert list(run(model, scans, out=tmp_path / "out", resume=True)) == []
    assert wanted == [("a.pdf", False)] * 3 + [("c.png", False), ("d.bmp", False)] and model.asked == []


def test_a_file_that_was_touched_alone_is_not_asked_about_again(model: FakeModel, scans: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    list(run(model, scans, out=out))
    before, n_asked = kept(out), len(model.asked)
    os.utime(scans / "a.pdf", ns=(5, 5))
    assert list(run(model, scans, out=out, resume=True)) == [] and len(model.asked) == n_asked
    after = kept(out)
    assert [record.file_state for record in after[:6]] == [f"{(scans / 'a.pdf').stat().st_size}:5"] * 6
    assert [{**r.as_dict(), "file_state": ""} for r in after] == [{**r.as_dict(), "file_state": ""} for r in before]


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4])
def test_replacing_loses_nothing_wherever_it_ends(model: FakeModel, scans: Path, tmp_path: Path, n: int) -> None:
    out = tmp_path / "out"
    list(run(model, scans, out=out))
    image(scans / "a.pdf", 40, 50)
    with run(model, scans, out=out, resume=True) as second:
        for _ in range(n):
            next(second)
    assert len(keys(out)) == len(set(keys(out))) == 12  # pages not yet read keep their old records
    list(run(model, scans, out=out, resume=True))
    assert shades(out, "a.pdf") == [40, 50] and len(kept(out)) == 10


def test_superseded_lines_of_a_killed_run_are_understood(model: FakeModel, scans: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    list(run(model, scans, out=out))
    old = (out / "results.jsonl").read_bytes()
    image(scans / "a.pdf", 40, 50)
    list(run(model, scans, out=out, resume=True))
    new = [line for line in (out / "results.jsonl").read_bytes().splitlines(True) if b"a.pdf" in line]
    whole = (out / "results.jsonl").read_bytes()
    (out / "results.jsonl").write_bytes(old + b"".join(new[:2]))  # as after a kill behind page 1
    list(run(model, scans, out=out, resume=True))
    assert shades(out, "a.pdf") == [40, 50] and keys(out) == [
        (Path(json.loads(line)["source"]).name, json.loads(line)["page"], json.loads(line)["task"])
        for line in whole.splitlines()
    ]


def test_other_inputs_pages_tasks_and_order_are_no_other_run(model: FakeModel, scans: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    list(run(model, [scans / "c.png"], ("tables_html",), out=out))
    for inputs in ([f"{scans}/"], [scans / "d.bmp", scans / "c.png"], [scans]):
        list(run(model, inputs, ("tables_html",), out=out, resume=True, pages="1"))
    with run(model, scans, ("chart2csv", "kvp"), out=out, resume=True) as records:
        list(records)
    assert set(keys(out)) == {
        *((name, 1, task) for name in ("a.pdf", "c.png", "d.bmp") for task in ("tables_html", "chart2csv", "kvp")),
        *(("a.pdf", page, task) for page in (2, 3) for task in ("chart2csv", "kvp")),
        *(("b.pdf", None, task) for task in ("tables_html", "chart2csv", "kvp")),
    }
    assert len(keys(out)) == len(set(keys(out)))
    by_page = [key[:2] for key in keys(out)]
    assert sum(one != two for one, two in itertools.pairwise(by_page)) + 1 == len(set(by_page))  # no page is split
    told = json.loads((out / "run.json").read_text())
    assert told["tasks"] == ["tables_html", "chart2csv", "kvp"] and set(told["prompts"]) == set(told["tasks"])
    with pytest.raises(OutputError, match="the schema differs"):
        run(model, scans, ("kvp",), schema={"type": "object"}, out=out, resume=True)


def test_what_is_left_out_keeps_its_records_and_does_not_count_as_failed(
    model: FakeModel, scans: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with run(model, scans, out=out) as records:
        list(records)
        assert records.state.incomplete
    (scans / "b.pdf").unlink()
    with run(model, scans, out=out, resume=True) as records:
        assert list(records) == []
        state = records.state
    assert len(kept(out)) == 12 and state.counts.n_failed == 2 and not state.incomplete
    assert state.left_out.n_records == state.left_out.n_failed == 2


def test_a_file_that_is_gone_is_a_failure_beside_what_was_read(model: FakeModel, scans: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    list(run(model, scans / "c.png", out=out))
    content = (scans / "c.png").read_bytes()
    state = (scans / "c.png").stat()
    (scans / "c.png").unlink()
    list(run(model, [scans / "c.png", scans / "d.bmp"], out=out, resume=True))
    assert [(page, task) for name, page, task in keys(out) if name == "c.png"] == [
        (1, "tables_html"), (1, "kvp"), (None, "tables_html"), (None, "kvp")
    ]  # fmt: skip
    (scans / "c.png").write_bytes(content)
    os.utime(scans / "c.png", ns=(state.st_mtime_ns, state.st_mtime_ns))
    assert list(run(model, [scans / "c.png", scans / "d.bmp"], out=out, resume=True)) == []
    assert [page for name, page, _ in keys(out) if name == "c.png"] == [1, 1]


def test_weights_quantized_in_memory_are_another_model(model: FakeModel, scans: Path, tmp_path: Path) -> None:
    out, remarks = tmp_path / "out", []
    list(run(model, scans, out=out))
    assert "vision_compute" not in json.loads((out / "run.json").read_text())["settings"]
    model.settings["vision_compute"], model.vision_note = "Q6_K", "quantized to Q6_K"
    with pytest.raises(OutputError, match="holds the results of another run: the settings differ"):
        run(model, scans, out=out, resume=True)
    list(run(model, scans, out=tmp_path / "new", say=remarks.append))
    assert remarks == ["note: quantized to Q6_K"]
    assert json.loads((tmp_path / "new" / "run.json").read_text())["settings"]["vision_compute"] == "Q6_K"
    assert list(run(model, scans, out=tmp_path / "new", resume=True)) == []


def test_other_conditions_are_remarked(model: FakeModel, scans: Path, tmp_path: Path) -> None:
    remarks: list[str] = []
    list(run(model, scans, out=tmp_path / "out", say=remarks.append))
    assert remarks == []
    model.settings["n_threads"] = 8
    list(run(model, scans, out=tmp_path / "out", resume=True, say=remarks.append))
    assert remarks[0].startswith("resumed in a different environment (n_threads was 2, is 8);")
    list(run(model, scans, out=tmp_path / "out", resume=True, say=remarks.append))
    assert len(remarks) == 1
    conditions = json.loads((tmp_path / "out" / "run.json").read_text())["environments"]
    assert [one["n_threads"] for one in conditions] == [2, 8] and conditions[0]["llama_cpp_python"]


def test_names_stay_with_their_documents(model: FakeModel, tmp_path: Path) -> None:
    scans, out = tmp_path / "scans", tmp_path / "out"
    for name, shade in (("a/inv.png", 10), ("b/inv.png", 20), ("b/inv.bmp", 30)):
        (scans / name).parent.mkdir(parents=True, exist_ok=True)
        image(scans / name, shade)
    list(run(model, scans, ("tables_html",), out=out, formats=["csv"]))
    (scans / "0").mkdir()
    image(scans / "0" / "inv.png", 40)
    image(scans / "b" / "inv.gif", 50)
    list(run(model, scans, ("tables_html",), out=out, formats=["html"], resume=True))
    stems = {Path(record.source).relative_to(scans).as_posix(): record.stem for record in kept(out)}
    assert stems == {
        "a/inv.png": "a/inv", "b/inv.bmp": "b/inv", "b/inv.png": "b/inv-2", "0/inv.png": "0/inv", "b/inv.gif": "b/inv-3"
    }  # fmt: skip
    for record in kept(out):
        shade = record.tables[0].texts()[1][0]
        assert shade in (out / f"{record.stem}.tables_html.html").read_text()
        if "inv.gif" not in record.source and record.stem != "0/inv":
            assert shade in (out / f"{record.stem}.tables_html.csv").read_text()


# --- the same file by another path ---


def test_a_file_given_by_another_path_is_the_same_document(
    model: FakeModel, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out, relative = tmp_path / "out", scans.relative_to(tmp_path)
    list(run(model, [relative / "a.pdf", relative / "c.png"], TASKS, out=out))
    before, n_asked = (out / "results.jsonl").read_bytes(), len(model.asked)
    (tmp_path / "link").symlink_to(scans)
    for again in (scans, tmp_path / "link"):
        with run(model, [again / "a.pdf", again / "c.png"], TASKS, out=out, resume=True) as resumed:
            assert list(resumed) == []
            assert (resumed.state.counts.n_records, resumed.state.left_out.n_records) == (8, 0)
    assert (out / "results.jsonl").read_bytes() == before and len(model.asked) == n_asked
    with run(model, [scans / "c.png"], ["chart2csv"], out=out, resume=True) as added:
        assert [record.source for record in added] == [str(relative / "c.png")]


def test_a_path_that_means_another_file_from_here_is_another_document(
    model: FakeModel, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """'c.png' of the earlier run was in another directory than this run's current one."""
    monkeypatch.chdir(scans)
    out = tmp_path / "out"
    list(run(model, ["c.png"], ["tables_html"], out=out))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    Image.new("RGB", (20, 30), (77,) * 3).save(elsewhere / "c.png")
    monkeypatch.chdir(elsewhere)
    with run(model, [elsewhere / "c.png"], ["tables_html"], out=out, resume=True) as resumed:
        assert [record.source for record in resumed] == [str(elsewhere / "c.png")]
        assert resumed.state.counts.n_records == 2


def test_confidences_that_an_earlier_run_did_not_keep_are_remarked(
    model: FakeModel, scans: Path, tmp_path: Path
) -> None:
    remarks: list[str] = []
    list(run(model, scans, out=tmp_path / "out", say=remarks.append))
    for _ in range(2):
        list(run(model, scans, out=tmp_path / "out", resume=True, confidence=True, say=remarks.append))
    assert remarks == ["the records of the earlier run have no confidences; only new ones get them."]
