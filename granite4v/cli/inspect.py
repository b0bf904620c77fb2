"""`granite4v inspect`: shows the contents of a GGUF file or a model directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from granite4v.cli.options import JsonOption, model_path
from granite4v.cli.streams import to_json
from granite4v.cli.terminal import clean


def inspect(
    path: Annotated[
        str,
        typer.Argument(
            help="GGUF file, model directory, 'nano', the embedded model, or a model of the hub ('owner/name').",
            metavar="FILE|DIR|HUB_ID",
        ),
    ],
    as_json: JsonOption = False,
) -> None:
    """Show what a GGUF file or a model directory contains. Reads headers only."""
    from granite4v.errors import ModelFileError
    from granite4v.gguf_summary import summarize

    found = Path(model_path(path))
    files: list[dict[str, Any]] = []
    broken: list[ModelFileError] = []
    for file in _files(found):
        try:
            files.append(summarize(file))
        except ModelFileError as error:
            broken.append(error)
    if as_json:
        if files:
            print(to_json({"path": str(found), "files": files}, indent=2))
    elif files:
        typer.echo("\n\n".join(map(_table, files)))
    if broken:
        raise ModelFileError(" ".join(map(str, broken)))


def _files(path: Path) -> list[Path]:
    """The file itself, or the GGUF files of a directory, sorted by name. Raises ModelFileError if there are none."""
    from granite4v.errors import ModelFileError
    from granite4v.gguf_role import gguf_files

    if not path.is_dir():
        return [path]
    files = gguf_files(path)
    if not files:
        raise ModelFileError(
            f"'{path}' contains no .gguf file; give a model directory made by 'granite4v convert', or a GGUF file."
        )
    return files


def _table(summary: dict[str, Any]) -> str:
    lines = [summary["path"]]
    for name, value in summary.items():
        if name in ("path", "tensor_types", "streams"):
            continue
        label = name.replace("_", " ")
        if isinstance(value, dict):
            lines += [f"  {f'{label} {key}':<24} {_plain(item)}" for key, item in value.items()]
        else:
            lines.append(f"  {label:<24} {_plain(value)}")
    for stream in summary.get("streams", ()):
        kind = ""
        if "spatial_offset" in stream:
            kind = " (area)" if stream["spatial_offset"] is None else f" (corner {stream['spatial_offset']})"
        before = "?" if stream["text_layer"] is None else stream["text_layer"]
        taken = ", ".join(map(str, stream["hidden_states"]))
        lines.append(f"  {'stream':<24} hidden state {taken} -> decoder layer {before}{kind}")
    for name, entry in summary["tensor_types"].items():
        lines.append(f"  {name:<24} {entry['tensors']:>5} tensors {entry['bytes'] / 1e6:>10.1f} MB")
    return "\n".join(clean(line, keep="") for line in lines)


def _plain(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)
