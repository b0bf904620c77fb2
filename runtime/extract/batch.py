"""The loop of a run: turns pages into records, in order, and writes each to disk before it is returned; then writes the
files of each document."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from types import TracebackType

from granite4v.errors import OutputError
from granite4v.runtime.documents import Page, PageFailure, PageSkipped, Totals, open_pages
from granite4v.runtime.engine.stream import Progress
from granite4v.runtime.extract.asking import Asker
from granite4v.runtime.extract.attempts import Attempts
from granite4v.runtime.extract.cluster.model import RayModel
from granite4v.runtime.extract.document_files import (
    AboutResult,
    Form,
    Written,
    remove_stale,
    write_document,
    write_fields,
)
from granite4v.runtime.extract.earlier import Earlier, Seen, earlier_error
from granite4v.runtime.extract.names import Names
from granite4v.runtime.extract.options import ExtractOptions
from granite4v.runtime.extract.output_directory import OutputDirectory
from granite4v.runtime.extract.page_images import keep_image
from granite4v.runtime.extract.page_records import failed_page
from granite4v.runtime.extract.questions import Question
from granite4v.runtime.extract.record import Key, Record
from granite4v.runtime.extract.report import write_report
from granite4v.runtime.extract.results_log import ResultsLog
from granite4v.runtime.extract.state import State, Watch, waiting
from granite4v.runtime.extract.window import PageWork, Slot, Window
from granite4v.runtime.model import Model

REPORT = "report.html"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """What a run has to do.

    `asker`: answers the questions, with `model` in this process or elsewhere. `hashes`: SHA-256 of the model's files by
    role. `named`: the inputs, or the folder that stands for them (see `begin`). `totals`: page counts of `inputs`.
    """

    model: Model | RayModel
    asker: Asker
    hashes: Mapping[str, str]
    questions: tuple[Question, ...]
    options: ExtractOptions
    inputs: tuple[str, ...]
    named: tuple[str, ...]
    totals: Totals


class Extraction:
    """An iterator over the records of a run. Holds a model, a log and a directory until it is exhausted or closed."""

    def __init__(
        self,
        job: Job,
        folder: OutputDirectory | None,
        log: ResultsLog,
        attempts: Attempts,
        state: State,
        watch: Watch,
        say: Say,
        opened: contextlib.ExitStack,
    ) -> None:
        """Use `extract` to create one. `opened` is closed when the run ends."""
        self._job, self._folder, self._log = job, folder, log
        self._watch, self._say, self._opened = watch, say, opened
        self.progress: Progress | None = None  # called during the stages before an answer
        self._names = Names(job.named, log.sources())
        self._tasks = [question.task for question in job.questions]
        self._form = Form(job.options.formats, job.options.csv_safe)
        has_image = None if folder is None or not job.options.report else folder.has_image
        self._earlier = Earlier(log, self._tasks, retry_failed=job.options.retry_failed, has_image=has_image)
        self.state = state
        self.state.counts, self.state.n_resumed = log.counts, log.counts.n_records
        self.state.n_documents_total, self.state.n_pages_total = job.totals.documents, job.totals.pages
        self._window = Window(job.asker, job.hashes, job.options, log, attempts, state, watch)
        self._read: Seen | None = None  # the document of the page that was rendered last
        self._written: Seen | None = None  # the document whose records come next
        self._met: set[str] = set()  # the documents that `_written` has been so far
        self._is_read = False  # whether `open_pages` has no more pages
        self._records = self._run()

    def __iter__(self) -> Extraction:
        return self

    def __next__(self) -> Record:
        try:
            return next(self._records)
        except BaseException:
            self.close()
            raise

    @property
    def model(self) -> Model | RayModel:
        return self._job.model

    def close(self) -> None:
        """Ends the run and keeps what is finished. A second call does nothing."""
        self._records.close()
        self._opened.close()

    def __enter__(self) -> Extraction:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> Generator[Record]:
        job, window = self._job, self._window
        opened = open_pages(
            job.inputs,
            pages=job.options.pages,
            password=job.options.password,
            crop=job.options.crop,
            view=job.model.files.vision_config,
            wanted=self._earlier.wanted,
            earlier_error=None if job.options.retry_failed else functools.partial(earlier_error, self._log),
            waiting=self._while_rendering,
            counted=job.totals,
        )
        with contextlib.closing(opened) as pages:
            try:
                while True:
                    window.poll()
                    yield from self._ready()
                    window.ask(self._before_answers)
                    if window.has_room and not self._is_read:
                        item = next(pages, None)
                        self._is_read = item is None
                        if item is not None:
                            window.add(self._work(item))
                        del item
                    elif window.head is None:
                        break
                    elif not window.head_is_ready:
                        window.wait()
            finally:
                self._keep_finished()
        self._end_document(self._written)
        self._end()

    def _while_rendering(self, source: str, number: int | None, waited_s: float) -> None:
        """Keeps the model busy while a page takes long to render: collects answers and asks further questions. If no
        question is in flight, reports the wait instead."""
        if self._window.is_active:
            self._window.poll()
            self._window.ask(self._before_answers)
        else:
            waiting(self.state, self._watch)(source, number, waited_s)

    def _before_answers(self, stage: str, done: int, total: int) -> None:
        """Reports the progress of a page before its answer, unless answers are being generated: their token counts are
        the better progress."""
        if self.progress is not None and not self.state.n_answer_tokens:
            self.progress(stage, done, total)

    def _work(self, item: Page | PageFailure | PageSkipped) -> PageWork:
        """Returns the questions to ask about a page. A record that is still valid only gets the present state of its
        file."""
        if self._read is None or item.source != self._read.source:
            self._read = Seen(item.source)
        seen, job = self._read, self._job
        work = PageWork(item.source, item.number, getattr(item, "n_pages", None), seen)
        if isinstance(item, Page):
            self._keep_image(item)
            work.digest = item.digest
        if not isinstance(item, PageSkipped):
            for question in job.questions:
                key = (item.source, item.number, question.task)
                if self._earlier.keeps(key, item):  # the page was rendered for another task, or its file was touched
                    seen.changed |= self._refresh(key, item)
                    continue
                failed = failed_page(item, question, job.hashes) if isinstance(item, PageFailure) else None
                work.slots.append(Slot(question, record=failed))
        if isinstance(item, Page) and work.slots:
            work.page = item
        self._earlier.saw(seen, item)
        return work

    def _ready(self) -> Iterator[Record]:
        """Yields the records that come next, each written to disk first."""
        while (work := self._window.head) is not None:
            if work.seen is not self._written:
                self._end_document(self._written)
                self._written = work.seen
                self._met.add(work.source)
                self.state.n_documents += 1
                self._window.show()
            while work.slots and (record := work.slots[0].record) is not None:
                yield self._write(work, record)
            if work.slots:
                return
            self.state.n_pages_read += work.is_computed
            self.state.n_pages_known += not work.is_computed
            self._window.pop()

    def _write(self, work: PageWork, record: Record) -> Record:
        """Writes the record of a page's first remaining question to disk, and removes the question."""
        is_new = self._log.get(record.key) is None
        record = self._append(record)
        del work.slots[0]
        self.state.n_replaced += not is_new
        work.seen.changed |= not is_new
        return record

    def _keep_finished(self) -> None:
        """Stops what is in flight. After an early end, also keeps finished records behind an unfinished page."""
        self._window.stop()
        try:
            for record in self._window.finished():
                self._append(record)
            self._log.arrange(self._job.totals.sources, self._tasks)
        except OutputError as error:  # a full disk: if it has not ended the run already, this is the only message
            self._say(AboutResult(error))

    def _refresh(self, key: Key, item: Page | PageFailure) -> bool:
        """Stores the present state of the file in a valid record, so that the next run need not render the page.

        Returns True when the document's number of pages has changed, since file names depend on it.
        """
        entry = self._log.get(key)
        if entry is None or item.file_state is None or entry.file_state == item.file_state:
            return False
        record = replace(self._log.read(key), file_state=item.file_state, stem=self._stem(item.source))
        n_pages = record.n_pages
        if isinstance(item, Page):
            record = replace(record, n_pages=item.n_pages, dpi=item.dpi, warnings=item.warnings)
        self._log.append(record)
        return record.n_pages != n_pages

    def _append(self, record: Record) -> Record:
        record = replace(record, stem=self._stem(record.source))
        try:
            self._log.append(record)
        except (ValueError, MemoryError) as error:  # ValueError: infinity, which JSON does not have
            why = f"the answer cannot be kept: {error or 'there is not enough memory'}"
            record = replace(record, value=None, confidence=None, valid=False, validity_error=why)
            self._log.append(record)
        return record

    def _keep_image(self, page: Page) -> None:
        if self._folder is None or not self._job.options.report:
            return
        written = Written()
        with written.one_file(f"the image of page {page.number} of '{page.source}' is not written", self._say):
            keep_image(self._folder.path, page.digest, page.image)
        self.state.n_unwritten += written.n_failed

    def _end_document(self, seen: Seen | None) -> None:
        """Drops the document's stale records and writes its files, including any that an earlier run did not get to."""
        if seen is None:
            return
        stale = self._earlier.stale(seen)
        for key in stale:
            self._log.drop(key)
        self.state.n_replaced += len(stale)
        if self._folder is None:
            return
        root, stem, source = self._folder.path, self._names.stem(seen.source), seen.source
        written = write_document(root, stem, source, lambda: self._log.of_document(source), self._form, self._say)
        if seen.changed or stale:
            with written.one_file(f"an older file of '{source}' is not removed", self._say):
                remove_stale(root, stem, written.paths)
        self._note(written)

    def _end(self) -> None:
        for source in self._log.sources():
            if source not in self._met:
                for key in self._log.keys_of(source):
                    self.state.left_out.add(self._log.entry(key))
        if self._folder is None:
            return
        self._log.arrange(self._job.totals.sources, self._tasks)
        self._log.tidy()
        written = write_fields(self._folder.path, lambda: self._log, self._log.tasks(), self._form, self._say)
        if self._job.options.report:
            path = self._folder.path / REPORT
            with written.one_file(f"'{path}' is not written", self._say):
                write_report(path, self._log)
                written.paths.append(path)
        self._note(written)

    def _note(self, written: Written) -> None:
        self.state.n_unwritten += written.n_failed
        self.state.wrote(written.paths)
        if written.n_failed:
            self._log.check_there()

    def _stem(self, source: str) -> str | None:
        return None if self._folder is None else self._names.stem(source)
