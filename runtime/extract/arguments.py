"""Arguments of a run that contradict each other, found before any model is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from granite4v.choices import whole_number
from granite4v.runtime.extract.document_files import DOCLING, FORMATS, applies, suffixes
from granite4v.runtime.extract.questions import ArgumentError

# suffixes of files that people take '--out' for; a directory of such a name is used when it is there already
_FILE_SUFFIXES = (
    ".csv", ".doc", ".docx", ".gguf", ".htm", ".html", ".json", ".jsonl", ".jpeg", ".jpg", ".md", ".ndjson", ".otsl",
    ".parquet", ".pdf", ".png", ".py", ".sqlite", ".tif", ".tiff", ".tsv", ".txt", ".webp", ".xls", ".xlsx", ".xml",
    ".zip",
)  # fmt: skip


def as_paths(inputs: Any) -> list[str]:
    """The inputs as text; a single one may be given without a list. Raises ArgumentError."""
    single = isinstance(inputs, str | bytes | os.PathLike)
    paths = [inputs] if single else list(inputs) if isinstance(inputs, Iterable) else [inputs]
    for path in paths:
        if not isinstance(path, str | os.PathLike):
            raise ArgumentError(f"an input is {path!r:.60}; expected a path, as text or a Path, or a list of such.")
    return [os.fsdecode(path) for path in paths]


def as_texts(name: str, given: Any) -> list[str]:
    """Names as a list; a single one may be given without a list. Raises ArgumentError."""
    texts = [given] if isinstance(given, str) or not isinstance(given, Iterable) else list(given)
    for text in texts:
        if not isinstance(text, str):
            raise ArgumentError(f"{name} holds {text!r:.60}; expected names, as text.")
    return texts


def check_texts(**given: Any) -> None:
    """Raises ArgumentError for what is neither text nor None."""
    for name, value in given.items():
        if value is not None and not isinstance(value, str):
            raise ArgumentError(f"{name} is {value!r:.60}; expected text.")


def check_arguments(
    inputs: Sequence[str],
    tasks: Sequence[str],
    formats: Sequence[str],
    *,
    out: str | Path | None,
    resume: bool = False,
    report: bool = False,
    max_tokens: int | None = None,
    csv_safe: bool = False,
    retry_failed: bool = False,
) -> None:
    """Raises ArgumentError for arguments that contradict each other. `tasks`: as `check_tasks` returns them."""
    if not inputs:
        raise ArgumentError("no input; give images, PDFs, folders or globs.")
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise ArgumentError(f"there is no format '{unknown[0]}'; known are {', '.join(FORMATS)}.")
    idle = [name for name in formats if not applies(name, tasks)]
    if idle:
        raise ArgumentError(
            f"the format '{idle[0]}' is for tables and chart data, which {', '.join(tasks)} "
            f"{'do' if len(tasks) > 1 else 'does'} not give; leave --format {idle[0]} out, or add a task such as "
            "tables_html."
        )
    needing = (
        (resume, "'resume'"),
        (report, "'report'"),
        (csv_safe, "'csv_safe'"),
        (DOCLING in formats, "the format 'docling'"),
    )
    for given, what in needing:
        if given and out is None:
            raise ArgumentError(f"{what} needs a directory for results; give it by 'out' (--out).")
    if retry_failed and not resume:
        raise ArgumentError("'retry_failed' is for a run that is resumed; add 'resume' (--resume).")
    if csv_safe and not any("csv" in suffixes(task, formats) for task in tasks):
        raise ArgumentError("'csv_safe' is for CSV files, and none are asked for; add 'csv' to the formats (--format).")
    if out is not None:
        if not isinstance(out, str | os.PathLike):
            raise ArgumentError(f"'out' is {out!r:.60}; expected a directory, as text or a Path.")
        _check_out(out)
    if max_tokens is not None:
        try:
            whole_number("max_tokens", max_tokens, 1)
        except (TypeError, ValueError) as error:
            raise ArgumentError(str(error)) from None
    if DOCLING in formats:
        from granite4v.runtime.extract.docling_export import check_installed

        check_installed()


def _check_out(out: str | Path) -> None:
    text = os.fspath(out)
    if text in ("", "-"):
        raise ArgumentError(
            f"'out' (--out) is '{text}'; expected a directory. To print records, leave it out and add --json."
        )
    if "\0" in text:
        raise ArgumentError("'out' (--out) holds a character that no name can have; expected a directory.")
    if os.path.isdir(text):
        return
    if os.path.lexists(text):
        raise ArgumentError(
            f"'out' (--out) is '{text}', which is not a directory; give a directory, or one that does not exist yet."
        )
    if text.lower().endswith(_FILE_SUFFIXES):
        raise ArgumentError(
            f"'out' (--out) is '{text}', which looks like a file; expected a directory, in which records go to "
            "'results.jsonl' and other files beside it. To print records, leave it out and add --json; for a directory "
            "of this name, make it first."
        )
