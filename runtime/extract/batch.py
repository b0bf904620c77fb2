"""Pages in, records out, each written to disk before the next is started; then the files of each document."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from types import TracebackType

from granite4v.errors import OutputError
from granite4v.paths import FileOutputError
from granite4v.runtime.documents import Page, PageFailure, PageSkipped, Totals, open_pages
from granite4v.runtime.engine.stream import Progress
from granite4v.runtime.extract.attempts import Attempts
from granite4v.runtime.extract.docling_export import write_docling
from granite4v.runtime.extract.document_files import DOCLING, described, remove_stale, write_document
from granite4v.runtime.extract.earlier import Earlier, Seen, earlier_error
from granite4v.runtime.extract.names import Names
from granite4v.runtime.extract.options import ExtractOptions
from granite4v.runtime.extract.output_directory import OutputDirectory
from granite4v.runtime.extract.page_images import keep_image
from granite4v.runtime.extract.page_records import abandoned_page, answer_page, copied_page, failed_page
from granite4v.runtime.extract.questions import Question
from granite4v.runtime.extract.record import Key, Record
from granite4v.runtime.extract.report import write_report
from granite4v.runtime.extract.results_log import ResultsLog
from granite4v.runtime.extract.state import State, Watch, waiting
from granite4v.runtime.model import Model

REPORT = "report.html"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """What a run does. `hashes`: SHA-256 of the model's files by role; `totals`: of the pages of `inputs`."""

    model: Model
    hashes: Mapping[str, str]
    questions: tuple[Question, ...]
    options: ExtractOptions
    inputs: tuple[str, ...]
    totals: Totals


class Extraction:
    """An iterator over records, that holds a model, a log and a directory until it is used up or closed."""

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
        """`opened` is closed when the run ends. Use `extract` to get one."""
        self._job, self._folder, self._log, self._attempts = job, folder, log, attempts
        self._watch, self._say, self._opened = watch, say, opened
        self.progress: Progress | None = None  # told of what comes before an answer
        self._names = Names(job.inputs, log.sources())
        tasks = [question.task for question in job.questions]
        has_image = None if folder is None or not job.options.report else folder.has_image
        self._earlier = Earlier(log, tasks, retry_failed=job.options.retry_failed, has_image=has_image)
        self.state = state
        self.state.counts, self.state.n_resumed = log.counts, log.counts.n_records
        self.state.n_documents_total, self.state.n_pages_total = job.totals.documents, job.totals.pages
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
    def model(self) -> Model:
        return self._job.model

    def close(self) -> None:
        """Ends the run; what is finished is kept. A second call does nothing."""
        self._records.close()
        self._opened.close()

    def __enter__(self) -> Extraction:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> Generator[Record]:
        job, seen = self._job, None
        met: set[str] = set()
        opened = open_pages(
            job.inputs,
            pages=job.options.pages,
            password=job.options.password,
            crop=job.options.crop,
            view=job.model.files.vision_config,
            wanted=self._earlier.wanted,
            earlier_error=None if job.options.retry_failed else functools.partial(earlier_error, self._log),
            waiting=waiting(self.state, self._watch),
            counted=job.totals,
        )
        with contextlib.closing(opened) as pages:
            for item in pages:
                if seen is None or item.source != seen.source:
                    self._end_document(seen)
                    seen = Seen(item.source)
                    met.add(item.source)
                    self.state.n_documents += 1
                yield from self._page(item, seen)
                self._earlier.saw(seen, item)
                del item  # frees its pixels before the next page is fetched
        self._end_document(seen)
        self._end(met)

    def _page(self, item: Page | PageFailure | PageSkipped, seen: Seen) -> Iterator[Record]:
        """The records of one page that are not there yet, each on the disk before it is given out."""
        state = self.state
        state.source, state.page, state.n_pages = item.source, item.number, getattr(item, "n_pages", None)
        state.task, state.n_answer_tokens, state.waited_s = "", 0, 0.0
        self._watch(state)
        computed = False
        if isinstance(item, Page):
            self._keep_image(item)
        for question in self._job.questions:
            if isinstance(item, PageSkipped):
                break
            key = (item.source, item.number, question.task)
            if self._earlier.keeps(key, item):  # the page was rendered for another task, or its file was touched
                seen.changed |= self._refresh(key, item)
                continue
            is_new = self._log.get(key) is None
            record = self._make(item, question)
            state.n_replaced += not is_new
            seen.changed |= not is_new
            computed |= record.error is None and record.copy_of is None
            self._count(record)
            yield record
        state.n_pages_read += computed
        state.n_pages_known += not computed

    def _refresh(self, key: Key, item: Page | PageFailure) -> bool:
        """Notes the present state of the file in a record that holds, so that the next run need not render the page.

        True when the document has another number of pages now, by which files are named.
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

    def _make(self, item: Page | PageFailure, question: Question) -> Record:
        with contextlib.ExitStack() as working:
            record = replace(self._record(item, question, working), stem=self._stem(item.source))
            try:
                self._log.append(record)
            except (ValueError, MemoryError) as error:  # infinity, which JSON cannot carry
                why = f"the answer cannot be kept: {error or 'there is not enough memory'}"
                record = replace(record, value=None, valid=False, validity_error=why)
                self._log.append(record)
        return record

    def _record(self, item: Page | PageFailure, question: Question, working: contextlib.ExitStack) -> Record:
        """`working` is entered for as long as a death of the process would be the page's."""
        job, state = self._job, self.state
        state.task, state.n_answer_tokens = question.task, 0
        if not isinstance(item, Page):
            return failed_page(item, question, job.hashes)
        like = self._log.answer_to(item.digest, question.task)
        if like is not None:
            return copied_page(item, question, job.hashes, like)
        if job.options.retry_failed:
            self._attempts.forget(item.digest)
        if self._attempts.exhausted(item.digest):
            return abandoned_page(item, question, job.hashes)
        self._watch(state)

        def on_token(n: int) -> None:
            state.n_answer_tokens = n
            self._watch(state)

        working.enter_context(self._attempts.begin(item.digest))
        return answer_page(job.model, item, question, job.hashes, job.options, on_token, self.progress)

    def _keep_image(self, page: Page) -> None:
        if self._folder is None or not self._job.options.report:
            return
        with self._one_file(f"the image of page {page.number} of '{page.source}' is not written"):
            keep_image(self._folder.path, page.digest, page.image)

    def _count(self, record: Record) -> None:
        state = self.state
        state.n_tokens += int(record.timings.get("n_generated", 0))
        state.decode_s += record.timings.get("decode_s", 0.0)
        state.n_answer_tokens = 0
        self._watch(state)

    def _end_document(self, seen: Seen | None) -> None:
        """Drops what is out of date, and writes the files, also those that an earlier run may have had no time for."""
        if seen is None:
            return
        stale = self._earlier.stale(seen)
        for key in stale:
            self._log.drop(key)
        self.state.n_replaced += len(stale)
        if self._folder is None:
            return
        root, stem, options, source = self._folder.path, self._names.stem(seen.source), self._job.options, seen.source
        written = write_document(
            root, stem, self._log.of_document(source), options.formats, self._say, csv_safe=options.csv_safe
        )
        self.state.n_unwritten += written.n_failed
        self.state.wrote(written.paths)
        if DOCLING in options.formats:
            with self._one_file(f"'{stem}.docling.json' is not written"):
                path = write_docling(root, stem, source, self._log.of_document(source))
                written.paths += [path] if path is not None else []
                self.state.wrote([path] if path is not None else [])
        if seen.changed or stale:
            with self._one_file(f"an older file of '{source}' is not removed"):
                remove_stale(root, stem, written.paths)
        if written.n_failed:
            self._log.check_there()

    def _end(self, met: set[str]) -> None:
        for source in self._log.sources():
            if source not in met:
                for key in self._log.keys_of(source):
                    self.state.left_out.add(self._log.entry(key))
        if self._folder is None:
            return
        self._log.tidy()
        if self._job.options.report:
            path = self._folder.path / REPORT
            with self._one_file(f"'{path}' is not written"):
                write_report(path, self._log)
                self.state.wrote([path])

    @contextlib.contextmanager
    def _one_file(self, failed: str) -> Iterator[None]:
        """Tells what goes wrong with one file beside the records, which ends nothing."""
        try:
            yield
        except Exception as error:
            if isinstance(error, OutputError) and not isinstance(error, FileOutputError):
                raise
            self.state.n_unwritten += 1
            self._say(f"{failed}: {described(error)}")

    def _stem(self, source: str) -> str | None:
        return None if self._folder is None else self._names.stem(source)
