"""Compares `granite4v extract` on held-out documents in mixed formats with plain questions about the same pages.

    python -m scripts.nano.extract_held_out --documents 20 --model build/nano-f16

Half of the pages are in PDFs of 1 to 20 pages, the others in PNG, JPEG, WebP, BMP and TIFF files. Every record must
parse and be valid for independent programs (docling-core, lxml, csv, `jsonschema`); for an answer that did not end by
itself this applies to the part that was kept. Accuracy is measured as in `evaluate.py`, for the records and for the
answers that `evaluate.py` gets about the same documents. If a file is lossless, both must be the same text. Prints one
Markdown table, then one JSON line; exits with status 1 when a record is invalid or differs. Needs the `dev` extra.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import granite4v
from scripts.nano import formats
from scripts.nano.evaluate import MAX_TOKENS, Question, held_out, runtime, score, table
from scripts.nano.measures import written
from scripts.nano.truth import Form
from tests.acceptance.judges import judge

TASKS: dict[str, tuple[str, ...]] = {
    "table": ("tables_otsl", "tables_html", "tables_json"),
    "chart": ("chart2csv",),
    "form": ("kvp",),
}
PICTURES = ("png", "jpg", "webp", "bmp", "tiff")
LOSSLESS = (".png", ".bmp", ".tiff")
MOST_PAGES = 20


@dataclass(frozen=True)
class Pages:
    """One file, and the questions whose documents are its pages, in order."""

    path: Path
    questions: tuple[Question, ...]


@dataclass
class Seen:
    """Results of all records: questions, answers, answers that `evaluate.py` gets, whether both saw the same pixels.

    `cut`: records that have only the complete part of an answer. `broken`: problems.
    """

    questions: list[Question] = field(default_factory=list)
    read: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)
    lossless: list[bool] = field(default_factory=list)
    n_records: int = 0
    cut: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model directory; by default the embedded one")
    parser.add_argument("--documents", type=int, default=20, help="documents of each of the five groups")
    parser.add_argument("--seed", type=int, default=0, help="of how pages are put into files")
    options = parser.parse_args()
    seen = Seen()
    with tempfile.TemporaryDirectory() as directory, granite4v.load(options.model) as model:
        files = list(write_files(Path(directory), list(held_out(options.documents)), random.Random(options.seed)))
        for number, one in enumerate(files, 1):
            print(f"\r{number} of {len(files)} files", end="", file=sys.stderr, flush=True)
            read_file(model, one, seen)
    print(file=sys.stderr)
    scores = {"extract": score(seen.questions, seen.read), "evaluate": score(seen.questions, seen.expected)}
    print(_table(scores))
    same = [one == other for one, other in zip(seen.read, seen.expected, strict=True)]
    figures = {
        "documents": 5 * options.documents,
        "files": len(files),
        "pdfs": sum(one.path.suffix == ".pdf" for one in files),
        "records": seen.n_records,
        "same_as_evaluate": sum(same),
        "lossless": sum(seen.lossless),
        "lossless_and_same": sum(itertools.compress(same, seen.lossless)),
        "cut": seen.cut,
        "broken": seen.broken,
        "scores": scores,
    }
    print(json.dumps(figures))
    return 1 if seen.broken else 0


def write_files(folder: Path, questions: list[Question], rng: random.Random) -> Iterator[Pages]:
    """Writes tables, charts and forms to separate files, since a run asks one kind of question. Each form gets its own.

    A form has its own schema, which applies to a complete run.
    """
    for kind in TASKS:
        of_kind = [question for question in questions if question.document.kind == kind]
        in_pdfs, alone = of_kind[::2], of_kind[1::2]
        while in_pdfs:
            n = 1 if kind == "form" else rng.randint(1, MOST_PAGES)
            yield _write(folder / f"{kind}-{len(in_pdfs)}.pdf", in_pdfs[:n])
            in_pdfs = in_pdfs[n:]
        for i, question in enumerate(alone):
            yield _write(folder / f"{kind}-{i}.{PICTURES[i % len(PICTURES)]}", [question])


def _write(path: Path, questions: list[Question]) -> Pages:
    first, *others = (question.document.picture for question in questions)
    options: dict[str, Any] = {} if path.suffix in LOSSLESS else {"quality": 95}
    if path.suffix == ".pdf":
        options |= {"save_all": True, "append_images": others, "resolution": 150}
    first.save(path, **options)
    return Pages(path, tuple(questions))


def read_file(model: granite4v.Model, file: Pages, seen: Seen) -> None:
    """Extracts a file, judges its records, and asks about its pages as `evaluate.py` does. Adds all of it to `seen`."""
    truth = file.questions[0].document.truth
    kind = file.questions[0].document.kind
    schema = formats.form_schema(truth) if isinstance(truth, Form) else None
    records = list(granite4v.extract(file.path, TASKS[kind], model=model, schema=schema, max_tokens=MAX_TOKENS))
    expected = [(number, task) for number, _ in enumerate(file.questions, 1) for task in TASKS[kind]]
    found = [(record.page, record.task) for record in records]
    if found != expected:
        seen.broken.append(f"{file.path.name}: {len(found)} records of {len(expected)}")
        return
    ask = runtime(model, free=False)
    seen.n_records += len(records)
    for record in records:
        assert record.page is not None
        question = file.questions[record.page - 1]
        where = f"{file.path.name}, page {record.page}, {record.task}"
        text = record.text
        if record.salvaged:
            seen.cut.append(f"{where}: {record.validity_error}")
            text = written(record.task, record.value)
        problem = record.error or judge(record.task, text, schema)
        if problem or not record.valid:
            seen.broken.append(f"{where}: {problem or 'not valid'}; seed {question.document.seed}: {record.text!r}")
        if record.task in (question.task.strip("<>"), question.task):  # the one that `evaluate.py` asks for
            seen.questions.append(question)
            seen.read.append(text)
            seen.expected.append(ask(question))
            seen.lossless.append(file.path.suffix in LOSSLESS)
            if seen.lossless[-1] and seen.read[-1] != seen.expected[-1]:
                seen.broken.append(f"{where}: {text!r} instead of {seen.expected[-1]!r}")


def _table(scores: dict[str, dict[str, dict[str, float]]]) -> str:
    return table(list(scores), scores)


if __name__ == "__main__":
    sys.exit(main())
