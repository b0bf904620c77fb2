"""`granite4v extract --watch`: processes files as they arrive, in consecutive runs with the same output directory."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from granite4v.cli import options
from granite4v.cli.extract_output import Printer, RunProgress, print_records, summary
from granite4v.errors import DocumentError

if TYPE_CHECKING:
    from granite4v.runtime.extract import ExtractOptions


def follow(
    folder: Path, inputs: Sequence[str], chosen: ExtractOptions, model: str | None, printer: Printer, shown: RunProgress
) -> None:
    """Reads the files of a folder as they arrive, until an exception ends it, such as KeyboardInterrupt."""
    from granite4v.runtime.extract import begin
    from granite4v.runtime.extract.output_directory import OutputDirectory
    from granite4v.runtime.extract.run import load_model
    from granite4v.runtime.extract.watching import arrivals

    chosen = _checked(folder, inputs, chosen)
    assert chosen.out is not None
    directory = OutputDirectory.claim(Path(chosen.out), resume=chosen.resume)  # report errors before the first file
    directory.release()
    with contextlib.ExitStack() as opened:
        loaded = opened.enter_context(load_model(options.model_path(model), chosen, None, shown.say))
        shown.progress.note(f"watching '{folder}'; Ctrl-C ends it")
        for paths in arrivals(folder):
            began = time.monotonic()
            try:
                run = begin(paths, chosen, model=loaded, watch=shown.watch, say=shown.say, within=folder)
            except DocumentError as error:  # the file was removed meanwhile
                shown.progress.say(str(error))
                continue
            with run:
                print_records(run, printer, shown)
            shown.progress.note(summary(run.state, time.monotonic() - began))
            chosen = replace(chosen, resume=True)
            if printer.failure is not None:
                raise printer.failure


def _checked(folder: Path, inputs: Sequence[str], chosen: ExtractOptions) -> ExtractOptions:
    from granite4v.runtime.extract.arguments import checked

    if inputs:
        raise typer.BadParameter("give inputs or --watch, not both.", param_hint="INPUT, --watch")
    if chosen.out is None:
        raise typer.BadParameter("it needs a directory for results; give it by --out.", param_hint="--watch")
    if folder.resolve() in (Path(chosen.out).resolve(), *Path(chosen.out).resolve().parents):
        raise typer.BadParameter(
            f"'{chosen.out}' is in the directory that is watched, and would be read; give another --out.",
            param_hint="--watch",
        )
    return checked(folder, chosen)[1]
