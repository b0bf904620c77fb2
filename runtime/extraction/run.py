"""The whole job: pages in, records out, each on the disk before the next is begun."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from granite4v.errors import OutputError
from granite4v.runtime.extraction.documents import DOCLING, FORMATS, Names, write_document
from granite4v.runtime.extraction.fingerprint import model_hashes
from granite4v.runtime.extraction.folder import Folder
from granite4v.runtime.extraction.journal import Journal, Tally
from granite4v.runtime.extraction.questions import ArgumentError, Question, check_tasks, questions
from granite4v.runtime.extraction.reader import Settings, answer_page, copied_page, failed_page
from granite4v.runtime.extraction.record import Key, Record
from granite4v.runtime.extraction.schema import SchemaSource, load_schema

if TYPE_CHECKING:
    from granite4v.runtime.model import Model
    from granite4v.runtime.pages import Page, PageFailure

REPORT = "report.html"
Say = Callable[[str], None]


@dataclass
class State:
    """How far a run is; the same object for as long as it lasts."""

    source: str = ""
    page: int | None = None
    n_pages: int | None = None
    task: str = ""
    n_answer_tokens: int = 0  # of the answer that is being written
    n_documents: int = 0  # begun
    n_documents_total: int | None = None  # where that is known
    n_pages_total: int | None = None
    n_pages_read: int = 0  # by this process: those of an earlier run, and copies, take no time
    n_pages_known: int = 0  # not to be read: they were by an earlier run, are copies, or failed
    n_tokens: int = 0  # of finished answers
    decode_s: float = 0.0
    began: float = field(default_factory=time.monotonic)
    tally: Tally = field(default_factory=Tally)  # of all records, an earlier run's too
    n_resumed: int = 0  # records of an earlier run
    paths: list[Path] = field(default_factory=list)  # files written, first to last, as many as MAX_PATHS
    n_paths: int = 0

    @property
    def tokens_per_s(self) -> float:
        """While answering; 0 before the first answer."""
        return self.n_tokens / self.decode_s if self.decode_s > 0 else 0.0

    def left_s(self, now: float) -> float | None:
        """Seconds to the end, if the other pages take as long as those that were read; `now` as of time.monotonic."""
        if self.n_pages_total is None or not self.n_pages_read:
            return None
        n_left = self.n_pages_total - self.n_pages_read - self.n_pages_known
        return max(0.0, (now - self.began) / self.n_pages_read * n_left)


MAX_PATHS = 20
Watch = Callable[[State], None]


@dataclass(frozen=True)
class PageSelection:
    """Which pages, and what part of them; as `pages.open_pages` takes it."""

    pages: str | None = None
    password: str | None = None
    crop: str | None = None


def extract(
    inputs: Sequence[str | Path] | str | Path,
    tasks: Sequence[str] | str = (),
    *,
    model: Model | str | Path,
    schema: SchemaSource | None = None,
    prompt: str | None = None,
    out: str | Path | None = None,
    formats: Sequence[str] = (),
    pages: str | None = None,
    password: str | None = None,
    crop: Sequence[float | str] | str | None = None,
    resume: bool = False,
    free: bool = False,
    fast_forward: bool = True,
    max_tokens: int | None = None,
    report: bool = False,
    n_ctx: int | None = None,
    n_threads: int | None = None,
    device: str = "auto",
    mmproj: str | Path | None = None,
    lora: bool | None = None,
    watch: Watch | None = None,
    say: Say | None = None,
) -> Extraction:
    """An iterator over the records of every page of `inputs` and every task, made as they are asked for.

    `inputs`: pictures, PDFs, folders, globs or '-' for standard input. `tasks`: of `outputs.TASKS`; 'kvp' needs
    `schema` (a JSON Schema file, a pydantic class or its path, or plain data), and `prompt` adds a free question.
    `model`: a loaded model, which stays open, or what `Model.load` takes; then `n_ctx`, `n_threads`, `device` and
    `mmproj` count. `pages` ('1-3,7'), `password` and `crop` ('x,y,w,h') choose what is read. `max_tokens`: of an
    answer; None for 4096, or what the context has room for. `free`: do not hold answers to the form of their task.
    `fast_forward` off: sample even where the form leaves one choice.

    `out`: a directory for `results.jsonl`, where every record is on the disk before it is given out, and for the
    converted files of each document (`formats`: of `documents.FORMATS`); `report` adds `report.html`. `resume` goes on
    with a run that ended early; records that it made are not given again. `watch` is called often with the state of
    the run; `say` gets lines for a person (by default they go to the logger 'granite4v').

    A page that fails is a record with its `error`. What is wrong with the request itself is raised here: ArgumentError
    and SelectionError for arguments that cannot be, SchemaError, DocumentError when there is nothing to read,
    PromptError for a task the model does not know, ConstraintError for a schema that answers cannot be held to,
    OutputError for a directory that is not this run's, ModelFileError, DeviceError. While iterating: OutputError for a
    disk that is full, and the last two.
    """
    from granite4v.runtime.pages import count_pages, parse_crop

    paths = [str(item) for item in ([inputs] if isinstance(inputs, str | Path) else inputs)]
    tasks = check_tasks([tasks] if isinstance(tasks, str) else tasks, prompt, has_schema=schema is not None)
    check_arguments(paths, formats, out=out, resume=resume, report=report, max_tokens=max_tokens)
    found = None if schema is None else load_schema(schema)
    say = say or logging.getLogger("granite4v").info
    selection = PageSelection(pages, password, None if crop is None else str(parse_crop(crop)))
    totals = count_pages(paths, pages=pages, password=password)
    folder = None if out is None else Folder.claim(Path(out), resume=resume)
    closing: list[Callable[[], None]] = [folder.release] if folder else []
    try:
        if isinstance(model, str | Path):
            from granite4v.runtime.model import Model

            model = Model.load(model, n_ctx=n_ctx, n_threads=n_threads, device=device, mmproj=mmproj)
            closing.insert(0, model.close)
        asked = questions(model, tasks, prompt, found, free=free)
        settings = Settings(max_tokens, free, fast_forward, lora)
        hashes = model_hashes(model.files, say)
        if folder is not None:
            folder.begin(_manifest(paths, asked, hashes, selection, settings, model.n_ctx))
        journal = Journal.open(None if folder is None else folder.results)
        closing.insert(0, journal.close)
        job = _Job(model, hashes, asked, settings, selection, tuple(paths), tuple(formats), report)
        run = Extraction(job, folder, journal, watch or _nothing, say, closing)
        run.state.n_documents_total, run.state.n_pages_total = totals.documents, totals.pages
        return run
    except BaseException:
        for close in closing:
            close()
        raise


@dataclass(frozen=True)
class _Job:
    model: Model
    hashes: Mapping[str, str]
    questions: tuple[Question, ...]
    settings: Settings
    selection: PageSelection
    inputs: tuple[str, ...]
    formats: tuple[str, ...]
    report: bool


class Extraction:
    """An iterator over records, that holds a model, a journal and a directory until it is used up or closed."""

    def __init__(
        self,
        job: _Job,
        folder: Folder | None,
        journal: Journal,
        watch: Watch,
        say: Say,
        closing: list[Callable[[], None]],
    ) -> None:
        """`closing` is called in order when the run ends. Use `extract` to get one."""
        self._job, self._folder, self._journal = job, folder, journal
        self._watch, self._say, self._closing = watch, say, closing
        self._names = Names()
        self.state = State(tally=journal.tally, n_resumed=journal.tally.n_records)
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
        while self._closing:
            self._closing.pop(0)()

    def __enter__(self) -> Extraction:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> Generator[Record]:
        from granite4v.runtime.pages import PageSkipped, open_pages

        job, current = self._job, None
        opened = open_pages(job.inputs, **asdict(job.selection), view=job.model.files.vision_config)
        with contextlib.closing(opened) as pages:
            for item in pages:
                assert not isinstance(item, PageSkipped)  # none without `wanted`
                if item.source != current:
                    self._end_document(current)
                    current = item.source
                    self.state.n_documents += 1
                yield from self._page(item)
                del item  # its pixels go before the next page is drawn
        self._end_document(current)
        self._end()

    def _page(self, item: Page | PageFailure) -> Iterator[Record]:
        """The records of one page that are not there yet, each on the disk before it is given out."""
        from granite4v.runtime.pages import Page

        state, page = self.state, item if isinstance(item, Page) else None
        state.source, state.page, state.n_pages = item.source, item.number, page.n_pages if page else None
        if page is not None and self._folder is not None and self._job.report:
            from granite4v.runtime.extraction.pictures import keep_picture

            keep_picture(self._folder.path, page.digest, page.image)
        state.task, state.n_answer_tokens = "", 0
        self._watch(state)
        computed = False
        for question in self._job.questions:
            key: Key = (item.source, item.number, question.task)
            if key in self._journal:
                self._check_unchanged(key, page)
                continue
            record = self._record(item, question)
            self._journal.append(record)
            computed |= record.error is None and record.copy_of is None
            self._count(record)
            yield record
        if computed:  # the next page is another, or a copy
            self._job.model.forget_pictures()
        state.n_pages_read += computed
        state.n_pages_known += not computed

    def _record(self, item: Page | PageFailure, question: Question) -> Record:
        from granite4v.runtime.pages import Page

        job, state = self._job, self.state
        state.task, state.n_answer_tokens = question.task, 0
        if not isinstance(item, Page):
            return failed_page(item, question, job.hashes)
        like = self._journal.answer_to(item.digest, question.task)
        if like is not None:
            return copied_page(item, question, job.hashes, like)
        self._watch(state)

        def on_token(n: int) -> None:
            state.n_answer_tokens = n
            self._watch(state)

        return answer_page(job.model, item, question, job.hashes, job.settings, on_token)

    def _count(self, record: Record) -> None:
        state = self.state
        state.n_tokens += int(record.timings.get("n_generated", 0))
        state.decode_s += record.timings.get("decode_s", 0.0)
        state.n_answer_tokens = 0
        self._watch(state)

    def _check_unchanged(self, key: Key, page: Page | None) -> None:
        then, now = self._journal.digest(key), page.digest if page else None
        if then is not None and now is not None and then != now:
            source, number, _ = key
            raise OutputError(
                f"page {number} of '{source}' is not the one that was read earlier; results of two states of a "
                "document would mix. Restore the file, or start again with another --out."
            )

    def _end_document(self, source: str | None) -> None:
        """Writes its files, also those that an earlier run may have had no time for."""
        if source is None or self._folder is None:
            return
        name = self._names.name(source)
        paths = write_document(self._path, name, self._journal.of_document(source), self._job.formats, self._say)
        if DOCLING in self._job.formats:
            from granite4v.runtime.extraction.docling_export import write_docling

            paths.append(write_docling(self._path, name, source, self._journal.of_document(source)))
        self._wrote(paths)

    def _end(self) -> None:
        if self._folder is None:
            return
        if self._job.report:
            from granite4v.runtime.extraction.report import write_report

            write_report(self._path / REPORT, self._journal)
            self._wrote([self._path / REPORT])

    def _wrote(self, paths: Sequence[Path]) -> None:
        self.state.n_paths += len(paths)
        self.state.paths += paths[: MAX_PATHS - len(self.state.paths)]

    @property
    def _path(self) -> Path:
        assert self._folder is not None
        return self._folder.path


def check_arguments(
    inputs: Sequence[str],
    formats: Sequence[str],
    *,
    out: str | Path | None,
    resume: bool,
    report: bool,
    max_tokens: int | None,
) -> None:
    """Raises ArgumentError for arguments that contradict each other."""
    if not inputs:
        raise ArgumentError("no input; give pictures, PDFs, folders or globs.")
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise ArgumentError(f"there is no format '{unknown[0]}'; known are {', '.join(FORMATS)}.")
    for given, what in ((resume, "'resume'"), (report, "'report'"), (DOCLING in formats, "the format 'docling'")):
        if given and out is None:
            raise ArgumentError(f"{what} needs a directory for results; give it by 'out' (--out).")
    if max_tokens is not None and max_tokens < 1:
        raise ArgumentError(f"max_tokens is {max_tokens}; expected 1 or more.")
    if DOCLING in formats:
        from granite4v.runtime.extraction.docling_export import check_installed

        check_installed()


def _manifest(
    inputs: Sequence[str],
    asked: Sequence[Question],
    hashes: Mapping[str, str],
    selection: PageSelection,
    settings: Settings,
    n_ctx: int,
) -> dict[str, Any]:
    from importlib.metadata import version

    schemas = [question.schema for question in asked if question.schema is not None]
    return {
        "granite4v": version("granite4v"),
        "inputs": list(inputs),
        "pages": selection.pages,
        "crop": selection.crop,
        "tasks": [question.task for question in asked],
        "prompts": {question.task: question.prompt_sha256 for question in asked},
        "schema": schemas[0].sha256 if schemas else None,
        "model": dict(hashes),
        "settings": {**asdict(settings), "n_ctx": n_ctx},
    }


def _nothing(state: State) -> None:
    pass
