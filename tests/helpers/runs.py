"""Documents of a batch that change between its runs, and what the runs write."""

from __future__ import annotations

import json
import os
from pathlib import Path

from PIL import Image

from granite4v.runtime.extract import Record

TASKS = ("tables_html", "kvp")


def image(path: Path, shade: int, *more: int, ns: int = 0) -> None:
    """Writes an image, or a PDF with one page per shade, with a later modification time than before."""
    first, *rest = [Image.new("RGB", (20, 30), (value,) * 3) for value in (shade, *more)]
    before = path.stat().st_mtime_ns if path.exists() else 0
    if path.suffix == ".pdf":
        first.save(path, save_all=True, append_images=rest, resolution=72)
    else:
        first.save(path)
    os.utime(path, ns=(before + 10**9 + ns, before + 10**9 + ns))


def kept(out: Path) -> list[Record]:
    return [Record.from_dict(json.loads(line)) for line in (out / "results.jsonl").read_text().splitlines()]


def keys(out: Path) -> list[tuple[str, int | None, str]]:
    return [(Path(record.source).name, record.page, record.task) for record in kept(out)]


def shades(out: Path, name: str) -> list[int]:
    return [r.value["shade"] for r in kept(out) if Path(r.source).name == name and r.task == "kvp" and r.value]
