"""`granite4v extract`: documents in, tables, chart data and fields out; a batch that survives."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from granite4v.cli.options import (
    ContextOption,
    DeviceOption,
    LoraOption,
    MmprojOption,
    ModelOption,
    ThreadsOption,
    model_path,
)
from granite4v.cli.status import stage_line
from granite4v.cli.streams import PipeClosed, ResultsLost, to_json
from granite4v.cli.terminal import clean
from granite4v.errors import OutputError
from granite4v.runtime.formats.tasks import TASKS

if TYPE_CHECKING:
    from granite4v.runtime.extract import Extraction, Record, State

EXIT_FAILURE = 1


def extract(
    *,
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="INPUT...", help="Images, PDFs, folders or globs; '-' reads one file from stdin."),
    ],
    model: ModelOption = None,
    mmproj: MmprojOption = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            metavar="TASK",
            help=f"{', '.join(TASKS)}; may be repeated.",
        ),
    ] = None,
    schema: Annotated[
        str | None,
        typer.Option(
            "--schema", metavar="FILE|CLASS", help="Fields that kvp wants: a JSON Schema, or package.module:Class."
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="A free question about every page.")
    ] = None,
    pages: Annotated[
        str | None, typer.Option("--pages", metavar="1-3,7", help="Pages of each document.", show_default="all")
    ] = None,
    password: Annotated[str | None, typer.Option("--password", help="Opens encrypted PDFs.")] = None,
    crop: Annotated[
        str | None, typer.Option("--crop", metavar="X,Y,W,H", help="Only this region of each page.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where results and files go.")] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="Of tables and chart data: csv, html, json, otsl, md; and docling. May be repeated.",
            show_default="the task's own",
        ),
    ] = None,
    csv_safe: Annotated[
        bool,
        typer.Option(
            "--csv-safe", help="Write CSV for spreadsheets: with a byte order mark, and no cell that begins a formula."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print each record as a line of JSON.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run that DIR holds; changed files are read again.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="With --resume, read pages again that failed.")
    ] = False,
    unconstrained: Annotated[
        bool, typer.Option("--unconstrained", help="Do not hold answers to the format of their task.")
    ] = False,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="The most tokens an answer may have.", show_default="4096, or as many as fit"),
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Write DIR/report.html: each page beside its values.")
    ] = False,
    ctx: ContextOption = None,
    threads: ThreadsOption = None,
    device: DeviceOption = "auto",
    lora: LoraOption = None,
) -> None:
    """Read tables, chart data and fields from documents.

    With --out, every finished record is kept in DIR/results.jsonl, whatever happens, and --resume goes on from there.
    A page that fails is a record with its error. The status is 1 when a page failed, when an answer is not valid or was
    cut, and when a file could not be written.
    """
    from granite4v.runtime.documents import SelectionError
    from granite4v.runtime.extract import ArgumentError, ExtractOptions, begin
    from granite4v.runtime.extract.arguments import checked

    options = ExtractOptions(
        tasks=task or (),
        schema=schema,
        prompt=prompt,
        out=out,
        formats=formats or (),
        pages=pages,
        password=password,
        crop=crop,
        resume=resume,
        unconstrained=unconstrained,
        max_tokens=max_tokens,
        report=report,
        csv_safe=csv_safe,
        retry_failed=retry_failed,
        n_ctx=ctx,
        n_threads=threads,
        device=device,
        mmproj=mmproj,
        lora=lora,
    )
    meter = Meter()
    try:
        checked(inputs, options)  # wrong usage is reported before the embedded model is converted
        run = begin(inputs, options, model=model_path(model), watch=meter.watch, say=meter.say)
    except (ArgumentError, SelectionError) as error:
        raise typer.BadParameter(str(error)) from None
    with run:
        for warning in run.model.warnings:
            meter.say(f"warning: {warning}")
        run.progress = meter.stage
        printer = _Printer(as_json=as_json, out=out, form=formats[0] if formats else None, say=meter.say)
        try:
            for record in run:
                meter.clear()
                meter.remarks(record)
                printer.print(record)
            printer.finish()
        except BaseException as error:
            told = isinstance(error, OutputError)  # which says what is kept
            if isinstance(error, KeyboardInterrupt) or (out is not None and not told):
                meter.say(_kept(run, out))
            raise
        finally:
            meter.clear()
    meter.say(summary(run.state, time.monotonic() - run.state.began))
    if out is not None and not as_json:
        printer.write(lambda: _list_files(run.state, out))
    if isinstance(printer.failure, PipeClosed):
        raise printer.failure
    if run.state.incomplete or printer.failure is not None:
        raise typer.Exit(EXIT_FAILURE)


def _kept(run: Extraction, out: Path | None) -> str:
    if out is None:
        return "nothing is kept without --out"
    n = run.state.counts.n_records
    return f"{plural(n, 'finished record')} {'is' if n == 1 else 'are'} kept in '{out}'; go on with --resume"


def _list_files(state: State, out: Path) -> None:
    from granite4v.runtime.extract.output_directory import RESULTS

    print(out / RESULTS)
    for path in state.paths:
        print(path)
    if state.n_paths > len(state.paths):
        print(f"and {state.n_paths - len(state.paths)} more in {out}")


class _Printer:
    """What was read, on stdout: as it is when there is one record, under headings when there are more.

    Where results go to files as well, a stdout that cannot be written ends nothing: `failure` tells of it.
    """

    def __init__(self, *, as_json: bool, out: Path | None, form: str | None, say: Callable[[str], None]) -> None:
        """`form`: of tables, None for the task's own."""
        self._as_json, self._out, self._form, self._say = as_json, out, form, say
        self._first: str | None = None
        self._many = False
        self.failure: Exception | None = None

    def print(self, record: Record) -> None:
        if self._as_json:
            self.write(lambda: print(to_json(record.as_dict()), flush=True))
        elif self._out is None and record.value is not None:
            self._print_text(record)

    def finish(self) -> None:
        if self._first is not None:
            print(self._first.partition("\n")[2])

    def write(self, step: Callable[[], None]) -> None:
        if self.failure is not None:
            return
        try:
            step()
        except (OSError, PipeClosed, ResultsLost) as error:
            if self._out is None:
                raise
            self.failure = error
            self._say(f"standard output cannot be written any more; all results are in '{self._out}'")

    def _print_text(self, record: Record) -> None:
        text = f"== {record.source}, page {record.page}, {record.task}\n{_text(record, self._form)}"
        if self._first is None and not self._many:
            self._first = text
            return
        for waiting in filter(None, [self._first, text]):
            print(waiting, flush=True)
        self._first, self._many = None, True


def _text(record: Record, form: str | None) -> str:
    from granite4v.runtime.extract.document_files import TABLE_FORMATS, as_text

    return as_text(record, form if form in TABLE_FORMATS and record.tables else None)


def summary(state: State, seconds: float) -> str:
    """One line: how much was read, how it fared, how long it took."""
    tally = state.counts
    pages = plural(state.n_pages_read + state.n_pages_known, "page")
    parts = [f"{pages} of {plural(state.n_documents, 'document')}", plural(tally.n_records, "record")]
    for n, what in (
        (state.n_resumed, "from an earlier run"),
        (state.n_replaced, "of those replaced"),
        (state.left_out.n_records, "about documents that were not given now"),
        (tally.n_failed - state.left_out.n_failed, "failed"),
        (tally.n_invalid - state.left_out.n_invalid, "not valid"),
        (tally.n_salvaged - state.left_out.n_salvaged, "cut short and kept in part"),
        (tally.n_copied, "copied from a page with the same pixels"),
    ):
        if n:
            parts.append(f"{n} {what}")
    if state.n_unwritten:
        parts.append(f"{plural(state.n_unwritten, 'file')} not written")
    speed = f", {state.tokens_per_s:,.1f} a second" if state.tokens_per_s else ""
    return f"{', '.join(parts)}; {plural(state.n_tokens, 'token')}{speed}, {duration(seconds)}"


def plural(n: int, noun: str) -> str:
    """'1 page', '2,000 pages'."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def duration(seconds: float) -> str:
    """As people say it: '42 s', '5 min', '2 h 10 min'."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


class Meter:
    """Progress on stderr: a line that renews itself on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._interval_s = 0.1 if self._terminal else 10.0
        self._last = -self._interval_s
        self._width = 0
        self._line = ""
        self._said: tuple[str, set[str]] = "", set()  # of the document at hand

    def watch(self, state: State) -> None:
        self._line = line(state, time.monotonic())
        self._show(self._line)

    def stage(self, what: str, done: int, total: int) -> None:
        """A `Model.progress` callback."""
        self._show(": ".join(filter(None, [self._line, stage_line(what, done, total)])))

    def remarks(self, record: Record) -> None:
        """Lines for the warnings of a page, and for a record without a valid and complete answer.

        What concerns a page or document is said once, whatever the tasks.
        """
        for warning in record.warnings:
            self._say_once(record.source, f"warning: {warning}")
        if not record.failed and not record.salvaged:
            return
        where = record.source if record.page is None else f"{record.source}, page {record.page}"
        if record.error is None:
            what = "not valid" if record.failed else f"cut, and kept {record.kept}"
            self.say(f"{where}, {record.task}: {what}: {record.validity_error}")
        else:
            named = f"'{record.source}'" in record.error
            self._say_once(record.source, record.error if named else f"{where}: {record.error}")

    def _say_once(self, source: str, text: str) -> None:
        if self._said[0] != source:
            self._said = source, set()
        if text not in self._said[1]:
            self._said[1].add(text)
            self.say(text)

    def say(self, text: str) -> None:
        self.clear()
        print(clean(text, keep="\n"), file=self._stream, flush=True)

    def clear(self) -> None:
        if self._width:
            print("\r" + " " * self._width + "\r", end="", file=self._stream, flush=True)
            self._width = 0

    def _show(self, text: str) -> None:
        now = time.monotonic()
        if now - self._last < self._interval_s:
            return
        self._last = now
        text = clean(text, keep="")
        if not self._terminal:
            print(text, file=self._stream, flush=True)
            return
        import shutil

        text = text[: shutil.get_terminal_size().columns - 1]
        print("\r" + text.ljust(self._width), end="", file=self._stream, flush=True)
        self._width = len(text)


def line(state: State, now: float) -> str:
    """Where a run is: document, page, task, tokens a second, time left."""
    name = Path(state.source).name
    if state.n_documents:
        parts = [f"document {_of(state.n_documents, state.n_documents_total)}: {name}"]
    else:
        parts = [f"counting pages: {name}"]
    if state.page is not None:
        parts.append(f"page {_of(state.page, state.n_pages)}")
    if state.waited_s:
        parts.append(f"{'opening' if state.page is None else 'rendering'} for {duration(state.waited_s)}")
    if state.task:
        parts.append(state.task + (f" {plural(state.n_answer_tokens, 'token')}" if state.n_answer_tokens else ""))
    if state.tokens_per_s:
        parts.append(f"{state.tokens_per_s:.1f} tokens/s")
    left_s = state.left_s(now)
    if left_s is not None:
        parts.append(f"{duration(left_s)} left")
    return ", ".join(parts)


def _of(n: int, total: int | None) -> str:
    return str(n) if total is None else f"{n} of {total}"
