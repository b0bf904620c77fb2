"""A model that the nodes of a Ray cluster load; this process opens only its files."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from granite4v.runtime.engine.trial import try_once
from granite4v.runtime.extract.cluster.asker import RayAsker
from granite4v.runtime.extract.cluster.connection import connected, nodes, shares
from granite4v.runtime.extract.cluster.crew import Crew, Say, divided, on_hosts
from granite4v.runtime.extract.cluster.worker import Assignment, Find, Loaded, versions, worker_options
from granite4v.runtime.extract.options import ExtractOptions
from granite4v.runtime.extract.questions import Question
from granite4v.runtime.llama.files import MAX_COUNT, ModelFiles
from granite4v.runtime.prompt.builder import PromptBuilder
from granite4v.runtime.prompt.spans import Prompt

_PATIENCE_S = 30.0  # how long to wait for the other workers once one is ready
_TOLD_S = 10.0  # without a ready worker, before the user is told what the run waits for


@dataclass(frozen=True)
class OnRay:
    """A model for `extract` that the nodes of the Ray cluster at `address` load (see `connected`).

    `name`: the model as it was given, which `find` resolves on every node. `path`: what it resolves to here.
    """

    address: str
    name: str | Path | None
    path: str | Path
    find: Find


class RayModel:
    """Offers what a run needs of a model in addition to answers. Call `start` before reading `n_ctx`, `settings`,
    `vision_note` or `warnings`."""

    def __init__(self, model: OnRay, options: ExtractOptions) -> None:
        self._model, self._options = model, options
        self.files = ModelFiles.open(model.path, mmproj=options.mmproj)
        self._prompts = PromptBuilder(self.files, MAX_COUNT, lambda report: try_once(self.files, report))
        self._opened = contextlib.ExitStack()
        self._asker: RayAsker | None = None
        self._loaded: Loaded | None = None

    def prepare(self, prompt: str, images: Any) -> Prompt:
        return self._prompts.build(prompt, images, {})

    @property
    def n_ctx(self) -> int:
        return self._first.n_ctx

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the first worker that was ready."""
        return self._first.settings

    @property
    def vision_note(self) -> str | None:
        return self._first.vision_note

    @property
    def warnings(self) -> list[str]:
        return self._first.warnings

    @property
    def _first(self) -> Loaded:
        assert self._loaded is not None
        return self._loaded

    def start(
        self, questions: tuple[Question, ...], hashes: Mapping[str, str], n_questions: int | None, say: Say
    ) -> RayAsker:
        """Connects to the cluster and waits until its workers have loaded the model (see `_wait_for`). Raises
        DeviceError, and what loading a model raises."""
        ray = self._opened.enter_context(connected(self._model.address))
        options = worker_options(self._options)
        there = nodes(ray)
        n_workers = sum(len(shares(node, options.n_threads, options.device)) for node in there)
        name, find = _name(self._model), self._model.find
        assignment = Assignment(name, find, hashes, questions, options, n_questions, versions())
        crew = Crew(ray, divided(assignment, n_workers), say)
        self._opened.callback(crew.close)
        _wait_for(crew, say)
        self._loaded = crew.loaded
        say(f"reading with {on_hosts(crew.hands)}")
        return RayAsker(ray, crew, questions, hashes, say, drafting=options.drafting, n_questions=n_questions)

    def close(self) -> None:
        self._opened.close()
        self._prompts.close()
        self.files.close()

    def __enter__(self) -> RayModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _name(model: OnRay) -> str | Path | None:
    """Returns the name for the nodes, which have another current folder: an existing path is made absolute."""
    if model.name is not None and Path(model.name).exists():
        return Path(model.name).absolute()
    return model.name


def _wait_for(crew: Crew, say: Say) -> None:
    """Waits until all workers are ready, or until one is and the others take longer than `_PATIENCE_S`, since their
    nodes may be busy."""
    news = threading.Event()
    crew.wake = news.set
    began, ready_at, is_told = time.monotonic(), None, False
    while ready_at is None or time.monotonic() - ready_at < _PATIENCE_S:
        crew.look()
        crew.take()
        n_ready = sum(hand.loaded is not None for hand in crew.hands)
        if n_ready and n_ready == len(crew.hands):
            return
        if n_ready and ready_at is None:
            ready_at = time.monotonic()
        if not is_told and not n_ready and time.monotonic() - began > _TOLD_S:
            is_told = True
            say("waiting for a node of the Ray cluster with free cores to load the model ...")
        news.wait(0.5)
        news.clear()
