"""Draws a table, a chart and a form with new random values, has granite4v read them, and prints both side by side.

    python -m scripts.nano.show build/demo [--seed N] [--model DIR]

All images are written to one directory. Each is read by the ordinary `granite4v extract` command.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shlex
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path

from rich.console import Console
from rich.table import Table

from granite4v.runtime.formats import AnswerError, read
from scripts.nano import formats
from scripts.nano.documents import Document, Truth, draw_document
from scripts.nano.truth import HELD_OUT_SEEDS, Chart, Form

Line = tuple[str, str]  # name of a value, the value
FONT = "Aileron"  # Pillow's own, so that no font package is needed
LEVEL = 0.5  # of the generator's full range: cleaner paper, shorter texts
TASKS = {"table": "tables_html", "chart": "chart2csv", "form": "kvp"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory for the pictures")
    parser.add_argument("--seed", type=int, help="the same documents again")
    parser.add_argument("--model", help="another model than the embedded one")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**9)
    options.out.mkdir(parents=True, exist_ok=True)
    status = 0
    for kind in TASKS:
        status |= show(kind, seed, options.out, ["--model", options.model] if options.model else [])
    print(f"\nThe same documents again: --seed {seed}", file=sys.stderr)
    return status


def show(kind: str, seed: int, out: Path, model: list[str]) -> int:
    """Draws one document, has it read, and prints both. Returns the command's exit status."""
    document = draw_document(HELD_OUT_SEEDS + seed, kind, LEVEL, FONT)
    path = out / f"{kind}.png"
    document.picture.save(path)
    asked = [str(path), "--task", TASKS[kind]]
    if isinstance(document.truth, Form):
        schema = out / "form.schema.json"
        schema.write_text(json.dumps(formats.form_schema(document.truth), indent=1) + "\n", encoding="utf-8")
        asked += ["--schema", str(schema)]
    print(f"\n$ granite4v extract {shlex.join(asked)}", flush=True)
    command = [sys.executable, "-m", "granite4v", "extract", *asked, *model]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        return result.returncode
    _print_beside(document, result.stdout.strip())
    return 0


def _print_beside(document: Document, answer: str) -> None:
    drawn, read = lines(document.truth), read_lines(document.truth, answer)
    table = Table("", "drawn", "read", "")
    for (name, expected), (found_name, found) in zip_longest(drawn, read, fillvalue=("", "")):
        same = (name, expected) == (found_name, found)
        table.add_row(name or found_name, expected, found, "=" if same else "differs")
    right = sum(pair[0] == pair[1] for pair in zip(drawn, read, strict=False))
    console = Console()
    console.print(table)
    console.print(f"{right} of {len(drawn)} lines read as they were drawn")


def lines(truth: Truth) -> list[Line]:
    """Returns the truth as named lines: a row of a table, a value of a chart, a field of a form."""
    if isinstance(truth, Form):
        return [(name, "(not there)" if value is None else value) for name, value in truth.fields]
    if isinstance(truth, Chart):
        return [
            (f"{label}, {series}", value)
            for label, values in zip(truth.labels, truth.values, strict=True)
            for series, value in zip(truth.series, values, strict=True)
        ]
    return _rows([[cell.text for cell in truth.cells if cell.row == i] for i in range(truth.n_rows)])


def read_lines(truth: Truth, answer: str) -> list[Line]:
    """Returns an answer as the same kind of lines; an answer that does not parse is one line."""
    try:
        if isinstance(truth, Form):
            fields = json.loads(answer)
            return [(name, "(not there)" if value is None else str(value)) for name, value in fields.items()]
        if isinstance(truth, Chart):
            header, *rows = csv.reader(answer.splitlines())
            return [
                (f"{row[0]}, {series}", value)
                for row in rows
                for series, value in zip(header[1:], row[1:], strict=True)
            ]
        (table,) = read("tables_html", answer)
        return _rows([[cell.text for cell in table.cells if cell.row == i] for i in range(table.n_rows)])
    except (AnswerError, ValueError, AttributeError):
        return [("", answer)]


def _rows(rows: list[list[str]]) -> list[Line]:
    return [(f"row {i}", " | ".join(row)) for i, row in enumerate(rows, 1)]


if __name__ == "__main__":
    sys.exit(main())
