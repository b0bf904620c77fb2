"""Records of two trees are compared by value; running the trees is tested only by using the script."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from PIL import Image

from scripts.compare_records import IGNORED, RENAMED, compare, draw_files, first_difference, jobs, read_records
from scripts.nano.evaluate import held_out


def record(**changes: Any) -> dict[str, Any]:
    return {"source": "a.pdf", "page": 1, "task": "kvp", "text": "{}", "value": {}, "timings": {"seconds": 1}} | changes


def test_only_ignored_fields_may_differ() -> None:
    base = {"a": record(), "b": record(text="abc"), "c": record(value=0), "d": record()}
    new = {"a": record(timings={}), "b": record(text="abd"), "c": record(value=None), "e": record()}
    found = compare(base, new)
    assert (found.n_records, found.n_same, found.missing) == (4, 1, ["d", "e"])
    assert [one["record"] for one in found.different] == ["b", "c"]
    assert found.different[0] == {"record": "b", "fields": ["text"], "at": 2, "base": "abc", "new": "abd"}
    assert found.different[1] == {"record": "c", "fields": ["value"]}


def test_a_field_that_is_gone_or_new_is_a_difference() -> None:
    gone = {name: value for name, value in record().items() if name != "value"}
    assert compare({"a": record()}, {"a": gone}).different == [{"record": "a", "fields": ["value"]}]
    assert compare({"a": gone}, {"a": record()}).different == [{"record": "a", "fields": ["value"]}]


def test_renamed_fields_have_one_name_each() -> None:
    assert not IGNORED & RENAMED.keys()
    assert len(set(RENAMED.values())) == len(RENAMED)


def test_an_answer_that_ends_earlier_differs_at_its_end() -> None:
    assert first_difference({"text": "abc"}, {"text": "ab"}) == {"at": 2, "base": "abc", "new": "ab"}


def test_every_document_is_asked_for_every_task_of_its_kind(tmp_path: Path) -> None:
    questions = list(held_out(2))
    files = draw_files(tmp_path / "documents", questions, random.Random(0))
    n_pages = 0
    for file in files:
        with Image.open(file.path) if file.path.suffix != ".pdf" else Image.new("L", (1, 1)) as image:
            n_pages += getattr(image, "n_frames", 1) if file.path.suffix != ".pdf" else 0
    assert n_pages < len(questions) == 10  # the others are in PDFs
    asked = [(file, task) for job in jobs(files, tmp_path) for file in job.files for task in job.tasks]
    assert len(asked) == len(set(asked))
    n_tasks = {"table": 3, "chart": 3, "form": 1}
    assert len(asked) == sum(n_tasks[file.kind] for file in files)
    assert all((job.schema is not None) == (job.tasks == ["kvp"]) for job in jobs(files, tmp_path))


def test_records_are_known_by_run_file_page_and_task(tmp_path: Path) -> None:
    lines = [record(page=page, task=task) for page in (1, 2) for task in ("kvp", "tables_html")]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    records = read_records(tmp_path)
    assert len(records) == 4
    assert records["run a.pdf page 2 kvp"] == lines[2]
