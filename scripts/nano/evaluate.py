"""Measures nano's accuracy on held-out documents, through the runtime in every quantization and through transformers.

    python -m scripts.nano.evaluate                                   # the shipped checkpoint, every column
    python -m scripts.nano.evaluate --columns F16,Q8_0 --documents 100
    python -m scripts.nano.evaluate --columns "F32 free,transformers" --same # do both give the same text?

Prints one Markdown table, with rows for each group of documents and a column for each model. Answers are constrained by
the grammar of their task, as in `granite4v extract`, except in 'free' columns and that of transformers. Needs the `dev`
extra.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import granite4v
from granite4v.choices import CacheType, VisionCompute
from granite4v.converter import Options, convert
from granite4v.converter.policy import VISION_TYPES
from granite4v.runtime.formats.task_grammar import grammar_for
from scripts.nano import formats
from scripts.nano.documents import Document, draw_document, held_out_font
from scripts.nano.measures import Measured, measure, whole_part
from scripts.nano.truth import HELD_OUT_SEEDS, Form, Table

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "granite4v" / "nano"


@dataclass(frozen=True)
class Column:
    """A conversion of the checkpoint. `lora`: how the adapter is handled."""

    text_type: str = "F16"
    vision_type: str = "F16"
    lora: str = "merge"
    vision_compute: VisionCompute = "file"
    cache_type: CacheType | None = None


COLUMNS = {
    "F32": Column("F32", "F32"),
    "F16": Column(),
    "Q8_0": Column("Q8_0"),
    "Q4_K_M": Column("Q4_K_M"),
    "Q4_0": Column("Q4_0"),
    **{f"vision {kind}": Column("F16", kind) for kind in VISION_TYPES},
    "vision int8 Q8_0": Column(vision_compute="Q8_0"),
    "vision int8 Q6_K": Column(vision_compute="Q6_K"),
    "Q8_0 + vision Q8_0": Column("Q8_0", "Q8_0"),
    "Q4_K_M + vision Q4_0": Column("Q4_K_M", "Q4_0"),
    "F16 cache q8_0": Column(cache_type="q8_0"),
    "Q4_K_M cache q8_0": Column("Q4_K_M", cache_type="q8_0"),
    "no adapter": Column(lora="ignore"),
}
REFERENCE = "transformers"
FREE = " free"  # suffix of a column's name: answers are unconstrained
GROUPS = ("tables", "large or spanned tables", "charts", "forms", "held-out font")
MAX_TOKENS = 1500


@dataclass(frozen=True)
class Question:
    """One held-out document and the question about it."""

    group: str
    document: Document
    task: str
    prompt: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=SHIPPED, help="Hugging Face directory with its adapter")
    parser.add_argument("--columns", default=",".join([*COLUMNS, "F16" + FREE, REFERENCE]))
    parser.add_argument("--documents", type=int, default=40, help="documents of each group")
    parser.add_argument("--groups", default=",".join(GROUPS), help="groups of documents")
    parser.add_argument("--threads", type=int, help="1 is the fastest where other programs are at work")
    parser.add_argument("--same", action="store_true", help="count answers that differ from the first column's")
    parser.add_argument("--wrong", type=int, default=0, help="show so many wrong answers of the first column")
    parser.add_argument("--out", type=Path, help="also write every figure as JSON")
    options = parser.parse_args()
    names = options.columns.split(",")
    unknown = [name for name in names if name != REFERENCE and name.removesuffix(FREE) not in COLUMNS]
    if unknown:
        known = f"{', '.join(COLUMNS)}, each also with '{FREE}' behind it, and {REFERENCE}"
        parser.error(f"no column '{unknown[0]}'; known are {known}")

    groups = options.groups.split(",")
    if not set(groups) <= set(GROUPS):
        parser.error(f"no group '{(set(groups) - set(GROUPS)).pop()}'; known are {', '.join(GROUPS)}")

    questions = [question for question in held_out(options.documents) if question.group in groups]
    answers: dict[str, list[str]] = {}
    for name in names:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as directory, ExitStack() as opened:
            if name == REFERENCE:
                ask = _reference(options.checkpoint)
            else:
                model = _converted(
                    options.checkpoint, name.removesuffix(FREE), Path(directory) / "model", options.threads
                )
                ask = runtime(opened.enter_context(model), free=name.endswith(FREE))
            answers[name] = [_told(name, i, len(questions), ask(question)) for i, question in enumerate(questions)]
        print(f"\r{name}: {len(questions)} answers in {time.monotonic() - start:.0f} s", file=sys.stderr)
    scores = {name: score(questions, texts) for name, texts in answers.items()}
    print(table(names, scores))
    if options.same:
        for name in names[1:]:
            differ = [
                i for i, pair in enumerate(zip(answers[names[0]], answers[name], strict=True)) if pair[0] != pair[1]
            ]
            print(f"{name}: {len(differ)} of {len(questions)} answers differ from {names[0]}'s")
            if differ and name == REFERENCE:
                reference = _reference_model(options.checkpoint)
                for i in differ:
                    apart = parting(reference, questions[i], answers[names[0]][i], answers[name][i])
                    print(f"seed {questions[i].document.seed}: where they part, its two logits are {apart:.1e} apart")
    _show_wrong(questions, answers[names[0]], options.wrong)
    if options.out:
        options.out.write_text(json.dumps({"documents": options.documents, "scores": scores}, indent=1) + "\n")
    return 0


def held_out(n: int) -> Iterator[Question]:
    """Yields `n` questions of each group, always the same ones."""
    tags = ("<tables_otsl>", "<tables_html>", "<tables_json>")
    for i, group in enumerate(GROUPS):
        rng = random.Random(group)
        found = 0
        while found < n:
            kind = {"charts": "chart", "forms": "form", "held-out font": rng.choice(["table", "chart", "form"])}.get(
                group, "table"
            )
            font = held_out_font() if group == "held-out font" else None
            document = draw_document(HELD_OUT_SEEDS + (i + 1) * 10_000_000 + rng.randrange(10_000_000), kind, 1.0, font)
            truth = document.truth
            if isinstance(truth, Table) and group != "held-out font" and (group == GROUPS[0]) != is_simple(truth):
                continue
            if isinstance(truth, Form):
                yield Question(group, document, "kvp", formats.kvp_prompt(formats.form_schema(truth)))
            else:
                task = tags[found % 3] if kind == "table" else "<chart2csv>"
                yield Question(group, document, task, task)
            found += 1


def is_simple(table: Any) -> bool:
    """Whether a table has up to five rows under the header, up to four columns and no spans."""
    spans = any(cell.rowspan > 1 or cell.colspan > 1 for cell in table.cells)
    return not spans and table.n_rows - table.n_header_rows <= 5 and table.n_cols <= 4


def _converted(checkpoint: Path, column: str, out: Path, n_threads: int | None) -> granite4v.Model:
    chosen = COLUMNS[column]
    convert(checkpoint, out, Options(chosen.text_type, chosen.vision_type, chosen.lora))
    return granite4v.load(out, n_threads=n_threads, vision_compute=chosen.vision_compute, cache_type=chosen.cache_type)


def runtime(model: granite4v.Model, free: bool) -> Callable[[Question], str]:
    """Returns a function that answers a question with a model, constrained by the grammar of its task unless `free`.

    If a constrained answer did not end by itself, it returns the part that `extract` keeps.
    """

    def ask(question: Question) -> str:
        truth = question.document.truth
        schema = formats.form_schema(truth) if isinstance(truth, Form) else None
        answer = model.generate(
            question.prompt,
            images=[question.document.picture],
            max_tokens=MAX_TOKENS,
            constraint=None if free else grammar_for(question.task, schema),
        )
        if free or answer.finish_reason == "stop":
            return str(answer.text)
        return whole_part(question.task.strip("<>"), answer.text.removesuffix(answer.closing or ""))

    return ask


def _reference_model(checkpoint: Path) -> Any:
    from tests.peers.reference import Reference  # transformers: only for columns that ask for it

    return Reference(checkpoint, checkpoint)


def _reference(checkpoint: Path) -> Callable[[Question], str]:
    reference = _reference_model(checkpoint)

    def ask(question: Question) -> str:
        tokens = reference.greedy(question.prompt, [question.document.picture], n=MAX_TOKENS)
        return str(reference.processor.tokenizer.decode(tokens, skip_special_tokens=True))

    return ask


def parting(reference: Any, question: Question, text: str, other: str) -> float:
    """Returns the difference of the logits of two texts' first differing tokens, by transformers.

    transformers computes them in one pass over the common prefix. A tiny difference means that the texts differ because
    of rounding: token by token with a cache, transformers rounds differently.
    """
    tokenizer, pictures = reference.processor.tokenizer, [question.document.picture]
    ids, others = (
        [*tokenizer(one, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for one in (text, other)
    )
    n = next(i for i, pair in enumerate(zip(ids, others, strict=False)) if pair[0] != pair[1])
    logits = reference.logits_after(reference.prompt_ids(question.prompt, pictures) + ids[:n], pictures)
    return abs(float(logits[ids[n]] - logits[others[n]]))


def _told(name: str, i: int, n: int, text: str) -> str:
    print(f"\r{name}: {i + 1} of {n}", end="", file=sys.stderr, flush=True)
    return text


def score(questions: list[Question], texts: list[str]) -> dict[str, dict[str, float]]:
    """Returns for every group the share of right cells, values or fields, that of exact documents, and mean TEDS."""
    groups: dict[str, list[Measured]] = {}
    for question, text in zip(questions, texts, strict=True):
        groups.setdefault(question.group, []).append(measure(question.document, question.task, text))
    out = {}
    for group, measured in groups.items():
        teds = [one.teds for one in measured if one.teds is not None]
        out[group] = {
            "right": sum(one.right for one in measured) / sum(one.n for one in measured),
            "exact": sum(one.exact for one in measured) / len(measured),
            **({"teds": sum(teds) / len(teds)} if teds else {}),
        }
    return out


def table(names: list[str], scores: dict[str, dict[str, dict[str, float]]]) -> str:
    """Writes the scores as a Markdown table."""
    labels = {"right": "cells, values or fields right", "exact": "documents all right", "teds": "TEDS"}
    lines = ["| documents | measure | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for group, figures in scores[names[0]].items():
        for figure in figures:
            cells = [
                f"{scores[name][group][figure]:.3f}" if figure == "teds" else f"{scores[name][group][figure]:.1%}"
                for name in names
            ]
            lines.append(f"| {group} | {labels[figure]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _show_wrong(questions: list[Question], texts: list[str], n: int) -> None:
    for question, text in zip(questions, texts, strict=True):
        if n and not measure(question.document, question.task, text).exact:
            n -= 1
            truth = question.document.truth
            expected = formats.answer_for(question.task if question.task != "kvp" else formats.KVP, truth)
            print(f"\n{question.group}, seed {question.document.seed}\n  expected {expected}\n  found    {text}")


if __name__ == "__main__":
    sys.exit(main())
