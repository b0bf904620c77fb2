"""What `granite4v extract` prints about a run: progress, remarks, a summary, records."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from granite4v.cli.extract_output import Printer, RunProgress, activity, kept, summary
from granite4v.cli.progress import Progress
from granite4v.cli.streams import PipeClosed
from granite4v.runtime.extract import Record, State


def a_state() -> State:
    """Returns a state with ten of twenty pages done, after a minute's work on two of them."""
    state = State(source="x/a.pdf", page=3, n_pages=6, task="kvp", n_answer_tokens=12, n_documents=2, began=0.0)
    state.n_documents_total, state.n_pages_total, state.n_pages_read, state.n_pages_known = 4, 20, 2, 8
    state.n_tokens, state.decode_s = 100, 4.0
    return state


def test_an_activity_says_where_a_run_is() -> None:
    state = a_state()
    shown = activity(state, 60.0)
    assert shown.title == "document 2 of 4: a.pdf, page 3 of 6, kvp"
    assert (shown.share, shown.n_tokens, shown.tokens_per_s, shown.left_s) == (0.5, 12, 28.0, 300.0)
    state.n_in_flight = 3
    assert activity(state, 60.0).title == "3 answers at once, document 2 of 4: a.pdf, page 3 of 6, kvp"
    state.n_in_flight, state.page, state.task, state.waited_s, state.n_answer_tokens = 0, 4, "", 7.0, 0
    assert activity(state, 60.0).title == "document 2 of 4: a.pdf, page 4 of 6, rendering for 7 s"
    assert activity(State(source="x/a.pdf", waited_s=3.0), 60.0).title == "counting pages: a.pdf, opening for 3 s"


def test_a_summary_counts_pages_records_and_tokens() -> None:
    state = a_state()
    state.n_answer_tokens = 0
    assert summary(state, 130.0).endswith("100 tokens, 25.0 tokens/s, 2 min")
    state.n_tokens = 1
    assert summary(state, 1.0) == "10 pages of 2 documents, 0 records; 1 token, 0.2 tokens/s, 1 s"


def test_what_is_kept_is_counted() -> None:
    state = State()
    assert kept(state, None) == "no results are kept without --out"
    assert kept(state, Path("out")) == "0 finished records are kept in 'out'; continue with --resume"
    state.counts.n_records = 1
    assert kept(state, Path("out")) == "1 finished record is kept in 'out'; continue with --resume"


def test_elsewhere_than_on_a_terminal_a_run_prints_a_line_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now, stream = 100.0, io.StringIO()
    monkeypatch.setattr("granite4v.cli.progress.time.monotonic", lambda: now)
    shown = RunProgress(Progress(stream))
    state = State(source="a.pdf", n_documents=1, n_pages_total=10, began=100.0)
    for page in range(1, 7):
        state.page, state.n_pages_read = page, page - 1
        shown.watch(state)
        shown.stage("encode", 3, 4)
        now += 4.0
    assert stream.getvalue().splitlines() == [
        "document 1: a.pdf, page 1 ...",
        "document 1: a.pdf, page 4: 30%, 28 s left, 12 s elapsed",
    ]


def a_record(**fields: object) -> Record:
    return Record.from_dict({**Record(source="a.pdf", page=1, n_pages=1, task="prompt").as_dict(), **fields})


def test_what_concerns_a_page_is_reported_once_for_all_tasks() -> None:
    stream = io.StringIO()
    shown = RunProgress(Progress(stream))
    for task in ("kvp", "chart2csv"):
        shown.report(a_record(task=task, warnings=["grey"], error="the page is broken"))
    shown.report(a_record(source="b.pdf", error="'b.pdf' is broken"))
    assert stream.getvalue().splitlines() == ["warning: grey", "a.pdf, page 1: the page is broken", "'b.pdf' is broken"]


def test_a_name_stays_on_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A file name may contain line feeds and cursor controls, for example to look like another record."""
    source = "a\n== b.pdf, page 1, kvp\x1b[2J\u202e.pdf"
    printer = Printer(as_json=False, out=None, table_format=None, say=print)
    for _ in range(2):
        printer.print(a_record(source=source, value="x", text="x"))
    stream = io.StringIO()
    RunProgress(Progress(stream)).report(a_record(source=source, error="the page is broken"))
    expected = "a\\n== b.pdf, page 1, kvp\\x1b[2J\\u202e.pdf, page 1"
    assert capsys.readouterr().out.splitlines() == [f"== {expected}, prompt", "x"] * 2
    assert stream.getvalue() == f"{expected}: the page is broken\n"


def test_records_survive_a_reader_that_stops_only_where_they_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*_: object, **__: object) -> None:
        raise PipeClosed

    said: list[str] = []
    monkeypatch.setattr("builtins.print", closed)
    printer = Printer(as_json=True, out=tmp_path, table_format=None, say=said.append)
    printer.print(a_record())
    printer.print(a_record())
    assert isinstance(printer.failure, PipeClosed)
    assert said == [f"standard output is no longer writable; all results are in '{tmp_path}'"]
    with pytest.raises(PipeClosed):
        Printer(as_json=True, out=None, table_format=None, say=said.append).print(a_record())
