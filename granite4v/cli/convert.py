"""`granite4v convert`: a Hugging Face checkpoint becomes a model directory."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from granite4v.choices import MAX_THREADS

if TYPE_CHECKING:
    from granite4v.converter import Progress, Summary

# Before that much is done, nothing is said of the time that is left.
MIN_SECONDS, MIN_SHARE = 2.0, 0.02

ADAPTER_USES = {"merged": "merged", "separate": "kept in a file of its own", "ignored": "ignored"}


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC", help="Checkpoint: a directory, a hub id such as 'owner/name', or 'nano', the embedded one."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Model directory to make.")],
    text_type: Annotated[
        str, typer.Option(metavar="T", help="F32, F16, BF16, Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q4_0 or IQ4_NL.")
    ] = "Q4_K_M",
    vision_type: Annotated[str, typer.Option(metavar="T", help="F32, F16, BF16, Q8_0, Q4_0 or IQ4_NL.")] = "F16",
    lora: Annotated[
        str, typer.Option(metavar="merge|separate|ignore", help="What to do with a LoRA adapter, if there is one.")
    ] = "merge",
    adapter: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="A PEFT adapter (directory or hub id).", show_default="the one in SRC"),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="REV", help="Branch, tag or commit of a hub id.", show_default="main")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be written, and write nothing.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the model in OUT; other files there are left alone.")
    ] = False,
    threads: Annotated[
        int | None,
        typer.Option("--threads", min=1, max=MAX_THREADS, help="Threads to quantize with.", show_default="one a core"),
    ] = None,
) -> None:
    """Convert a Hugging Face checkpoint to GGUF files: text, vision and, if wanted, a separate LoRA adapter."""
    from granite4v import converter, default_model
    from granite4v.errors import Granite4vError

    options = converter.Options(text_type, vision_type, lora, adapter, revision, force, threads)
    try:
        converter.check_options(options)
    except Granite4vError as error:
        raise typer.BadParameter(str(error)) from None
    if default_model.is_embedded(source):
        source = str(default_model.checkpoint_folder())
    if dry_run:
        typer.echo(converter.describe(converter.plan_conversion(source, options, _report)))
        return
    meter = Meter()
    try:
        summary = converter.convert(source, out, options, meter, _report)
    finally:
        meter.clear()
    for path in summary.paths:
        typer.echo(f"{path}  {path.stat().st_size / 1e6:,.1f} MB")
    _remark(summary)


def _remark(summary: Summary) -> None:
    """On stderr: what a reader of the file names would not expect."""
    from granite4v.converter.plan import counted, size

    for warning in summary.plan.warnings:
        typer.echo(f"warning: {warning}", err=True)
    if summary.plan.adapter is not None:
        typer.echo(f"note: the adapter '{summary.plan.adapter}' was {ADAPTER_USES[summary.plan.adapter_use]}", err=True)
    for file in summary.plan.files:
        forced: dict[tuple[str, str], int] = {}
        for tensor in file.tensors:
            if tensor.choice.forced:
                key = (tensor.type_name, tensor.choice.reason)
                forced[key] = forced.get(key, 0) + 1
        for (type_name, reason), count in forced.items():
            are = "tensor is" if count == 1 else "tensors are"
            typer.echo(f"note: {file.name}: {count} {are} {type_name}, for {reason}", err=True)
    files = counted(len(summary.paths), "file")
    typer.echo(f"converted in {summary.seconds:.1f} s: {files}, {size(summary.file_bytes)} on disk", err=True)


def _report(line: str) -> None:
    typer.echo(line, err=True)


class Meter:
    """Progress on stderr: a line that renews itself on a terminal, a line every ten seconds elsewhere.

    Time left is shown once enough is done to tell.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._interval_s = 0.1 if self._terminal else 10.0
        self._began = time.monotonic()
        self._last = self._began + 0.5 - self._interval_s  # the first line after half a second
        self._first: Progress | None = None
        self._first_time = self._began
        self._width = 0

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if self._first is None:  # what came before, imports and reading of headers, tells nothing of the writing
            self._first, self._first_time = progress, now
        if now - self._last < self._interval_s:
            return
        self._last = now
        share = progress.done_bytes / progress.total_bytes if progress.total_bytes else 1.0
        line = f"{progress.file}: {share:4.0%}, {self._left(progress, now)}{progress.tensor}"
        if self._terminal:
            line = line[:100]
            print("\r" + line.ljust(self._width), end="", file=self._stream, flush=True)
            self._width = len(line)
        else:
            print(line, file=self._stream, flush=True)

    def _left(self, progress: Progress, now: float) -> str:
        assert self._first is not None
        done = progress.done_bytes - self._first.done_bytes
        took_s = now - self._first_time
        if took_s < MIN_SECONDS or done < MIN_SHARE * progress.total_bytes:
            return ""
        return f"{took_s * (progress.total_bytes - progress.done_bytes) / done:.0f} s left, "

    def clear(self) -> None:
        if self._width:
            print("\r" + " " * self._width + "\r", end="", file=self._stream, flush=True)
            self._width = 0
