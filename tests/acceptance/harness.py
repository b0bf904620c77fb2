"""Shared by the checks: options, a model with random weights, child processes, and how a check ends.

A check reports on stderr. Its last line on stdout is one JSON object; the exit status is 1 if a promise was broken.
Needs the extra `dev`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors.numpy import load_file, save_file

from granite4v.converter import Options, convert
from tests.toy.checkpoint import PRESETS, write_checkpoint

Json = dict[str, Any]
T = TypeVar("T")
MARKS = tuple('<>/",}\u010a')  # the last one is how byte-level tokenizers spell a line break
LOUDNESS = 2.0

FORM: Json = {
    "type": "object",
    "properties": {
        "title": {"type": ["string", "null"], "maxLength": 30},
        "date": {"type": ["string", "null"], "maxLength": 12},
        "paid": {"type": "boolean"},
        "amounts": {"type": "array", "items": {"type": "number"}, "maxItems": 3},
    },
    "required": ["title", "date", "paid", "amounts"],
}


@dataclass
class Result:
    """The result of a check: `figures` for the JSON line, `lines` for people, and the `broken` promises, in words."""

    check: str
    figures: Json = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def print(self) -> int:
        """Prints lines to stderr and JSON to stdout; returns the exit status."""
        for line in [*self.lines, *(f"broken: {text}" for text in self.broken), *([] if self.broken else ["ok"])]:
            print(f"{self.check}: {line}", file=sys.stderr)
        print(json.dumps({"check": self.check, "ok": not self.broken, **self.figures, "broken": self.broken}))
        return 1 if self.broken else 0


def options_parser(doc: str, max_tokens: int) -> argparse.ArgumentParser:
    """Returns a parser with the options of every check; `doc` is the docstring of its module."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model directory; by default one of random weights is made")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0, help="of pages, moments and answers (0)")
    parser.add_argument("--work", type=Path, help="a directory that does not exist yet, kept; else a temporary one")
    parser.add_argument("--max-tokens", type=int, default=max_tokens, help=f"of an answer ({max_tokens})")
    return parser


def run_check(
    check: Callable[[argparse.Namespace, Path], Result], options: argparse.Namespace, kind: str = "F32"
) -> int:
    """Runs a check in its working directory, with a model converted to type `kind` unless one is given; returns the
    exit status."""
    with tempfile.TemporaryDirectory(prefix="acceptance-") as directory:
        work = options.work or Path(directory)
        work.mkdir(parents=True, exist_ok=options.work is None)
        options.model = model_directory(options.model, work, kind)
        return check(options, work).print()


def tell(text: str) -> None:
    """Prints progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def model_directory(given: Path | None, work: Path, kind: str = "F32") -> Path:
    """Returns the given directory, or makes a tiny model with random weights; in F32 it answers one question at a time.

    Random weights hardly ever write a mark that ends a cell or an answer. Therefore the head's rows for tokens that
    begin with one are scaled up, so that answers come to an end.
    """
    if given is not None:
        return given
    checkpoint = write_checkpoint(work / "checkpoint", replace(PRESETS["tiny"], tied=False))
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {**tokenizer["model"]["vocab"], **{one["content"]: one["id"] for one in tokenizer["added_tokens"]}}
    weights = load_file(checkpoint / "model.safetensors")
    head = weights["lm_head.weight"]
    usual = np.median(head.std(axis=1))
    for i in (i for text, i in ids.items() if text.startswith(MARKS)):
        head[i] *= LOUDNESS * usual / head[i].std()
    for bracket in "[]":  # an empty list is a valid answer, too, but must not be the only one
        head[ids[bracket]] = head[ids["<"]]
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    convert(checkpoint, work / "model", Options(text_type=kind, vision_type=kind))
    return work / "model"


def in_new_process(function: Callable[..., T], *arguments: Any) -> T:
    """Calls a module-level function in a new interpreter, whose memory holds nothing else, and returns its result."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def records_of(path: Path) -> Iterator[Json]:
    """Yields the records of a `results.jsonl`, parsed without our code; a last line without a line break is skipped."""
    if path.exists():
        with path.open("rb") as file:
            yield from (json.loads(line) for line in file if line.endswith(b"\n"))


def ratio(one: float, other: float) -> float | None:
    """Returns the ratio, rounded to four digits; None if `other` is 0."""
    return round(one / other, 4) if other else None
