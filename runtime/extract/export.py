"""Writes the files of a results folder in other formats, from its records alone: no page is read again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

from granite4v.choices import Format
from granite4v.errors import OutputError
from granite4v.runtime.extract.arguments import as_names, check_csv_safe, check_formats, check_out
from granite4v.runtime.extract.document_files import Form, Written, remove_stale, write_document, write_fields
from granite4v.runtime.extract.names import Names
from granite4v.runtime.extract.output_directory import OutputDirectory
from granite4v.runtime.extract.results_log import ResultsLog

Say = Callable[[str], None]


def export_results(
    folder: str | Path,
    formats: Sequence[Format] | Format = (),
    *,
    out: str | Path | None = None,
    csv_safe: bool = False,
    say: Say | None = None,
) -> Written:
    """Writes what `extract` would have written with these formats, and returns the paths of the files.

    `folder`: the directory that 'granite4v extract' was given by --out. `formats`: of `document_files.FORMATS`; by
    default the format that each task answers in. `out`: another directory, which is new, empty or from an earlier
    export; by default the files go next to the records. Outdated files in these formats are removed. `say`: called with
    messages about what a format cannot represent and about files that cannot be written.

    Raises ArgumentError for a format that is unknown or applies to no task of the results; Granite4vError for one whose
    extra is not installed; OutputError for a folder without results, for one that a run is writing to (unless `out` is
    another), and for a full disk.
    """
    names = as_names("'formats'", formats)
    say = say or (lambda message: None)
    if out is not None:
        check_out(out)
    target = OutputDirectory.claim_for_export(Path(folder if out is None else out), Path(folder))
    try:
        with ResultsLog.open_to_read(Path(folder)) as log:
            if not log.tasks():
                raise OutputError(f"'{folder}' holds no records yet; 'granite4v extract ... --resume' goes on with it.")
            if log.is_torn:
                say(
                    "the last line of its records is incomplete and left out: a run is writing it, or was "
                    "interrupted; 'granite4v extract ... --resume' completes it."
                )
            check_formats(names, log.tasks())
            check_csv_safe(csv_safe, log.tasks(), names)
            target.keep()
            return _write(target.path, log, Form(names, csv_safe, alone=bool(names)), say)
    finally:
        target.release()


def _write(root: Path, log: ResultsLog, form: Form, say: Say) -> Written:
    written = write_fields(root, lambda: log, log.tasks(), form, say)
    stems = Names(known=log.sources())
    for source in log.sources():
        stem = stems.stem(source)
        of_document = write_document(root, stem, source, functools.partial(log.of_document, source), form, say)
        with of_document.one_file(f"an older file of '{source}' is not removed", say):
            remove_stale(root, stem, of_document.paths, form.formats)
        written.paths += of_document.paths
        written.n_failed += of_document.n_failed
    return written
