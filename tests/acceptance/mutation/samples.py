"""Unmutated inputs that several kinds start from: a page, tiny checkpoints, and the models converted from them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[3]
PAGE = "page.png"  # in the folder of each case


def write_page(path: Path, size: tuple[int, int] = (64, 48)) -> Path:
    page_image(size).save(path)
    return path


def page_image(size: tuple[int, int] = (64, 48)) -> Image.Image:
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    pen.text((4, 4), "Total 12.50", fill="black")
    pen.line((0, size[1] // 2, size[0], size[1] // 2), fill="red")
    return image


def checkpoint(bases: Path, preset: str, *, adapter: bool = False, sharded: bool = False) -> Path:
    """Returns a tiny checkpoint of a preset of `tests.toy`, made on first use."""
    from dataclasses import replace

    from tests.toy.checkpoint import PRESETS, AdapterSpec, write_adapter, write_checkpoint

    name = preset + "-adapter" * adapter + "-sharded" * sharded
    folder = bases / "checkpoints" / name
    if not folder.exists():
        spec = replace(PRESETS[preset], max_shard_bytes=400_000 if sharded else None)
        write_checkpoint(folder, spec)
        if adapter:
            write_adapter(folder, spec, AdapterSpec())
    return folder


def model(bases: Path, preset: str, *, adapter: bool = False) -> Path:
    """Returns the model directory converted from a tiny checkpoint; an adapter stays a separate file."""
    from granite4v.converter import Options, convert

    folder = bases / "models" / (preset + "-adapter" * adapter)
    if not folder.exists():
        lora = "separate" if adapter else "ignore"
        convert(checkpoint(bases, preset, adapter=adapter), folder, Options("F32", "F32", lora=lora))
    return folder


def link_files(source: Path, target: Path) -> None:
    """Hard-links the files of a folder into another, so a file must be replaced by a new one, not changed in place."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.is_file():
            try:
                os.link(file, target / file.name)
            except OSError:
                shutil.copyfile(file, target / file.name)


def replace_file(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(data)
