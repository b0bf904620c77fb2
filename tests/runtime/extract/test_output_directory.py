"""Tests of the results log and the output directory: finished records are never lost, and runs are never mixed."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from granite4v.errors import OutputError
from granite4v.paths import atomic_text_file
from granite4v.runtime.extract.output_directory import OutputDirectory
from granite4v.runtime.extract.record import Record
from granite4v.runtime.extract.results_log import ResultsLog
from granite4v.runtime.formats import read_csv, read_otsl

OTSL = "<otsl><ched>a<ched>b<nl><fcel>1<lcel><nl></otsl>"
RECORDS = [
    Record("a.pdf", 1, 2, "tables_otsl", (60, 80), 72.0, "d1", text=OTSL, value=read_otsl(OTSL), valid=True),
    Record("a.pdf", 1, 2, "chart2csv", (60, 80), 72.0, "d1", value=read_csv('x,y\n"1,5",\u2028é'), valid=True),
    Record("a.pdf", 2, 2, "tables_otsl", (60, 80), 72.0, "d2", error="it is blank"),
    Record("b\udcff.png", 1, 1, "kvp", (1, 1), None, "d3", value={"n": None, "s": "\ud800"}, valid=True),
    Record("c.pdf", None, None, "prompt", error="encrypted"),
    Record("d.png", 1, 1, "prompt", value="[]", text="[]", valid=True, copy_of={"source": "x", "page": 2}),
]


def write(path: Path, records: list[Record]) -> None:
    with ResultsLog.open(path) as log:
        for record in records:
            log.append(record)


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    write(path, RECORDS)
    with ResultsLog.open(path) as log:
        assert list(log) == RECORDS
        assert list(log.of_document("a.pdf")) == RECORDS[:3]
        assert ("c.pdf", None, "prompt") in log and ("c.pdf", 1, "prompt") not in log
        assert log.answer_to("d1", "chart2csv") == RECORDS[1]
        assert log.answer_to("d2", "tables_otsl") is None  # a failure is not copied
        counts = log.counts
        assert (counts.n_records, counts.n_failed, counts.n_invalid, counts.n_copied) == (6, 2, 0, 1)
    lines = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    assert [line["source"] for line in lines] == [record.source for record in RECORDS]
    assert lines[1]["value"] == [["x", "y"], ["1,5", "\u2028é"]]
    assert lines[0]["value"][0]["cells"][2]["colspan"] == 2


def test_records_written_between_reads_do_not_disturb_them(tmp_path: Path) -> None:
    with ResultsLog.open(tmp_path / "r") as log:
        log.append(RECORDS[0])
        log.append(RECORDS[1])
        reading = iter(log)
        assert next(reading) == RECORDS[0]
        log.append(RECORDS[2])
        assert list(reading) == [RECORDS[1]]
        assert list(log) == RECORDS[:3]


def test_every_place_a_write_can_be_torn_at(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    write(path, RECORDS)
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(0, len(whole), 23):
        path.write_bytes(whole[:cut])
        kept = sum(end <= cut for end in ends)
        write(path, RECORDS[kept:])
        assert path.read_bytes() == whole


@pytest.mark.parametrize("tail", [b"\0" * 512, b"\0" * 100 + b"\n", b'{"source": "a"}\n', b"\xff\xfe\n"])
def test_a_tail_that_a_power_cut_left_is_dropped(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "results.jsonl"
    write(path, RECORDS[:2])
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    with ResultsLog.open(path) as log:
        assert list(log) == RECORDS[:2]
    assert path.read_bytes() == whole


@pytest.mark.parametrize("line", [b"not json\n", b"[]\n", b'{"a": 1}\n'])
def test_damage_in_the_middle_is_an_error_and_changes_nothing(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "results.jsonl"
    write(path, RECORDS[:2])
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + line + second)
    with pytest.raises(OutputError, match="line 2 of .* is not a record of ours .* Remove that line if"):
        ResultsLog.open(path)
    assert path.read_bytes() == first + line + second


def test_a_full_disk_keeps_what_is_finished(tmp_path: Path) -> None:
    """Simulated by a process that may write files of at most 5000 bytes."""
    code = (
        "import resource, sys\n"
        "sys.path[:0] = ['.']\n"
        "from pathlib import Path\n"
        "from tests.runtime.extract.test_output_directory import RECORDS, ResultsLog, OutputError\n"
        "from dataclasses import replace\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))\n"
        f"path = Path({str(tmp_path / 'r.jsonl')!r})\n"
        "with ResultsLog.open(path) as log:\n"
        "    for n in range(100):\n"
        "        try:\n"
        "            log.append(replace(RECORDS[0], page=n))\n"
        "        except OutputError as error:\n"
        "            print(n, path.stat().st_size, error)\n"
        "            break\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=_root())
    n, size, message = done.stdout.split(" ", 2)
    assert "no space left for" in message and f"{n} finished records are kept; continue with --resume" in message
    assert (tmp_path / "r.jsonl").stat().st_size == int(size)
    with ResultsLog.open(tmp_path / "r.jsonl") as log:
        assert log.counts.n_records == int(n) > 1


def _root() -> Path:
    return Path(__file__).parents[3]


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    with pytest.raises(RuntimeError), atomic_text_file(path) as file:
        file.write("half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    for text in ("old", "new \ud800"):
        with atomic_text_file(path) as file:
            file.write(text)
    assert path.read_text() == "new \\ud800"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"no space left for '.*t\.csv'"), atomic_text_file(path) as file:
            file.write("x" * 20000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "new \\ud800" and len(list(tmp_path.iterdir())) == 1


MANIFEST = {
    "inputs": ["a.pdf"],
    "tasks": ["kvp"],
    "prompts": {"kvp": "0" * 64},
    "schema": "1" * 64,
    "model": {"text": "2" * 64},
    "settings": {"unconstrained": False, "max_tokens": None},
}


def begin(path: Path, resume: bool = False, **changes: Any) -> list[str]:
    folder = OutputDirectory.claim(path, resume=resume)
    try:
        return folder.begin({**MANIFEST, **changes})
    finally:
        folder.release()


def test_a_run_is_begun_once_and_gone_on_with(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    assert begin(out, resume=True) == []  # nothing exists yet; scripts may always pass --resume
    assert begin(out, resume=True) == []
    (out / "notes.txt").write_text("a file of the user's beside ours is no reason to stop")
    (out / ".granite4v-partial-x.csv").write_text("half")
    assert begin(out, resume=True, granite4v="9.9") == []
    assert not (out / ".granite4v-partial-x.csv").exists()
    with pytest.raises(OutputError, match="holds the results of another run; resume it .--resume"):
        begin(out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"text": "3" * 64}}, r"the model's files differ \(text 222222222222... then and 333333333333"),
        ({"schema": "4" * 64}, "the schema differs .111111111111... then, 444444444444... now"),
        ({"prompts": {"kvp": "5" * 64}}, r"the prompts differ \(kvp 000000000000... then and 555555555555... now"),
        (
            {"settings": {"unconstrained": True, "max_tokens": 5}},
            "unconstrained false then and true now, max_tokens none",
        ),
    ],
)
def test_a_changed_job_is_refused_with_what_differs(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    begin(tmp_path / "out")
    with pytest.raises(OutputError, match=message):
        begin(tmp_path / "out", resume=True, **changes)


def test_a_run_of_an_earlier_version_is_gone_on_with_under_the_new_names_of_its_settings(tmp_path: Path) -> None:
    old = {"format": 1, **MANIFEST, "settings": {"free": True, "max_tokens": None}}
    for unconstrained in (True, False):
        out = tmp_path / str(unconstrained)
        out.mkdir()
        (out / "run.json").write_text(json.dumps(old))
        settings = {"unconstrained": unconstrained, "max_tokens": None}
        if unconstrained:
            assert begin(out, resume=True, settings=settings) == []
            assert json.loads((out / "run.json").read_text())["settings"] == settings
        else:
            with pytest.raises(OutputError, match="unconstrained true then and false now"):
                begin(out, resume=True, settings=settings)


@pytest.mark.parametrize("resume", [False, True])
def test_foreign_files_are_left_alone(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match="holds thesis.tex, which no run of 'granite4v extract' made"):
        OutputDirectory.claim(tmp_path, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(OutputError, match=r"thesis.tex' is a file; give a directory"):
        OutputDirectory.claim(tmp_path / "thesis.tex", resume=resume)


def test_a_run_that_never_began_leaves_nothing(tmp_path: Path) -> None:
    OutputDirectory.claim(tmp_path / "deep" / "out", resume=False).release()
    assert list(tmp_path.iterdir()) == []


def test_a_second_process_is_refused_at_once_and_not_later(tmp_path: Path) -> None:
    folder = OutputDirectory.claim(tmp_path, resume=False)
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from granite4v.runtime.extract.output_directory import OutputDirectory\n"
        f"OutputDirectory.claim(Path({str(tmp_path)!r}), resume=True).release()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "another process is writing to" in done.stderr
    folder.release()
    subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="another user is needed for whom a folder is closed")
def test_a_directory_that_cannot_be_written() -> None:
    code = (
        "from pathlib import Path\n"
        "from granite4v.runtime.extract.output_directory import OutputDirectory\n"
        "import os, secrets, filelock\n"  # imported now: that user may not read the interpreter's folder
        "os.setuid(65534)\n"
        "for path in ('/usr/new', '/usr'):\n"
        "    try:\n"
        "        OutputDirectory.claim(Path(path), resume=False)\n"
        "    except Exception as error:\n"
        "        print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "OutputError cannot write '/usr/new': Permission denied" in done.stdout
    assert "OutputError cannot write '/usr': Permission denied" in done.stdout


def test_a_broken_manifest_is_an_error(tmp_path: Path) -> None:
    begin(tmp_path / "out")
    for content in ("", "[]", '{"format": 99}', '{"format": 1}', "[" * 100_000):
        (tmp_path / "out" / "run.json").write_text(content)
        with pytest.raises(OutputError, match=r"run\.json' (cannot be read|was not written by this version)"):
            begin(tmp_path / "out", resume=True)
