"""Options that several commands share, declared once so that spelling, default and help agree."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelOption = Annotated[
    Path,
    typer.Option("--model", metavar="DIR", help="Model directory made by 'granite4v convert', or a text GGUF file."),
]
MmprojOption = Annotated[
    Path | None,
    typer.Option("--mmproj", metavar="FILE", help="Vision GGUF; needed when it does not lie beside the text GGUF."),
]
DeviceOption = Annotated[
    str, typer.Option("--device", help="cpu, cuda, metal, or auto: a GPU if llama-cpp-python was built for one.")
]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, help="Threads to compute with.", show_default="one a core")
]
ContextOption = Annotated[
    int, typer.Option("--ctx", min=1, help="Tokens that pictures, prompt and answer may have together.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
LoraOption = Annotated[
    bool | None,
    typer.Option(
        "--lora/--no-lora", help="Apply a separate LoRA or not.", show_default="only to requests with pictures"
    ),
]
