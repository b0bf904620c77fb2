"""Judges whether answers are valid, with third-party code only: jsonschema, docling-core, lxml and csv."""

from __future__ import annotations

import csv
import io
import itertools
import json
import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jsonschema
import lxml.etree  # type: ignore[import-untyped]
import lxml.html  # type: ignore[import-untyped]
from docling_core.types.doc.utils import parse_otsl_table_content

from tests.acceptance.harness import Json
from tests.acceptance.schemas import CELLS


def judge(task: str, text: str, schema: Json | None = None) -> str | None:
    """Returns why a text is not a complete answer to a task, according to `jsonschema`, docling-core, lxml and csv;
    None if it is one."""
    judges: dict[str, Callable[[str], None]] = {
        "kvp": lambda text: check_instance(json.loads(text), schema or {}),
        "tables_otsl": check_otsl,
        "tables_html": check_html,
        "tables_json": check_cells,
        "chart2csv": check_csv,
    }
    try:
        text.encode()  # fails on lone surrogates
        judges[task](text)
    except Exception as error:  # each library has its own exceptions
        return f"{type(error).__name__}: {error}".strip()[:300]
    return None


def has_whole_row(task: str, text: str) -> bool:
    """Whether a cut answer certainly has a complete row to keep."""
    if task == "chart2csv":
        return '"' not in text and not text.startswith("`") and len(re.findall("[^\n]\n", text)) > 1
    return {"tables_otsl": "<nl>", "tables_html": "</tr>"}.get(task, "\0") in text


def check_instance(value: Any, schema: Json) -> None:
    """Raises the errors of `jsonschema`, also for formats."""
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    kind(schema, format_checker=kind.FORMAT_CHECKER).validate(value)


def relaxed(schema: Any) -> Any:
    """Returns the schema without requirements of completeness, so that the rest of a cut instance fits it."""
    if not isinstance(schema, dict):
        return schema
    made: Json = {}
    for key, value in schema.items():
        if key in ("properties", "patternProperties", "$defs", "definitions"):
            made[key] = {name: relaxed(inner) for name, inner in value.items()}
        elif key in ("anyOf", "oneOf"):  # the members that distinguish the alternatives may be missing
            made["anyOf"] = [relaxed(inner) for inner in value]
        elif key in ("allOf", "prefixItems"):
            made[key] = [relaxed(inner) for inner in value]
        elif key in ("items", "additionalProperties"):
            made[key] = relaxed(value)
        elif key not in ("required", "minItems", "minProperties"):
            made[key] = value
    return made


def check_otsl(text: str) -> None:
    """Checks that docling-core reads every table without a warning, and that its cells cover each slot exactly once."""
    for part in _tables(text, "otsl"):
        with _no_warning():
            # its parser takes any '<' for a tag, so other ones are replaced
            data = parse_otsl_table_content(re.sub(r"<(?![a-z/])", "‹", part))
        cells = [
            (cell.start_row_offset_idx, cell.start_col_offset_idx, cell.row_span, cell.col_span)
            for cell in data.table_cells
        ]
        _check_covered(cells, data.num_rows, data.num_cols)


def check_html(text: str) -> None:
    """Checks that the text is well-formed, and that, as lxml parses it, cells cover each section exactly once and all
    sections are as wide as the first."""
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
    """Returns (row, column, rows, columns) of each cell by HTML's table algorithm, and the number of columns."""
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
    """Checks the JSON against its schema, and that cells cover each slot exactly once."""
    found = json.loads(text)
    check_instance(found, CELLS)
    for table in found if isinstance(found, list) else [found]:
        size = table["dimensions"]
        cells = [(c["row"] - 1, c["col"] - 1, c["rowspan"], c["colspan"]) for c in table["cells"]]
        _check_covered(cells, size["total_rows"], size["columns"])
        if size["rows"] + size["header_rows"] != size["total_rows"] != size["rows"]:
            raise ValueError(f"the rows of {size} do not add up")


def check_csv(text: str) -> None:
    """Checks that every row is as wide as the header."""
    inner = re.fullmatch(r"```(?:csv)?\n(.*?)\n```", text, flags=re.DOTALL)
    widths = [len(row) for row in csv.reader(io.StringIO(inner[1] if inner else text, newline=""), strict=True)]
    if not widths or set(widths) != {widths[0]}:
        raise ValueError(f"rows of {widths} fields")


def _tables(text: str, tag: str) -> list[str]:
    """Returns the contents of each table; only brackets and commas may be between them."""
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
    """Turns warnings and logged warnings into errors."""
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
