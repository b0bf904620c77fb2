"""`granite4v requantize`: converts a vision file to another weight type."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Annotated

import typer

from granite4v.cli import options
from granite4v.cli.progress import Progress
from granite4v.cli.verbosity import note


def requantize(
    source: Annotated[
        Path,
        typer.Argument(metavar="DIR|FILE", help="Model directory, or a vision GGUF file (mmproj), whoever made it."),
    ],
    vision_type: Annotated[
        str, typer.Option("--vision-type", metavar="T", help=options.VISION_TYPE_HELP, show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE|DIR",
            help="File to write, or a directory for it.",
            show_default="beside the file that it is made from",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file to write if it exists.")] = False,
    threads: options.ThreadsOption = None,
) -> None:
    """Write a model's vision file in another weight type.

    In a model directory, the new file is used from then on instead of the one it was made from, which is kept; --mmproj
    selects another one. A second such file beside the first is not written: the model would not load any more.
    """
    from granite4v import converter
    from granite4v.converter import policy
    from granite4v.converter.requantize import vision_files
    from granite4v.errors import Granite4vError
    from granite4v.gguf_role import without_sources

    if vision_type.lower() == converter.AUTO:
        vision_type = options.fastest_vision_type(threads)
    try:
        policy.check_vision_type(vision_type)
    except Granite4vError as error:
        raise typer.BadParameter(str(error)) from None
    _warn_of_loss(source, vision_type)
    began = time.perf_counter()
    with Progress(delay_s=0.5) as progress:
        path = converter.requantize(source, vision_type, out, force=force, n_threads=threads, progress=progress.written)
    typer.echo(f"{path}  {path.stat().st_size / 1e6:,.1f} MB")
    note(f"quantized in {time.perf_counter() - began:.1f} s")
    with contextlib.suppress(Granite4vError):  # another file may be damaged; the new one is already written
        others = [file.name for file in without_sources(vision_files(path.parent)) if file.name != path.name]
        if others:
            note(f"note: '{path.parent}' also has {', '.join(others)}; choose one with --mmproj")


def _warn_of_loss(source: Path, vision_type: str) -> None:
    """Warns that the weights of a Q8_0 file keep their rounding error."""
    from granite4v.converter import policy
    from granite4v.converter.requantize import find_vision_file
    from granite4v.errors import ModelFileError
    from granite4v.ggml.gguf_file import GgufFile

    with contextlib.suppress(ModelFileError), GgufFile.open(find_vision_file(source)) as file:  # else reported later
        if vision_type.upper() != "Q8_0" and any(info.type_name == "Q8_0" for info in file.tensors.values()):
            again = "" if vision_type.upper() in policy.FLOATS else f" and {vision_type.upper()} adds another"
            typer.echo(
                f"warning: '{file.path}' is quantized to Q8_0 already; the new file keeps that error{again}. An F16 or "
                "BF16 file of the model gives a more exact one.",
                err=True,
            )
