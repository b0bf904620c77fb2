"""Options that several commands share, declared once so that spelling, default and help agree."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from granite4v.choices import MAX_THREADS, Device

NO_MODEL = (
    "no --model given: using the embedded 'nano', a small model trained on synthetic documents; --model DIR takes a "
    "real one"
)

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="DIR",
        help="Model directory made by 'granite4v convert', or a text GGUF file.",
        show_default="the embedded 'nano'",
    ),
]
MmprojOption = Annotated[
    Path | None,
    typer.Option("--mmproj", metavar="FILE", help="Vision GGUF; needed when it does not lie beside the text GGUF."),
]
DeviceOption = Annotated[
    Device, typer.Option("--device", help="cpu, cuda, metal, or auto: a GPU if llama-cpp-python was built for one.")
]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", min=1, max=MAX_THREADS, help="Threads to compute with.", show_default="one a core"),
]
ContextOption = Annotated[
    int | None,
    typer.Option(
        "--ctx-size",
        min=1,
        show_default="8192, or what the model was trained for",
        help="Tokens that images, prompt and answer may have together.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
LoraOption = Annotated[
    bool | None,
    typer.Option("--lora/--no-lora", help="Apply a separate LoRA or not.", show_default="only to requests with images"),
]


def finite(value: float) -> float:
    """A callback of float options: 'nan' passes every comparison with a limit."""
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def model_path(model: str | None, *, quiet: bool = False) -> str | Path:
    """What `--model` stands for: a path as it is, the embedded model for 'nano' or for nothing.

    Says on stderr which model it is when nobody chose, and shows its conversion on first use, unless `quiet`.
    """
    from granite4v import default_model
    from granite4v.cli.convert import Meter

    if model is not None and not default_model.is_embedded(model):
        return model

    def report(line: str) -> None:
        if not quiet:
            typer.echo(line, err=True)

    if model is None:
        report(NO_MODEL)
    meter = Meter()
    try:
        return default_model.embedded_model(report, None if quiet else meter)
    finally:
        meter.clear()
