"""Extracts held-out documents with many answers at once, one by one, and without drafting, and compares the records.

    python -m scripts.same_values --documents 100

The documents are those of scripts/compare_records.py: tables, charts and forms of the five held-out groups in PDFs,
TIFFs and images, each asked for every task that fits it. A form's schema is also used on its neighbours, so that its
answer is not the only one of a call. The embedded model in F16 reads them with `extract`'s own settings ('default'),
with one answer at a time ('one by one'), and with 'no drafting'. All fields of the records except timings are compared,
and the tokens.

Without drafting nothing may differ. One by one, an answer may differ if the logits of the two tokens at the first
difference are so close that another number of rows in a step can swap them: each logit moves by at most `--rounding`
(docs/benchmarks.md), so they must be less than twice that apart. Every such record is shown. Exits with status 1 for
any other difference. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import granite4v
from granite4v.clip_projector import ImageSource
from granite4v.default_model import embedded_model
from granite4v.runtime.answer import Answer
from granite4v.runtime.documents import Page, open_pages
from granite4v.runtime.engine.parallel import Workload
from granite4v.runtime.engine.stream import Stream
from granite4v.runtime.extract.questions import questions
from granite4v.runtime.extract.schema import load_schema
from granite4v.runtime.model import Model
from granite4v.runtime.prompt.spans import Prompt
from scripts.compare_records import (
    ASKED,
    GROUPS,
    DrawnFile,
    Job,
    compare,
    draw_files,
    jobs,
    read_records,
)
from scripts.nano.evaluate import MAX_TOKENS, held_out

N_FORMS = 4  # forms in one call, all asked for the fields of the first
DEFAULT, ONE_BY_ONE, NO_DRAFTING = "default", "one by one", "no drafting"
Json = dict[str, Any]
Tokens = dict[tuple[str, str], list[int]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of how pages are put into files")
    parser.add_argument("--parallel", type=int, help="answers at once (what extract chooses)")
    parser.add_argument("--rounding", type=float, default=0.05, help="of a logit of F16 files (0.05)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, help="keep documents and results in this directory")
    options = parser.parse_args()
    ways: dict[str, Json] = {
        DEFAULT: {"parallel": options.parallel},
        ONE_BY_ONE: {"parallel": 1},
        NO_DRAFTING: {"parallel": options.parallel, "drafting": False},
    }
    with tempfile.TemporaryDirectory() as directory:
        work = (options.work or Path(directory)).absolute()
        documents = list(held_out(-(-options.documents // GROUPS)))
        files = draw_files(work / "documents", documents, random.Random(options.seed))
        calls = {name: list(asked(files, work / name)) for name in ways}
        told, sides = {}, {}
        for name, way in ways.items():
            told[name], tokens = run(name, calls[name], way, options.threads)
            sides[name] = Side(read_records(work / name), tokens)
        with granite4v.load(n_threads=options.threads, device="cpu", n_parallel=1) as model:
            schemas = {Path(job.out).name: job.schema for job in calls[DEFAULT]}
            found = {name: differing(model, schemas, sides[DEFAULT], sides[name]) for name in (ONE_BY_ONE, NO_DRAFTING)}
    problems = judge(found, options.rounding)
    for one in itertools.chain.from_iterable(side["different"] for side in found.values()):
        print(json.dumps(one, ensure_ascii=False), file=sys.stderr)
    for problem in problems:
        print(f"broken: {problem}", file=sys.stderr)
    counts = {"documents": len(documents), "files": len(files), "rounding": options.rounding}
    print(json.dumps({**counts, "ways": told, **found, "broken": problems}))
    return 1 if problems else 0


def asked(files: Sequence[DrawnFile], folder: Path) -> Iterator[Job]:
    """Yields the calls of `extract`: those of compare_records.py, with more pages in addition to each form."""
    forms = [file for file in files if file.schema is not None]
    yield from jobs([file for file in files if file.schema is None], folder)
    for i, form in enumerate(forms):
        some = [str(forms[(i + j) % len(forms)].path) for j in range(min(N_FORMS, len(forms)))]
        tasks = next(tasks for kind, tasks, _ in ASKED if kind == form.kind)
        yield Job(some, list(tasks), MAX_TOKENS, str(folder / form.path.stem), form.schema)


class Recorded:
    """Wraps a model and records the tokens of all its answers, by (digest of the page, text of the prompt)."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._answers: dict[tuple[str, str], Answer] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def submit(self, prompt: Prompt, *arguments: Any, **fields: Any) -> Stream:
        stream = self._model.submit(prompt, *arguments, **fields)
        self._answers[prompt.images[0].digest.hex(), prompt.text] = stream.answer
        return stream

    @property
    def tokens(self) -> dict[tuple[str, str], list[int]]:
        return {key: answer.tokens for key, answer in self._answers.items()}


def run(name: str, todo: Sequence[Job], way: Json, n_threads: int) -> tuple[Json, Tokens]:
    """Makes the calls. Returns the number of answers at once and the token and step counts, and all answers' tokens."""
    total: Json = dict.fromkeys(("n_generated", "n_drafted", "n_accepted"), 0)
    path = embedded_model(lambda line: print(line, file=sys.stderr))
    parallel = way.get("parallel")
    with Model.load(path, n_threads=n_threads, device="cpu", n_parallel=parallel, workload=Workload()) as model:
        recorded = Recorded(model)
        for i, job in enumerate(todo, 1):
            arguments: Json = {"schema": job.schema, "max_tokens": job.max_tokens, "out": job.out, **way}
            records = list(granite4v.extract(job.files, job.tasks, model=cast(Model, recorded), **arguments))
            for record, key in itertools.product(records, total):
                total[key] += record.timings.get(key, 0)
            print(f"{name}: {i} of {len(todo)} calls, {len(records)} records", file=sys.stderr, flush=True)
        return {"n_parallel": model.n_parallel, "steps": model.counters.n_steps, **total}, recorded.tokens


@dataclass(frozen=True)
class Side:
    """The records of one way, by name, and the tokens of all its answers."""

    records: dict[str, Json]
    tokens: Tokens


def differing(model: Model, schemas: dict[str, Json | None], base: Side, other: Side) -> Json:
    """Compares two ways. Adds to every differing record the two tokens at the first difference of its answers.

    `schemas`: the schema of each call, by the name of its directory.
    """
    found = asdict(compare(base.records, other.records))
    for one in found["different"]:
        record = base.records[one["record"]]
        one.update(parting(model, record, schemas[one["record"].split()[0]], base.tokens, other.tokens))
    found["other_tokens"] = sum(tokens != other.tokens.get(key) for key, tokens in base.tokens.items())
    return found


def parting(model: Model, record: Json, schema: Json | None, one: Tokens, other: Tokens) -> Json:
    """Returns the first tokens that differ, their logits, and the gap between the two best logits; {} if all agree."""
    image = page_of(model, record)
    prompt = model.prepare(prompt_of(model, record["task"], schema), [image])
    key = prompt.images[0].digest.hex(), prompt.text
    mine, theirs = one[key], other[key]
    if mine == theirs:
        return {}
    n = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(mine, theirs, strict=False)))
    pair = [tokens[n] if n < len(tokens) else min(model.prompts.stop_tokens) for tokens in (mine, theirs)]
    logits = model.score(prompt, tokens=[*mine[:n], pair[0]])[n]
    best = sorted(map(float, logits))[-2:]
    return {
        "token": n,
        "tokens": [model.prompts.tokenizer().decode([token]) for token in pair],
        "logits": [round(float(logits[token]), 4) for token in pair],
        "apart": round(abs(float(logits[pair[0]] - logits[pair[1]])), 5),
        "two_best_apart": round(best[1] - best[0], 5),
    }


def prompt_of(model: Model, task: str, schema: Json | None) -> str:
    """Returns the prompt that `extract` uses."""
    loaded = None if schema is None else load_schema(schema, lambda _: None)
    return questions(model, [task], None, loaded, unconstrained=False)[0].prompt


def page_of(model: Model, record: Json) -> ImageSource:
    """Returns the pixels that were read. Raises SystemExit when the page cannot be read again."""
    for item in open_pages([record["source"]], pages=str(record["page"]), view=model.files.vision_config):
        if isinstance(item, Page):
            return item.image
    raise SystemExit(f"page {record['page']} of '{record['source']}' cannot be read again")


def judge(sides: dict[str, Json], rounding: float) -> list[str]:
    """Returns the differences that are not allowed, as messages."""
    problems = []
    for name, side in sides.items():
        if not side["n_records"] or side["missing"]:
            problems.append(f"{name}: {side['n_records']} records, {len(side['missing'])} in one run only")
        strict = name == NO_DRAFTING
        for one in side["different"]:
            apart = one.get("apart")
            if strict or apart is None or apart >= 2 * rounding:
                problems.append(f"{name}: {one['record']} differs in {', '.join(one['fields'])}, logits {apart} apart")
        if strict and side["other_tokens"]:
            problems.append(f"{name}: {side['other_tokens']} answers have other tokens")
    return problems


if __name__ == "__main__":
    sys.exit(main())
