"""Tests of the results log: records that replace others, the order of the file, and files that are not ours."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from granite4v.errors import OutputError
from granite4v.runtime.extract.record import Record
from granite4v.runtime.extract.results_log import ResultsLog


def record(source: str, page: int | None, task: str, value: Any = 1) -> Record:
    return Record(source, page, 3, task, (1, 1), None, f"{value}", value={"n": value}, valid=True)


def lines(path: Path) -> list[tuple[str, int | None, str, int]]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [(one["source"], one["page"], one["task"], one["value"]["n"]) for one in found]


def test_a_record_replaces_another_and_the_file_ends_in_order(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with ResultsLog.open(path) as log:
        for one in (record("a", None, "x"), record("b", 1, "x"), record("a", 2, "x"), record("a", 1, "x", 5)):
            log.append(one)
        log.append(record("a", 1, "y", 6))
        log.append(replace(record("b", 1, "x", 7), error="no"))
        log.drop(("a", None, "x"))
        assert (log.counts.n_records, log.counts.n_failed) == (4, 1)
        expected = [("a", 1, "x", 5), ("a", 1, "y", 6), ("a", 2, "x", 1), ("b", 1, "x", 7)]
        assert [(r.source, r.page, r.task, r.value["n"]) for r in log] == expected
        assert len(lines(path)) == 6  # older lines stay until the end
        assert log.answer_to("5", "x") == record("a", 1, "x", 5) and log.answer_to("7", "x") is None
        assert log.answer_to("1", "x") is None  # the first record of this digest was dropped
        log.tidy()
        assert lines(path) == expected and [r.value["n"] for r in log.of_document("a")] == [5, 6, 1]
        log.append(record("c", 1, "x"))
    assert lines(path) == [*expected, ("c", 1, "x", 1)] and [one.name for one in tmp_path.iterdir()] == [path.name]


def test_lines_that_were_superseded_are_left_out_by_the_next_run(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with ResultsLog.open(path) as log:
        log.append(record("a", 1, "x"))
    first = path.read_bytes()
    with ResultsLog.open(path) as log:
        log.append(record("a", 1, "x", 2))
    path.write_bytes(first + path.read_bytes())  # as after a kill
    with ResultsLog.open(path) as log:
        assert [r.value for r in log] == [{"n": 2}] and log.counts.n_records == 1
    assert lines(path) == [("a", 1, "x", 2)]


def test_a_file_that_is_in_order_is_not_written_again(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    for _ in range(2):
        with ResultsLog.open(path) as log:
            for page in (1, 2, 3):
                log.append(record("a", page, "x"))
        inode = path.stat().st_ino
        path.write_bytes(b"".join(path.read_bytes().splitlines(True)[:3]))
        with ResultsLog.open(path):
            pass
        assert path.stat().st_ino == inode


def test_a_disk_that_is_full_while_tidying_leaves_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.jsonl"

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    log = ResultsLog.open(path)
    log.append(record("a", 1, "x"))
    log.append(record("a", 1, "x", 2))
    content = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match=r"no space left .* 1 finished record is kept; continue with --resume"):
            log.tidy()
    assert path.read_bytes() == content and [one.name for one in tmp_path.iterdir()] == [path.name]
    assert [r.value for r in log] == [{"n": 2}]
    log.close()
    assert lines(path) == [("a", 1, "x", 2)]


OURS = json.dumps(record("a", 1, "x").as_dict()).encode() + b"\n"


@pytest.mark.parametrize(
    "content",
    [
        b"mine\n",
        b"mine",
        b'{"source": "mine"}\n',
        b'{"total": 5}\n',
        b"{}\n",
        b"null\n",
        b"[1, 2]",
        b"\xff\xfe\x00\n",
        b"[" * 100_000 + b"\n",
        b'{"a":' * 10_000 + b"1" + b"}" * 10_000 + b"\n" + OURS,
        OURS.replace(b'"n": 1', b'"n": NaN') + OURS,
        OURS.replace(b'"page": 1', b'"page": "1"') + OURS,
        OURS.replace(b'"warnings": []', b'"warnings": {}') + OURS,
        OURS.replace(b'"size_px": [1, 1]', b'"size_px": [1]') + OURS,
        OURS.replace(b'"a"', b'"a", "more": 1') + OURS,
        OURS.replace(b'"task": "x", ', b"") + OURS,
        OURS.replace(b'"task": "x"', b'"task": "tables_json"') + OURS,
        OURS.replace(b'"task": "x"', b'"task": "chart2csv"') + OURS,
        b"\0" * 100 + b"\n" + OURS,
        b"x" * 10_000_000 + b"\n" + OURS,
    ],
    ids=lambda content: repr(content[:40]),
)
def test_a_file_of_someone_else_is_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(content)
    with pytest.raises(OutputError, match=r"^line 1 of '.*results.jsonl' is not a record of ours"):
        ResultsLog.open(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("n", [1, 5, 11, 12, 60, len(OURS) - 1])
def test_a_first_record_that_was_torn_is_dropped(tmp_path: Path, n: int) -> None:
    for tail in (b"", b"\0" * 50):
        (tmp_path / "results.jsonl").write_bytes(OURS[:n] + (tail if n > 12 else b""))
        with ResultsLog.open(tmp_path / "results.jsonl") as log:
            assert list(log) == []
        assert (tmp_path / "results.jsonl").read_bytes() == b""


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"mine\n")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "new")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, what in (("link", "a symbolic link"), ("dangling", "a symbolic link"), ("pipe", "not a regular file")):
        with pytest.raises(OutputError, match=f"{name}' is {what}, which"):
            ResultsLog.open(tmp_path / name)
    with pytest.raises(OutputError, match="folder' is a directory"):
        ResultsLog.open(tmp_path / "folder")
    assert (tmp_path / "mine").read_bytes() == b"mine\n" and not (tmp_path / "new").exists()


def test_records_of_the_version_before_are_read(tmp_path: Path) -> None:
    """They had no file state, stem, error type or confidence."""
    old = record("a", 1, "x").as_dict()
    for name in ("file_state", "stem", "error_type", "confidence"):
        del old[name]
    (tmp_path / "results.jsonl").write_text(json.dumps(old) + "\n")
    with ResultsLog.open(tmp_path / "results.jsonl") as log:
        assert list(log) == [record("a", 1, "x")] and log.sources() == {"a": None}


def test_a_number_that_json_does_not_have_is_refused(tmp_path: Path) -> None:
    with ResultsLog.open(tmp_path / "results.jsonl") as log:
        with pytest.raises(ValueError, match="JSON"):
            log.append(record("a", 1, "x", float("inf")))
        log.append(record("a", 2, "x"))
        assert len(list(log)) == 1


def test_a_record_that_is_on_the_disk_when_a_signal_arrives_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    with ResultsLog.open(tmp_path / "results.jsonl") as log:
        log.append(record("a", 1, "x"))
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", interrupted)
            with pytest.raises(KeyboardInterrupt):
                log.append(record("a", 2, "x"))
        assert log.counts.n_records == 2 and ("a", 2, "x") in log
        log.append(record("a", 3, "x"))
    assert [page for _, page, _, _ in lines(tmp_path / "results.jsonl")] == [1, 2, 3]
