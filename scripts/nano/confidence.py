"""Measures whether cells and fields that the model is unsure of are wrong more often, on held-out documents.

    python -m scripts.nano.confidence --documents 40

Every cell or field of an answer has a lowest and a mean token probability (`granite4v.confidence`); it is wrong if it
differs from the document. Prints a Markdown table of how often cells are wrong, overall and in the least certain tenth
by either figure, then one JSON line. Ties are split in the order of the answers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import granite4v
from granite4v.runtime.formats import Table, places, read
from granite4v.runtime.formats.task_grammar import grammar_for
from scripts.nano import formats
from scripts.nano.evaluate import GROUPS, MAX_TOKENS, Question, held_out
from scripts.nano.truth import Form

FIGURES = ("least", "mean")


@dataclass(frozen=True)
class Judged:
    """A cell or field of an answer, with its confidence and whether it is wrong."""

    group: str
    least: float
    mean: float
    is_wrong: bool


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model directory; by default the embedded model")
    parser.add_argument("--documents", type=int, default=40, help="documents of each group")
    parser.add_argument("--groups", default=",".join(GROUPS), help="groups of documents")
    options = parser.parse_args()
    groups = options.groups.split(",")
    found: list[Judged] = []
    with granite4v.load(*filter(None, [options.model])) as model:
        for question in held_out(options.documents):
            if question.group in groups:
                found += judged(model, question)
                print(f"\r{len(found)} cells and fields", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    rows = {group: shares([one for one in found if one.group == group]) for group in groups} | {"all": shares(found)}
    print("| documents | cells and fields | wrong | in the least certain tenth, by least | by mean |")
    print("|---|---|---|---|---|")
    for group, row in rows.items():
        tenths = " | ".join(f"{row[figure]:.1%} ({times(row, figure)})" for figure in FIGURES)
        print(f"| {group} | {row['n']:,} | {row['wrong']:.1%} | {tenths} |")
    print(json.dumps(rows))
    return 0


def times(row: dict[str, Any], figure: str) -> str:
    return f"{row[figure] / row['wrong']:.1f} times" if row["wrong"] else "none is wrong"


def shares(found: list[Judged]) -> dict[str, Any]:
    """Returns the share of wrong ones overall, and in the least certain tenth by each figure."""
    n = len(found)
    row: dict[str, Any] = {"n": n, "wrong": sum(one.is_wrong for one in found) / n}
    for figure in FIGURES:
        tenth = sorted(found, key=lambda one: getattr(one, figure))[: max(1, n // 10)]
        row[figure] = sum(one.is_wrong for one in tenth) / len(tenth)
    return row


def judged(model: granite4v.Model, question: Question) -> Iterator[Judged]:
    truth, task = question.document.truth, question.task.strip("<>")
    answer = model.generate(
        question.prompt,
        [question.document.picture],
        max_tokens=MAX_TOKENS,
        constraint=grammar_for(question.task, formats.form_schema(truth) if isinstance(truth, Form) else None),
        logprobs=0,
    )
    if answer.finish_reason != "stop":
        return
    expected = formats.answer_for(f"<{task}>", truth)
    right, said = (texts(task, read(task, text), text) for text in (expected, answer.text))
    for key, confidence in granite4v.confidence(answer, task).items():
        yield Judged(question.group, confidence.least, confidence.mean, said[key] != right.get(key))


def texts(task: str, value: Any, text: str) -> dict[Any, Any]:
    """Returns the text of each cell or field, with the spans of a cell."""
    if task != "kvp":
        tables = [value] if isinstance(value, Table) else value
        return {
            (number, cell.row, cell.col): (cell.text, cell.rowspan, cell.colspan)
            for number, table in enumerate(tables)
            for cell in table.cells
        }
    return {place.key: value[str(place.key)[1:]] for place in places(task, text, value)}


if __name__ == "__main__":
    sys.exit(main())
