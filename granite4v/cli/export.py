"""`granite4v export`: writes the results in a folder in other formats."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from granite4v.cli import options
from granite4v.cli.extract_output import list_paths, tell
from granite4v.cli.progress import Progress, plural
from granite4v.errors import ArgumentError

if TYPE_CHECKING:
    from granite4v.choices import Format

EXIT_FAILURE = 1

ResultsArgument = Annotated[
    Path, typer.Argument(metavar="DIR", help="Results folder: what 'granite4v extract' was given by --out.")
]
ExportOutOption = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o", metavar="DIR", help="Another directory for the files.", show_default="the folder itself"
    ),
]


def export(
    *,
    folder: ResultsArgument,
    formats: options.FormatsOption = None,
    out: ExportOutOption = None,
    csv_safe: options.CsvSafeOption = False,
) -> None:
    """Write the results of 'granite4v extract' in another format, without reading the pages again.

    Tables are written as by --format of 'granite4v extract': one file per table in Parquet and CSV, one file per
    document in xlsx. In csv, parquet and xlsx, the fields of all documents become one table with one row per page. In
    xlsx, cells that begin with =, +, - or @ are text, including negative numbers. The exit status is 1 if a file could
    not be written.
    """
    from granite4v.runtime.extract.export import export_results

    with Progress() as progress:
        try:
            written = export_results(
                folder,
                cast("list[Format]", formats or []),
                out=out,
                csv_safe=csv_safe,
                say=functools.partial(tell, progress),
            )
        except ArgumentError as error:
            raise typer.BadParameter(str(error)) from None
        progress.note(f"{plural(len(written.paths), 'file')} written")
        list_paths(written.paths, len(written.paths), out or folder, progress.note)
    if written.n_failed:
        raise typer.Exit(EXIT_FAILURE)
