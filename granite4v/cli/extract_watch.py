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
from granite4v.cli.progress import plural
from granite4v.cli.terminal import clean
from granite4v.errors import DocumentError

if TYPE_CHECKING:
    from granite4v.runtime import Model
    from granite4v.runtime.extract import Extraction, ExtractOptions

_RETRY_S = 1.0


def follow(
    folder: Path, inputs: Sequence[str], chosen: ExtractOptions, model: str | None, printer: Printer, shown: RunProgress
) -> None:
    """Reads the files of a folder as they arrive, until an exception ends it, such as KeyboardInterrupt."""
    from granite4v.runtime.extract.output_directory import OutputDirectory
    from granite4v.runtime.extract.run import load_model
    from granite4v.runtime.extract.watching import arrivals, check_folder

    chosen = _checked(folder, inputs, chosen)
    assert chosen.out is not None
    check_folder(folder)
    directory = OutputDirectory.claim(Path(chosen.out), resume=chosen.resume)  # report errors before the first file
    directory.release()
    with contextlib.ExitStack() as opened:
        loaded = opened.enter_context(load_model(options.model_path(model), chosen, None, shown.say))
        shown.progress.note(f"watching '{folder}'; Ctrl-C ends it")
        for number, paths in enumerate(arrivals(folder, say=shown.progress.note)):
            began = time.monotonic()
            try:
                run = _begin(paths, chosen, loaded, folder, shown, is_first=number == 0)
            except DocumentError as error:  # the file was removed meanwhile
                shown.progress.say(str(error))
                continue
            with run:
                print_records(run, printer, shown)
            shown.progress.note(f"{_named(paths)}: {summary(run.state, time.monotonic() - began, of_all=False)}")
            chosen = replace(chosen, resume=True)
            if printer.failure is not None:
                raise printer.failure


def _begin(
    paths: Sequence[str], chosen: ExtractOptions, model: Model, folder: Path, shown: RunProgress, *, is_first: bool
) -> Extraction:
    """Begins a run, as soon as no other process, such as an export, uses the output directory."""
    from granite4v.runtime.extract import begin
    from granite4v.runtime.extract.output_directory import EnvironmentRemark, OutputLocked

    def say(text: str) -> None:
        if is_first or not isinstance(text, EnvironmentRemark):  # how many answers are generated at once may vary
            shown.say(text)

    is_told = False
    while True:
        try:
            return begin(paths, chosen, model=model, watch=shown.watch, say=say, within=folder)
        except OutputLocked:
            if not is_told:
                shown.progress.note(f"another process is using '{chosen.out}'; waiting for it")
            is_told = True
            time.sleep(_RETRY_S)


def _named(paths: Sequence[str]) -> str:
    """The files that were read, in one line."""
    more = f" and {plural(len(paths) - 1, 'more file')}" if len(paths) > 1 else ""
    return f"{clean(paths[0], keep='')}{more}"


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
