"""The output of `granite4v extract`: records on stdout; progress, messages and a summary on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from granite4v.cli.progress import Activity, Progress, duration, model_activity, plural
from granite4v.cli.streams import PipeClosed, ResultsLost, to_json
from granite4v.cli.terminal import clean
from granite4v.cli.verbosity import show_timings
from granite4v.errors import OutputError

if TYPE_CHECKING:
    from granite4v.runtime.extract import Extraction, Record, State


SHOWN_PATHS = 20


class Printer:
    """Prints records: a single one without a heading, several with headings.

    If results also go to `out`, a stdout that cannot be written does not end the run: the error is kept in `failure`.
    """

    def __init__(
        self, *, as_json: bool, out: Path | None, table_format: str | None, say: Callable[[str], None]
    ) -> None:
        """`table_format`: None for the format of the task."""
        self.out = out
        self.failure: Exception | None = None
        self._as_json, self._table_format, self._say = as_json, table_format, say
        self._first: str | None = None  # held back until it is known whether there is a second one
        self._are_several = False

    def print(self, record: Record) -> None:
        if self._as_json:
            self._write(lambda: print(to_json(record.as_dict()), flush=True))
        elif self.out is None and record.value is not None:
            self._print_text(record)

    def finish(self) -> None:
        if self._first is not None:
            print(self._first.partition("\n")[2])

    def list_files(self, state: State) -> None:
        """Prints the paths of the files that were written, unless records are printed as JSON."""
        if self.out is not None and not self._as_json:
            self._write(lambda: self._list_files(state))

    def _list_files(self, state: State) -> None:
        from granite4v.runtime.extract.output_directory import RESULTS

        assert self.out is not None
        list_paths([self.out / RESULTS, *state.paths], state.n_paths + 1, self.out, self._say)

    def _write(self, step: Callable[[], None]) -> None:
        if self.failure is not None:
            return
        try:
            step()
        except (OSError, PipeClosed, ResultsLost) as error:
            if self.out is None:
                raise
            self.failure = error
            self._say(f"standard output is no longer writable; all results are in '{self.out}'")

    def _print_text(self, record: Record) -> None:
        text = f"== {clean(record.source, keep='')}, page {record.page}, {record.task}\n{self._text(record)}"
        if self._first is None and not self._are_several:
            self._first = text
            return
        for waiting in filter(None, [self._first, text]):
            print(waiting, flush=True)
        self._first, self._are_several = None, True

    def _text(self, record: Record) -> str:
        from granite4v.runtime.extract.document_files import TABLE_FORMATS, as_text

        is_table = self._table_format in TABLE_FORMATS and record.tables
        return as_text(record, self._table_format if is_table else None)


def list_paths(paths: Sequence[Path], n_paths: int, folder: Path, say: Callable[[str], None]) -> None:
    """Prints the paths of files in a folder, on a terminal the first `SHOWN_PATHS`; `say` gets the number of others."""
    shown = paths[:SHOWN_PATHS] if sys.stdout.isatty() else paths
    for path in shown:
        print(path)
    if n_paths > len(shown):
        say(f"and {plural(n_paths - len(shown), 'more file')} in '{folder}'")


class RunProgress:
    """Callbacks of a run that update the progress display."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self._activity = Activity("")
        self._source, self._reported = "", set[str]()  # lines already printed about the current document

    def say(self, text: str) -> None:
        """Prints a message of the run that is not a record."""
        tell(self.progress, text)

    def watch(self, state: State) -> None:
        self._activity = activity(state, time.monotonic())
        self.progress.show(self._activity)

    def stage(self, stage: str, done: int, total: int) -> None:
        """Shows what the model is doing before it answers."""
        step = model_activity(stage, done, total)
        share = f" {step.share:.0%}" if step.share else ""
        detail = ": ".join(filter(None, [self._activity.detail, f"{step.stage}{share}"]))
        self.progress.show(replace(self._activity, detail=detail))

    def report(self, record: Record) -> None:
        """Prints a page's warnings, and what is wrong with a record whose answer is invalid or incomplete.

        Messages about a whole page or document are printed once, and not for every task.
        """
        if record.timings:
            show_timings(f"{record.source}, page {record.page}, {record.task}", record.timings)
        for warning in record.warnings:
            self._say_once(record.source, f"warning: {warning}")
        if not record.failed and not record.salvaged:
            return
        source = clean(record.source, keep="")
        where = source if record.page is None else f"{source}, page {record.page}"
        if record.error is None:
            what = "invalid" if record.failed else f"truncated, kept {record.kept}"
            self.progress.say(f"{where}, {record.task}: {what}: {record.validity_error}")
        else:
            names_source = f"'{record.source}'" in record.error
            self._say_once(record.source, record.error if names_source else f"{where}: {record.error}")

    def _say_once(self, source: str, text: str) -> None:
        if self._source != source:
            self._source, self._reported = source, set()
        if text not in self._reported:
            self._reported.add(text)
            self.progress.say(text)


def tell(progress: Progress, text: str) -> None:
    """Prints a message of a run or an export: as a note, unless it is about a result."""
    from granite4v.runtime.extract.document_files import AboutResult

    (progress.say if isinstance(text, AboutResult) else progress.note)(text)


def print_records(run: Extraction, printer: Printer, shown: RunProgress) -> None:
    """Prints the records of a run as they arrive, and what is kept if it ends early."""
    for warning in run.model.warnings:
        shown.progress.note(f"warning: {warning}")
    run.progress = shown.stage
    try:
        for record in run:
            shown.report(record)
            printer.print(record)
        printer.finish()
    except BaseException as error:
        says_what_is_kept = isinstance(error, OutputError)
        if isinstance(error, KeyboardInterrupt) or (printer.out is not None and not says_what_is_kept):
            shown.progress.say(kept(run.state, printer.out))
        raise


def kept(state: State, out: Path | None) -> str:
    """Describes what is kept of an interrupted run."""
    if out is None:
        return "no results are kept without --out"
    n = state.counts.n_records
    return f"{plural(n, 'finished record')} {'is' if n == 1 else 'are'} kept in '{out}'; continue with --resume"


def summary(state: State, seconds: float, *, of_all: bool = True) -> str:
    """Formats one line: what was read, how many records failed, are invalid or were cut off, and how long it took.

    `of_all`: with the records of earlier runs in the same directory.
    """
    counts = state.counts
    n_records = counts.n_records if of_all else counts.n_records - state.left_out.n_records
    pages = plural(state.n_pages_read + state.n_pages_known, "page")
    parts = [f"{pages} of {plural(state.n_documents, 'document')}", plural(n_records, "record")]
    for n, what in (
        (state.n_resumed * of_all, "from an earlier run"),
        (state.n_replaced, "of them replaced" if of_all else "replaced"),
        (state.left_out.n_records * of_all, "of documents not in this run's input"),
        (counts.n_failed - state.left_out.n_failed, "failed"),
        (counts.n_invalid - state.left_out.n_invalid, "invalid"),
        (counts.n_salvaged - state.left_out.n_salvaged, "truncated, partly kept"),
        (counts.n_copied * of_all, "copied from a page with the same pixels"),
    ):
        if n:
            parts.append(f"{n} {what}")
    if state.n_unwritten:
        parts.append(f"{plural(state.n_unwritten, 'file')} not written")
    speed = f", {state.tokens_per_s:,.1f} tokens/s" if state.tokens_per_s else ""
    return f"{', '.join(parts)}; {plural(state.n_tokens, 'token')}{speed}, {duration(seconds)}"


def activity(state: State, now: float) -> Activity:
    """The current document, page and task, and the number of pages done. `now`: from time.monotonic."""
    name = Path(state.source).name
    # first, since a narrow terminal cuts off the end
    parts = [f"{state.n_in_flight} answers at once"] if state.n_in_flight > 1 else []
    if state.n_documents:
        parts += [f"document {_of(state.n_documents, state.n_documents_total)}: {name}"]
    else:
        parts += [f"counting pages: {name}"]
    if state.page is not None:
        parts.append(f"page {_of(state.page, state.n_pages)}")
    if state.waited_s:
        parts.append(f"{'opening' if state.page is None else 'rendering'} for {duration(state.waited_s)}")
    if state.task:
        parts.append(state.task)
    return Activity(
        stage="",  # the same for the whole run: a new stage would print a plain line for every page
        done=state.n_pages_read + state.n_pages_known,
        total=state.n_pages_total or 0,
        detail=", ".join(parts),
        n_tokens=state.n_answer_tokens,
        tokens_per_s=state.tokens_per_s,
        left_s=state.left_s(now),
    )


def _of(n: int, total: int | None) -> str:
    return str(n) if total is None else f"{n} of {total}"
