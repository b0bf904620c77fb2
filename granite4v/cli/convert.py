"""`granite4v convert`: converts a Hugging Face checkpoint to a model directory."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import typer

from granite4v.cli import options
from granite4v.cli.progress import Progress
from granite4v.cli.verbosity import note

if TYPE_CHECKING:
    from granite4v.converter import Summary

ADAPTER_USES = {"merged": "merged", "separate": "written to a separate file", "ignored": "ignored"}


def convert(
    source: options.SourceArgument,
    out: options.TargetArgument,
    text_type: options.TextTypeOption = "Q4_K_M",
    vision_type: options.VisionTypeOption = "F16",
    lora: options.LoraModeOption = "merge",
    adapter: options.AdapterOption = None,
    revision: options.RevisionOption = None,
    dry_run: options.DryRunOption = False,
    force: options.ForceOption = False,
    threads: options.ThreadsOption = None,
) -> None:
    """Convert a Hugging Face checkpoint to GGUF.

    Writes a text file and a vision file to OUT and, with --lora separate, an adapter file.
    """
    if revision is not None and os.path.exists(os.path.expanduser(source)):
        raise typer.BadParameter(
            f"'{source}' is a local path, which has no revisions; give a hub id with it, or leave it out.",
            param_hint="--revision",
        )
    from granite4v import converter, default_model
    from granite4v.errors import Granite4vError

    if vision_type.lower() == converter.AUTO:
        vision_type = options.fastest_vision_type(threads)
    settings = converter.Options(text_type, vision_type, lora, adapter, revision, force, threads)
    try:
        converter.check_options(settings)
    except Granite4vError as error:
        raise typer.BadParameter(str(error)) from None
    if default_model.is_embedded(source):
        if revision is not None:
            raise typer.BadParameter("the embedded model has no revisions; leave it out.", param_hint="--revision")
        source = str(default_model.checkpoint_folder())
    with Progress(delay_s=0.5) as progress:
        if dry_run:
            typer.echo(converter.describe(converter.plan_conversion(source, settings, progress.note)))
            return
        summary = converter.convert(source, out, settings, progress.written, progress.note)
    for path in summary.paths:
        typer.echo(f"{path}  {path.stat().st_size / 1e6:,.1f} MB")
    _remark(summary)


def _remark(summary: Summary) -> None:
    """Prints on stderr what the file names do not show: warnings, the use of the adapter, and types that differ."""
    from granite4v.converter.plan import counted, size

    for warning in summary.plan.warnings:
        typer.echo(f"warning: {warning}", err=True)
    if summary.plan.adapter is not None:
        note(f"note: the adapter '{summary.plan.adapter}' was {ADAPTER_USES[summary.plan.adapter_use]}")
    for file in summary.plan.files:
        forced: dict[tuple[str, str], int] = {}
        for tensor in file.tensors:
            if tensor.choice.forced:
                key = (tensor.type_name, tensor.choice.reason)
                forced[key] = forced.get(key, 0) + 1
        for (type_name, reason), count in forced.items():
            are = "tensor is" if count == 1 else "tensors are"
            note(f"note: {file.name}: {count} {are} {type_name}, for {reason}")
    files = counted(len(summary.paths), "file")
    note(f"converted in {summary.seconds:.1f} s: {files}, {size(summary.file_bytes)} on disk")
