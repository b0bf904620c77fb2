"""A child process that loads a model and answers one case after another, so that hangs and crashes are detected."""

from __future__ import annotations

import faulthandler
import functools
import json
import multiprocessing
import random
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import granite4v
from granite4v.runtime import Model
from granite4v.runtime.extract.parsed_answer import parse_answer
from granite4v.runtime.extract.questions import Question, questions
from granite4v.runtime.extract.schema import load_schema
from granite4v.runtime.formats import write
from granite4v.runtime.grammar.grammar import Grammar
from granite4v.runtime.grammar.grammar_state import Compiler
from tests.acceptance.harness import Json
from tests.acceptance.pages import draw_page
from tests.acceptance.schemas import SCHEMAS

TASKS = ("kvp", "tables_otsl", "kvp", "tables_html", "kvp", "tables_json", "kvp", "chart2csv")  # in turn
WRITTEN = {"tables_otsl": "otsl", "tables_html": "html", "tables_json": "json", "chart2csv": "csv"}
GENERATIONS_A_PAGE = 25
START_S = 600.0  # timeout for loading a model


@dataclass(frozen=True)
class Case:
    """One generation. The same number and seed give the same case."""

    number: int
    task: str
    schema: str | None
    seed: int
    max_tokens: int
    fast_forward: bool
    page_seed: int = 0

    def __str__(self) -> str:
        what = f"{self.task} ({self.schema})" if self.schema else self.task
        return f"generation {self.number}, {what}, at most {self.max_tokens} tokens"


@dataclass(frozen=True)
class Said:
    """The result of a case. `closing`: the suffix of `text` that was added to complete it. `n_least`: the number of
    tokens of a minimal complete answer. `written`: the value that was kept, in the format of its task; None without
    one."""

    text: str = ""
    closing: str | None = None
    finish_reason: str = ""
    n_tokens: int = 0
    n_least: int = 0
    seconds: float = 0.0
    written: str | None = None
    valid: bool = False
    error: str = ""


def case_of(number: int, seed: int, most: int) -> Case:
    """Returns a case. About half of them have few tokens, so that their answers are cut."""
    task, rng = TASKS[number % len(TASKS)], random.Random(f"{seed} {number}")
    schema = list(SCHEMAS)[number // 2 % len(SCHEMAS)] if task == "kvp" else None
    n_tokens = rng.randint(1, min(60, most)) if rng.random() < 0.5 else most
    return Case(number, task, schema, rng.getrandbits(31), n_tokens, rng.random() < 0.5, seed)


class Talker:
    """Asks for one answer at a time. A process that takes too long is killed, and the next case gets a new one."""

    def __init__(self, arguments: tuple[Any, ...], serve: Callable[..., None] | None = None) -> None:
        self._arguments, self._serve = arguments, serve or answer_cases
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None

    def ask(self, case: Case, timeout_s: float) -> Said:
        if self._process is None:
            self._start()
        assert self._pipe is not None
        try:
            self._pipe.send(case)
            if self._pipe.poll(timeout_s):
                found: Said = self._pipe.recv()
                return found
            error = f"no answer after {timeout_s:g} s"
        except (EOFError, OSError):
            assert self._process is not None
            self._process.join(timeout_s)
            error = f"the process died with status {self._process.exitcode}"
        self.close()
        return Said(error=error)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=self._serve, args=(theirs, *self._arguments), daemon=True)
        self._process.start()
        theirs.close()
        if not self._pipe.poll(START_S):
            raise SystemExit(f"the model is not loaded after {START_S:g} s")
        self._pipe.recv()

    def close(self) -> None:
        if self._process is not None and self._pipe is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
        self._process = self._pipe = None

    def __enter__(self) -> Talker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def answer_cases(pipe: Connection, model: Path, temperature: float, threads: int) -> None:
    """Loads the model, then answers one case after another."""
    faulthandler.enable()
    with granite4v.load(model, n_threads=threads) as loaded:
        pipe.send("ready")
        while True:
            case = pipe.recv()
            try:
                pipe.send(_said(loaded, temperature, case))
            except Exception as error:  # whatever it is, the check is looking for it
                pipe.send(Said(error=f"{type(error).__name__}: {error}"))


def _said(model: Model, temperature: float, case: Case) -> Said:
    picture = draw_page(case.number // GENERATIONS_A_PAGE, case.page_seed).picture
    question = ask_for(model, case.task, SCHEMAS[case.schema] if case.schema else None)
    answer = model.generate(
        question.prompt,
        [picture],
        max_tokens=case.max_tokens,
        temperature=temperature,
        seed=case.seed,
        constraint=question.constraint,
        fast_forward=case.fast_forward,
    )
    own_text = answer.text.removesuffix(answer.closing or "")
    reading = parse_answer(case.task, own_text, answer.finish_reason, question.schema)
    seconds = answer.timings.decode_s + answer.timings.constraint_s
    written = None if reading.value is None else _written(case.task, reading.value)
    n_least = _shortest(model, question.constraint)
    n_tokens, valid = len(answer.tokens), reading.valid
    return Said(answer.text, answer.closing, answer.finish_reason, n_tokens, n_least, seconds, written, valid)


@functools.cache
def _compiler(model: Model) -> Compiler:
    tokenizer = model.prompts.tokenizer()
    return Compiler(tokenizer, len(tokenizer.vocabulary().pieces), model.prompts.stop_tokens)


def _shortest(model: Model, grammar: Grammar | None) -> int:
    """Returns the number of tokens of a minimal complete answer."""
    assert grammar is not None
    ending = _compiler(model).begin(grammar).ending(100_000)
    assert ending is not None
    return len(ending)


def _written(task: str, value: Any) -> str:
    return json.dumps(value) if task == "kvp" else write(value, WRITTEN[task])


def ask_for(model: Model, task: str, schema: Json | None) -> Question:
    """Returns the question that `granite4v extract` would ask."""
    found = None if schema is None else load_schema(schema)
    return questions(model, (task,), None, found, unconstrained=False)[0]
