"""Answers held to a form, judged by other people's programs; part of `stress_extract.py`.

Answers are made in a process of its own, so that one that hangs or dies is seen and the next ones still come. What is
made of an answer there (its value, and that written again) is judged here with none of our code.
"""

from __future__ import annotations

import argparse
import csv
import functools
import io
import itertools
import json
import logging
import multiprocessing
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.acceptance.stress_batch import Json, Result, draw_page, tell
from tests.acceptance.stress_reading import ask_for
from tests.acceptance.stress_schemas import CELLS, SCHEMAS

if TYPE_CHECKING:
    from granite4v.runtime import Model
    from granite4v.runtime.grammar.grammar import Grammar
    from granite4v.runtime.grammar.grammar_state import Compiler

TASKS = ("kvp", "tables_otsl", "kvp", "tables_html", "kvp", "tables_json", "kvp", "chart2csv")  # in turn
WRITTEN = {"tables_otsl": "otsl", "tables_html": "html", "tables_json": "json", "chart2csv": "csv"}
GENERATIONS_A_PAGE = 25
SPARE = 2  # tokens that are kept besides those of a whole answer
START_S = 600.0  # for a model to be loaded


@dataclass(frozen=True)
class Case:
    """One generation; the same number and seed are the same case."""

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
    """What became of a case. `closing`: the end of `text` that only makes it whole. `n_least`: the tokens of a short
    whole answer. `written`: the value that was kept, in the form of its task; None when there is none."""

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
    """Every second one has few tokens, so that it is cut."""
    task, rng = TASKS[number % len(TASKS)], random.Random(f"{seed} {number}")
    schema = list(SCHEMAS)[number // 2 % len(SCHEMAS)] if task == "kvp" else None
    n_tokens = rng.randint(1, min(60, most)) if rng.random() < 0.5 else most
    return Case(number, task, schema, rng.getrandbits(31), n_tokens, rng.random() < 0.5, seed)


def forms(options: argparse.Namespace, _: Path) -> Result:
    tallies: dict[str, Counter[str]] = {task: Counter() for task in sorted(set(TASKS))}
    problems: list[str] = []
    slowest = (0.0, "")
    with Talker((options.model, options.temperature, options.threads)) as talker:
        for i in range(options.generations):
            case = case_of(options.first + i, options.seed, options.max_tokens)
            said = talker.ask(case, options.timeout)
            kind, problem = verdict(case, said)
            tallies[case.task].update([kind, "n"], n_tokens=said.n_tokens)
            slowest = max(slowest, (said.seconds, str(case)))
            if options.show or problem:
                tell(f"{case}: {kind}, {said.finish_reason}, {said.n_tokens} tokens\n  {said.text!r}")
            if problem:
                repeat = f"--seed {options.seed} --max-tokens {options.max_tokens} --first {case.number}"
                problems.append(f"{case}: {problem}; again with forms {repeat} --generations 1")
            elif (i + 1) % 50 == 0:
                tell(f"{i + 1} of {options.generations} generations, {len(problems)} broken promises")
    figures: Json = {
        "generations": options.generations,
        "schemas": len(SCHEMAS),
        "tasks": {task: _summary(tally) for task, tally in tallies.items() if tally},
        "all": _summary(sum(tallies.values(), Counter())),
        "slowest_s": round(slowest[0], 2),
    }
    lines = [_line(task, one) for task, one in {**figures["tasks"], "all": figures["all"]}.items()]
    return Result("forms", figures, [*lines, f"slowest: {slowest[0]:.1f} s, {slowest[1]}"], problems)


KINDS = ("finished", "closed", "repetition", "cut", "broken")


def _summary(tally: Counter[str]) -> Json:
    """How many of each kind; `valid` are those whose text is a whole answer, and those that ended as repetition with a
    valid value kept."""
    kinds = {kind: tally[kind] for kind in KINDS}
    valid = sum(tally[kind] for kind in ("finished", "closed", "repetition"))
    return {"n": tally["n"], **kinds, "valid": valid, "tokens": tally["n_tokens"]}


def _line(task: str, one: Json) -> str:
    return (
        f"{task:<12} {one['n']:>5}: {one['finished']} finished and {one['closed']} brought to an end at their limit, "
        f"all valid; {one['repetition']} ended as repetition with a valid value kept; {one['cut']} cut, with fewer "
        f"tokens than the shortest whole answer found; {one['broken']} broken"
    )


def verdict(case: Case, said: Said) -> tuple[str, str | None]:
    """Of which of `KINDS` an answer is, and which promise it breaks."""
    problem = said.error or _broken(case, said)
    if problem:
        return "broken", problem
    if said.finish_reason == "stop":
        return "finished", None
    if said.finish_reason == "repetition":
        return ("repetition" if said.written is not None else "cut"), None
    return ("cut" if said.closing is None else "closed"), None


def _broken(case: Case, said: Said) -> str | None:
    if said.n_tokens > case.max_tokens:
        return f"the answer has {said.n_tokens} tokens"
    if said.finish_reason not in ("stop", "length", "repetition"):
        return f"the answer ended as '{said.finish_reason}'"
    schema = SCHEMAS[case.schema] if case.schema else None
    if said.finish_reason == "stop":
        problem = judge(case.task, said.text, schema)
        if problem:
            return f"a finished answer is not valid: {problem}"
        return None if said.valid else "a valid answer is taken for one that is not"
    if said.finish_reason == "length" and said.closing is None and case.max_tokens >= said.n_least + SPARE:
        return f"the answer was cut at {case.max_tokens} tokens, and a whole one has {said.n_least}"
    if said.closing is not None:
        problem = judge(case.task, said.text, schema)
        if problem:
            return f"an answer that was brought to an end is not valid: {problem}; {said.text!r:.200}"
    if said.written is None:
        own = said.text.removesuffix(said.closing or "")
        return "whole rows were lost" if has_whole_row(case.task, own) else None
    problem = judge(case.task, said.written, None if schema is None else relaxed(schema))
    return f"what was kept of a cut answer is not valid: {problem}; {said.written!r:.200}" if problem else None


# --- a process that answers ---


class Talker:
    """Asks for one answer at a time; a process that takes too long is killed, and the next question gets a new one."""

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
    """Loads the model, then answers case after case."""
    import faulthandler

    import granite4v

    faulthandler.enable()
    with granite4v.load(model, n_threads=threads) as loaded:
        pipe.send("ready")
        while True:
            case = pipe.recv()
            try:
                pipe.send(_said(loaded, temperature, case))
            except Exception as error:  # whatever it is, it is what the check looks for
                pipe.send(Said(error=f"{type(error).__name__}: {error}"))


def _said(model: Model, temperature: float, case: Case) -> Said:
    from granite4v.runtime.extract.reader import understand

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
    reading = understand(case.task, own_text, answer.finish_reason, question.schema)
    seconds = answer.timings.decode_s + answer.timings.constraint_s
    written = None if reading.value is None else _written(case.task, reading.value)
    n_least = _shortest(model, question.constraint)
    n_tokens, valid = len(answer.tokens), reading.valid
    return Said(answer.text, answer.closing, answer.finish_reason, n_tokens, n_least, seconds, written, valid)


@functools.cache
def _compiler(model: Model) -> Compiler:
    from granite4v.runtime.grammar.grammar_state import Compiler

    tokenizer = model.engine.tokenizer()
    return Compiler(tokenizer, len(tokenizer.vocabulary().pieces), model.engine.stop_tokens)


def _shortest(model: Model, grammar: Grammar | None) -> int:
    """The tokens of an answer that says as little as it can."""
    assert grammar is not None
    ending = _compiler(model).begin(grammar).ending(100_000)
    assert ending is not None
    return len(ending)


def _written(task: str, value: Any) -> str:
    from granite4v.runtime.formats import write

    return json.dumps(value) if task == "kvp" else write(value, WRITTEN[task])


# --- judges ---


def judge(task: str, text: str, schema: Json | None = None) -> str | None:
    """Why a text is no whole answer to a task, by `jsonschema`, docling-core, lxml and csv; None when it is one."""
    judges: dict[str, Callable[[str], None]] = {
        "kvp": lambda text: check_instance(json.loads(text), schema or {}),
        "tables_otsl": check_otsl,
        "tables_html": check_html,
        "tables_json": check_cells,
        "chart2csv": check_csv,
    }
    try:
        text.encode()  # no half of a character
        judges[task](text)
    except Exception as error:  # of libraries that all have their own
        return f"{type(error).__name__}: {error}".strip()[:300]
    return None


def has_whole_row(task: str, text: str) -> bool:
    """Whether a cut answer certainly has a row to keep."""
    if task == "chart2csv":
        return '"' not in text and not text.startswith("`") and len(re.findall("[^\n]\n", text)) > 1
    return {"tables_otsl": "<nl>", "tables_html": "</tr>"}.get(task, "\0") in text


def check_instance(value: Any, schema: Json) -> None:
    """Raises what `jsonschema` raises, for formats too."""
    import jsonschema

    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    kind(schema, format_checker=kind.FORMAT_CHECKER).validate(value)


def relaxed(schema: Any) -> Any:
    """The schema without the demand that all be there: what is left of an instance that was cut fits it."""
    if not isinstance(schema, dict):
        return schema
    made: Json = {}
    for key, value in schema.items():
        if key in ("properties", "patternProperties", "$defs", "definitions"):
            made[key] = {name: relaxed(inner) for name, inner in value.items()}
        elif key in ("anyOf", "oneOf"):  # what tells alternatives apart may be missing
            made["anyOf"] = [relaxed(inner) for inner in value]
        elif key in ("allOf", "prefixItems"):
            made[key] = [relaxed(inner) for inner in value]
        elif key in ("items", "additionalProperties"):
            made[key] = relaxed(value)
        elif key not in ("required", "minItems", "minProperties"):
            made[key] = value
    return made


def check_otsl(text: str) -> None:
    """docling-core reads every table without a warning, and its cells cover each slot once."""
    from docling_core.types.doc.utils import parse_otsl_table_content

    for part in _tables(text, "otsl"):
        with _no_warning():
            # its parser takes any '<' for a tag, so text gets another sign
            data = parse_otsl_table_content(re.sub(r"<(?![a-z/])", "‹", part))
        cells = [
            (cell.start_row_offset_idx, cell.start_col_offset_idx, cell.row_span, cell.col_span)
            for cell in data.table_cells
        ]
        _check_covered(cells, data.num_rows, data.num_cols)


def check_html(text: str) -> None:
    """Well-formed, and to lxml each section is covered once, all as wide as the first."""
    import lxml.etree  # type: ignore[import-untyped]
    import lxml.html  # type: ignore[import-untyped]

    for part in _tables(text, "table"):
        plain = re.sub(r"<(?![a-zA-Z/])", "&lt;", re.sub(r"<br/?>", "<br/>", part.replace("&", "&amp;")))
        lxml.etree.fromstring(f"<table>{plain}</table>")
        table = lxml.html.fromstring(f"<table>{part}</table>")
        sections = [[row for row in table if row.tag == "tr"], *([*one] for one in table if one.tag != "tr")]
        n_cols = None
        for rows in filter(None, sections):
            cells, width = _html_cells(rows)
            n_cols = n_cols or width
            _check_covered(cells, len(rows), n_cols)
        if n_cols is None:
            raise ValueError("a table without rows")


def _html_cells(rows: list[Any]) -> tuple[list[tuple[int, int, int, int]], int]:
    """(row, column, rows, columns) of each cell, by HTML's way of forming a table, and how many columns there are."""
    cells: list[tuple[int, int, int, int]] = []
    taken: set[tuple[int, int]] = set()
    for i, row in enumerate(rows):
        j = 0
        for cell in row:
            while (i, j) in taken:
                j += 1
            down, right = int(cell.get("rowspan", 1)), int(cell.get("colspan", 1))
            cells.append((i, j, down, right))
            taken.update(itertools.product(range(i, i + down), range(j, j + right)))
    return cells, 1 + max((j for _, j in taken), default=-1)


def check_cells(text: str) -> None:
    """JSON as its schema says, and cells that cover each slot once."""
    found = json.loads(text)
    check_instance(found, CELLS)
    for table in found if isinstance(found, list) else [found]:
        size = table["dimensions"]
        cells = [(c["row"] - 1, c["col"] - 1, c["rowspan"], c["colspan"]) for c in table["cells"]]
        _check_covered(cells, size["total_rows"], size["columns"])
        if size["rows"] + size["header_rows"] != size["total_rows"] != size["rows"]:
            raise ValueError(f"the rows of {size} do not add up")


def check_csv(text: str) -> None:
    """Every row as wide as the header."""
    inner = re.fullmatch(r"```(?:csv)?\n(.*?)\n```", text, flags=re.DOTALL)
    widths = [len(row) for row in csv.reader(io.StringIO(inner[1] if inner else text, newline=""), strict=True)]
    if not widths or set(widths) != {widths[0]}:
        raise ValueError(f"rows of {widths} fields")


def _tables(text: str, tag: str) -> list[str]:
    """What is inside each table; nothing but brackets and commas stands between them."""
    pattern = rf"<{tag}>(.*?)</{tag}>"
    rest = re.sub(pattern, "", text, flags=re.DOTALL)
    if rest.strip(" ,\n[]") or (not rest.strip(" ,\n") and f"<{tag}>" not in text):
        raise ValueError(f"{rest!r:.60} stands outside of tables")
    return re.findall(pattern, text, flags=re.DOTALL)


def _check_covered(cells: list[tuple[int, int, int, int]], n_rows: int, n_cols: int) -> None:
    covered: Counter[tuple[int, int]] = Counter()
    for row, column, down, right in cells:
        covered.update(itertools.product(range(row, row + down), range(column, column + right)))
    wrong = [slot for slot, n in covered.items() if n > 1 or slot[0] >= n_rows or slot[1] >= n_cols]
    if wrong or len(covered) != n_rows * n_cols:
        raise ValueError(f"{n_rows} x {n_cols} slots, {len(covered)} of them covered, wrongly {wrong[:3]}")


@contextmanager
def _no_warning() -> Iterator[None]:
    """Turns warnings into errors, and what is logged as one too."""
    heard: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        logging.getLogger().removeHandler(handler)
    if heard:
        raise ValueError(heard[0])
