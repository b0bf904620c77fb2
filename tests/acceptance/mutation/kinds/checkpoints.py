"""Hugging Face checkpoints whose files are damaged, inconsistent or not regular files."""

from __future__ import annotations

import json
import os
import random
import struct
from pathlib import Path
from typing import Any

from .. import edits, samples
from ..case import Case, Result
from ..product import command_line

name = "checkpoints"
SOURCE, OUT = "checkpoint", "out"
TYPES = ("F32", "F16", "Q8_0", "Q4_K_M", "Q4_0")
run = command_line


def prepare(bases: Path) -> None:
    samples.checkpoint(bases, "tiny")
    samples.checkpoint(bases, "tiny", adapter=True)
    samples.checkpoint(bases, "tiny-granite-3.3", sharded=True)
    samples.checkpoint(bases, "tiny-clip-llama")
    samples.checkpoint(bases, "tiny-siglip-qwen2")


def build(rng: random.Random, bases: Path, folder: Path) -> Case:
    source = rng.choice(sorted((bases / "checkpoints").iterdir()))
    target = folder / SOURCE
    samples.link_files(source, target)
    samples.write_page(folder / samples.PAGE)
    case = Case([source.name])
    for _ in range(rng.choice((1, 1, 1, 2))):
        case.edits.append(_edit_file(rng, target))
    lora = ["--lora", rng.choice(("merge", "separate", "ignore"))] if "adapter" in source.name else []
    types = ["--text-type", rng.choice(TYPES), "--vision-type", rng.choice(("F32", "F16", "Q8_0"))]
    convert = ["convert", SOURCE, OUT, *types, *lora]
    case.commands.append([*convert, "--dry-run"] if rng.random() < 0.3 else convert)
    if rng.random() < 0.4:
        case.commands.append(["ask", samples.PAGE, "Total?", "--model", OUT, "--max-tokens", "2", "--threads", "1"])
    return case


def check(folder: Path, case: Case, results: list[Result]) -> list[str]:
    """Checks that there is a complete model or none, and that nothing else was left behind."""
    found = []
    convert = results[0]
    written = sorted(path.name for path in (folder / OUT).iterdir()) if (folder / OUT).exists() else []
    if convert.status == 0 and "--dry-run" not in convert.command:
        if not any(name.startswith("text") for name in written) or not any("mmproj" in name for name in written):
            found.append(f"convert succeeded and left {written}")
    elif written or (folder / OUT).exists():
        found.append(f"convert wrote nothing that it could stand by and left {written}")
    others = {path.name for path in folder.iterdir()} - {SOURCE, OUT, samples.PAGE}
    return [*found, *(f"left behind: {other:.80}" for other in sorted(others))]


def _edit_file(rng: random.Random, target: Path) -> str:
    path = rng.choice(sorted(path for path in target.iterdir() if path.is_file()) or [target / "config.json"])
    shown = path.name
    if rng.random() < 0.12:
        return f"{shown}: {_replace(rng, path)}"
    data = path.read_bytes() if path.is_file() else b"{}"
    if path.suffix == ".safetensors":
        data, what = _edit_safetensors(rng, data)
    elif path.suffix == ".json":
        try:
            data, what = edits.edit_json_text(rng, json.loads(data))
        except (ValueError, RecursionError):  # damaged by an earlier edit
            data, what = edits.edit_bytes(rng, data)
    else:
        data, what = edits.edit_bytes(rng, data)
    samples.replace_file(path, data)
    return f"{shown}: {what}"


def _replace(rng: random.Random, path: Path) -> str:
    others = sorted(other for other in path.parent.iterdir() if other.is_file() and other != path)
    data = rng.choice(others).read_bytes() if others else b""
    path.unlink(missing_ok=True)
    what = rng.choice(("removed", "empty", "a folder", "a pipe", "a link to itself", "a device", "another", "no file"))
    if what == "empty":
        path.write_bytes(b"")
    elif what == "a folder":
        path.mkdir()
    elif what == "a pipe":
        os.mkfifo(path)
    elif what == "a link to itself":
        path.symlink_to(path.name)
    elif what == "a device":
        path.symlink_to("/dev/zero")
    elif what == "another":
        path.write_bytes(data)
    elif what == "no file":
        path.symlink_to("missing")
    return what


def _edit_safetensors(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    if len(data) < 8 or rng.random() < 0.25:
        return edits.edit_bytes(rng, data)
    n = struct.unpack("<Q", data[:8])[0]
    try:
        header = json.loads(data[8 : 8 + n])
    except (ValueError, RecursionError, OverflowError):
        return edits.edit_bytes(rng, data)
    body = data[8 + n :]
    if rng.random() < 0.1:
        size = rng.choice((edits.number(rng) & (2**64 - 1), n + 1, n - 1, len(data)))
        return struct.pack("<Q", size) + data[8:], f"a header of {size} bytes"
    if rng.random() < 0.5 and isinstance(header, dict) and header:
        what = _edit_entry(rng, header, len(body))
        text = edits.dump_json(header)
    else:
        text, what = edits.edit_json_text(rng, header)
    return struct.pack("<Q", len(text)) + text + body, what


def _edit_entry(rng: random.Random, header: dict[str, Any], n_bytes: int) -> str:
    key = rng.choice(list(header))
    entry = header[key]
    kind = rng.randrange(6)
    if kind == 0 or not isinstance(entry, dict) or "shape" not in entry:
        del header[key]
        return f"{key} removed"
    if kind == 1:
        header[key + rng.choice(("x", ".bias", "_scale", ".weight"))] = header.pop(key)
        return f"{key} renamed"
    if kind == 2:
        entry["dtype"] = rng.choice(("F64", "F16", "BF16", "F8_E4M3", "I64", "U8", "BOOL", "f32", "Q4", 5, None))
        return f"{key} has dtype {entry['dtype']}"
    if kind == 3:
        entry["shape"] = rng.choice(
            ([], [1], [*entry["shape"], 1], entry["shape"][::-1], [-1], [0], [2**62, 4], [1.5], "x")
        )
        return f"{key} has shape {entry['shape']}"
    if kind == 4:
        begin, end = entry["data_offsets"]
        choices = (
            [end, begin],
            [begin, end + 4],
            [-4, end],
            [begin, n_bytes + 4],
            [begin],
            [begin, end, end],
            [0.0, 1.5],
        )
        entry["data_offsets"] = rng.choice((*choices, [0, end - begin], [2**70, 2**71], "x", None))
        return f"{key} at {entry['data_offsets']}"
    other = header[rng.choice(list(header))]
    header[key] = other
    return f"{key} is another"
