"""The worker that runs on a node: loads the model there and answers questions about pages."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import PIL.Image

from granite4v.clip_projector.images import Image
from granite4v.errors import DeviceError, ModelFileError
from granite4v.ggml.cpu import default_threads
from granite4v.runtime.documents import Page
from granite4v.runtime.engine.parallel import Workload
from granite4v.runtime.extract.asking import ModelAsker
from granite4v.runtime.extract.options import ExtractOptions
from granite4v.runtime.extract.questions import Question
from granite4v.runtime.extract.record import Record
from granite4v.runtime.llama.files import ModelFiles
from granite4v.runtime.llama.fingerprint import model_hashes
from granite4v.runtime.model import Model

Find = Callable[["str | Path | None", Callable[[str], None]], "str | Path"]


@dataclass(frozen=True)
class Assignment:
    """What every worker of a run gets. `name`: the model as it was given, which `find` resolves on each node;
    `hashes`: SHA-256 of its files by role, which must be the same there. `n_questions`: for one worker; None if
    unknown. `versions`: of the packages that decide what answers say, which must be the same there, too."""

    name: str | Path | None
    find: Find
    hashes: Mapping[str, str]
    questions: tuple[Question, ...]
    options: ExtractOptions
    n_questions: int | None
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Loaded:
    """What a worker reports about its model once it is loaded."""

    n_ctx: int
    n_parallel: int
    settings: dict[str, Any]
    vision_note: str | None
    warnings: list[str]


@dataclass(frozen=True)
class PageFields:
    """A page without its pixels, which are sent once for all questions about it."""

    source: str
    number: int
    n_pages: int
    dpi: float | None
    warnings: tuple[str, ...]
    file_state: str | None
    digest: str

    @classmethod
    def of(cls, page: Page) -> PageFields:
        return cls(page.source, page.number, page.n_pages, page.dpi, page.warnings, page.file_state, page.digest)

    def page(self, pixels: Any) -> Page:
        """Returns the page with its pixels: uint8 (height, width, 3)."""
        image = Image(PIL.Image.fromarray(pixels), bytes.fromhex(self.digest))
        return Page(self.source, self.number, self.n_pages, image, self.dpi, self.warnings, self.file_state)


class Worker:
    """A Ray actor. Its methods are coroutines in one thread, so several answers can be awaited at the same time."""

    def __init__(self, n_cpus: int) -> None:
        """`n_cpus`: the cores that Ray has reserved for this worker."""
        self._n_cpus = n_cpus
        self._asker: ModelAsker | None = None
        self._assignment: Assignment | None = None

    async def load(self, assignment: Assignment) -> Loaded:
        """Loads the model. Raises DeviceError if packages on this node have other versions than those of the process
        that started the run, ModelFileError if its model files differ, and what finding or loading a model raises."""
        _check_versions(assignment.versions, versions())
        options = assignment.options
        path = assignment.find(assignment.name, _nothing)
        with ModelFiles.open(path, mmproj=options.mmproj) as files:
            _check_same(assignment.hashes, model_hashes(files, _nothing), files)
        model = Model.load(
            path,
            n_ctx=options.n_ctx,
            n_threads=min(self._n_cpus, default_threads()),
            device=options.device,
            mmproj=options.mmproj,
            vision_compute=options.vision_compute,
            cache_type=options.cache_type,
            page_store=options.page_store,
            n_parallel=options.parallel,
            workload=Workload(assignment.n_questions, options.max_tokens),
        )
        self._assignment = assignment
        self._asker = ModelAsker(model, assignment.hashes, options, model.n_parallel)
        return Loaded(model.n_ctx, model.n_parallel, model.settings, model.vision_note, model.warnings)

    async def read(self, fields: PageFields, pixels: Any, i_question: int) -> Record:
        """Returns the record of one question about a page. Raises ModelFileError and DeviceError, which end the run."""
        assert self._asker is not None and self._assignment is not None
        loop, news = asyncio.get_running_loop(), asyncio.Event()
        asked = self._asker.question(fields.page(pixels), self._assignment.questions[i_question])
        record = asked.ask(progress=None, listener=lambda: _wake(loop, news))
        while record is None:
            await news.wait()
            news.clear()
            record = asked.poll()
        return record

    async def forget(self, digest: str) -> None:
        if self._asker is not None:
            self._asker.forget(digest)


def worker_options(options: ExtractOptions) -> ExtractOptions:
    """Returns the options without those that workers do not need, in a form that can be sent."""
    return replace(options, schema=None, out=None, password=None, formats=(), crop=None, pages=None)


def versions() -> dict[str, str]:
    """Versions of the packages that decide what answers say."""
    return {name: version(name) for name in ("granite4v", "llama-cpp-python")}


def _check_versions(wanted: Mapping[str, str], found: Mapping[str, str]) -> None:
    for name, there in wanted.items():
        if found.get(name) != there:
            raise DeviceError(
                f"{name} {found.get(name)} is installed here, but {there} where the run was started; install the same "
                "version on every node."
            )


def _check_same(wanted: Mapping[str, str], found: Mapping[str, str], files: ModelFiles) -> None:
    paths = {"text": files.text, "vision": files.vision, "adapter": files.adapter}
    for role in {**wanted, **found}:
        here, there = wanted.get(role), found.get(role)
        if here != there:
            file = paths[role]
            path = files.text.path.parent if file is None else file.path
            raise ModelFileError(
                f"'{path}' is another {role} file than that of the process which started the run (SHA-256 "
                f"{_short(there)}, there {_short(here)}); put the same model on every node."
            )


def _short(digest: str | None) -> str:
    return "none" if digest is None else f"{digest[:12]}..."


def _wake(loop: asyncio.AbstractEventLoop, news: asyncio.Event) -> None:
    loop.call_soon_threadsafe(news.set)


def _nothing(line: str) -> None:
    pass
