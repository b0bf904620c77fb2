"""Validates the options of a run before any model is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from typing import Any

from granite4v.choices import whole_number
from granite4v.errors import ArgumentError
from granite4v.runtime.documents import parse_crop, parse_pages
from granite4v.runtime.extract.document_files import (
    FORMATS,
    applies,
    check_formats_installed,
    needs_folder,
    suffixes,
)
from granite4v.runtime.extract.options import ExtractOptions
from granite4v.runtime.extract.questions import check_tasks

# suffixes of file names that are given to '--out' by mistake; an existing directory with such a name is accepted
_FILE_SUFFIXES = (
    ".csv", ".doc", ".docx", ".gguf", ".htm", ".html", ".json", ".jsonl", ".jpeg", ".jpg", ".md", ".ndjson", ".otsl",
    ".parquet", ".pdf", ".png", ".py", ".sqlite", ".tif", ".tiff", ".tsv", ".txt", ".webp", ".xls", ".xlsx", ".xml",
    ".zip",
)  # fmt: skip


def checked(inputs: Any, options: ExtractOptions) -> tuple[tuple[str, ...], ExtractOptions]:
    """Returns the paths of `inputs` and the normalized options: `tasks` and `formats` as tuples of names, each task
    once.

    Raises ArgumentError for contradictory or invalid options, SelectionError for invalid pages or an invalid crop.
    """
    for name in ("prompt", "pages", "password"):
        value = getattr(options, name)
        if value is not None and not isinstance(value, str):
            raise ArgumentError(f"{name} is {value!r:.60}; expected text.")
    for field in fields(ExtractOptions):
        value = getattr(options, field.name)
        if isinstance(field.default, bool) and not isinstance(value, bool):
            raise ArgumentError(f"{field.name} is {value!r:.60}; expected True or False.")
    paths = _as_paths(inputs)
    if not paths:
        raise ArgumentError("no input; give images, PDFs, folders or globs.")
    tasks = check_tasks(as_names("'tasks'", options.tasks), options.prompt, has_schema=options.schema is not None)
    formats = as_names("'formats'", options.formats)
    check_formats(formats, tasks)
    _check_combinations(replace(options, tasks=tasks, formats=formats))
    if options.out is not None:
        check_out(options.out)
    if options.pages is not None:
        parse_pages(options.pages)
    return paths, replace(
        options,
        tasks=tasks,
        formats=formats,
        max_tokens=_at_least_one("max_tokens", options.max_tokens),
        parallel=_at_least_one("parallel", options.parallel),
        crop=None if options.crop is None else str(parse_crop(options.crop)),
    )


def _as_paths(inputs: Any) -> tuple[str, ...]:
    """Returns the inputs as text; a single input may be given without a list."""
    single = isinstance(inputs, str | bytes | os.PathLike)
    paths = [inputs] if single else list(inputs) if isinstance(inputs, Iterable) else [inputs]
    for path in paths:
        if not isinstance(path, str | os.PathLike):
            raise ArgumentError(f"an input is {path!r:.60}; expected a path, as text or a Path, or a list of paths.")
    return tuple(os.fsdecode(path) for path in paths)


def as_names(what: str, given: Any) -> tuple[Any, ...]:
    """Returns the names as a tuple; a single name may be given without a list. Raises ArgumentError for anything that
    is not text."""
    names = [given] if isinstance(given, str) or not isinstance(given, Iterable) else list(given)
    for name in names:
        if not isinstance(name, str):
            raise ArgumentError(f"{what} holds {name!r:.60}; expected names, as text.")
    return tuple(names)


def check_formats(formats: Sequence[str], tasks: Sequence[str]) -> None:
    """Raises ArgumentError for a format that is unknown or applies to none of the tasks, and Granite4vError for one
    whose extra is not installed."""
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise ArgumentError(f"there is no format '{unknown[0]}'; known are {', '.join(FORMATS)}.")
    idle = [name for name in formats if not applies(name, tasks)]
    if idle:
        raise ArgumentError(
            f"the format '{idle[0]}' is for tables and chart data, which {', '.join(tasks)} "
            f"{'do' if len(tasks) > 1 else 'does'} not give; drop --format {idle[0]}, or add a task such as "
            "tables_html."
        )
    check_formats_installed(formats)


def _check_combinations(options: ExtractOptions) -> None:
    needing = (
        (options.resume, "'resume'"),
        (options.report, "'report'"),
        (options.csv_safe, "'csv_safe'"),
        *((needs_folder(name, options.tasks), f"the format '{name}'") for name in options.formats),
    )
    for given, what in needing:
        if given and options.out is None:
            raise ArgumentError(f"{what} needs a directory for results; give it by 'out' (--out).")
    if options.retry_failed and not options.resume:
        raise ArgumentError("'retry_failed' applies only when resuming a run; add 'resume' (--resume).")
    check_csv_safe(options.csv_safe, options.tasks, options.formats)


def check_csv_safe(csv_safe: bool, tasks: Sequence[str], formats: Sequence[str]) -> None:
    """Raises ArgumentError for `csv_safe` if no CSV is written."""
    if csv_safe and "csv" not in formats and not any("csv" in suffixes(task, formats) for task in tasks):
        raise ArgumentError(
            "'csv_safe' applies to CSV files, but none are requested; add 'csv' to the formats (--format)."
        )


def _at_least_one(name: str, given: Any) -> int | None:
    if given is None:
        return None
    try:
        return whole_number(name, given, 1)
    except (TypeError, ValueError) as error:
        raise ArgumentError(str(error)) from None


def check_out(out: Any) -> None:
    """Raises ArgumentError for anything but a directory or a path at which one can be created."""
    if not isinstance(out, str | os.PathLike):
        raise ArgumentError(f"'out' is {out!r:.60}; expected a directory, as text or a Path.")
    text = os.fspath(out)
    if text in ("", "-"):
        raise ArgumentError(
            f"'out' (--out) is '{text}'; expected a directory. To print records, leave it out and add --json."
        )
    if "\0" in text:
        raise ArgumentError(
            "'out' (--out) contains a null character, which a path cannot contain; expected a directory."
        )
    if os.path.isdir(text):
        return
    if os.path.lexists(text):
        raise ArgumentError(
            f"'out' (--out) is '{text}', which is not a directory; give a directory, or one that does not exist yet."
        )
    if text.lower().endswith(_FILE_SUFFIXES):
        raise ArgumentError(
            f"'out' (--out) is '{text}', which looks like a file; expected a directory, in which records are "
            "written to 'results.jsonl', next to the other files. To print records, leave it out and add --json; "
            "for a directory with this name, create it first."
        )
