"""What the checks of `stress_extract.py` share: a model, pages that are drawn for them, and how a check ends."""

from __future__ import annotations

import json
import multiprocessing
import random
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from PIL.Image import Image

    from scripts.nano.documents import Document

Json = dict[str, Any]
T = TypeVar("T")
MARKS = tuple('<>/",}\u010a')  # the last one is how byte-level tokenizers spell a line break
LOUDNESS = 2.0

FORM: Json = {
    "type": "object",
    "properties": {
        "title": {"type": ["string", "null"], "maxLength": 30},
        "date": {"type": ["string", "null"], "maxLength": 12},
        "paid": {"type": "boolean"},
        "amounts": {"type": "array", "items": {"type": "number"}, "maxItems": 3},
    },
    "required": ["title", "date", "paid", "amounts"],
}


@dataclass
class Result:
    """`figures` for the JSON line, `lines` for a person, and the promises that were `broken`, in words."""

    check: str
    figures: Json = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def print(self) -> int:
        """Tells both; the exit status."""
        for line in [*self.lines, *(f"broken: {text}" for text in self.broken), *([] if self.broken else ["ok"])]:
            print(f"{self.check}: {line}", file=sys.stderr)
        print(json.dumps({"check": self.check, "ok": not self.broken, **self.figures, "broken": self.broken}))
        return 1 if self.broken else 0


def tell(text: str) -> None:
    """Something on the way, on stderr."""
    print(text, file=sys.stderr, flush=True)


def model_directory(given: Path | None, work: Path) -> Path:
    """The directory that was given, or one with a tiny model of random weights.

    Random weights hardly ever write a mark that ends a cell or an answer; so the head's rows for tokens that begin
    with one are made louder than the others, and answers come to their ends.
    """
    if given is not None:
        return given
    from dataclasses import replace

    import numpy as np
    from safetensors.numpy import load_file, save_file

    from granite4v.converter import Options, convert
    from tests.toy.checkpoint import PRESETS, write_checkpoint

    checkpoint = write_checkpoint(work / "checkpoint", replace(PRESETS["tiny"], tied=False))
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {**tokenizer["model"]["vocab"], **{one["content"]: one["id"] for one in tokenizer["added_tokens"]}}
    weights = load_file(checkpoint / "model.safetensors")
    head = weights["lm_head.weight"]
    usual = np.median(head.std(axis=1))
    for i in (i for text, i in ids.items() if text.startswith(MARKS)):
        head[i] *= LOUDNESS * usual / head[i].std()
    for bracket in "[]":  # an empty list is an answer too, and must not be all that is said
        head[ids[bracket]] = head[ids["<"]]
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    convert(checkpoint, work / "model", Options(text_type="F32", vision_type="F32"))
    return work / "model"


# --- pages ---


@dataclass(frozen=True)
class Batch:
    """A folder of documents, and what must come of it: (source, page) in order, page None for one that is broken."""

    folder: Path
    pages: tuple[tuple[str, int | None], ...]


def draw_page(number: int, seed: int, kind: str | None = None) -> Document:
    """A made-up document that nano was not trained on."""
    from scripts.nano.documents import HELD_OUT_SEEDS, draw_document

    return draw_document(HELD_OUT_SEEDS + 100_000_000 + seed * 100_000 + number, kind, 0.3)


def on_letter(picture: Image, width_px: int) -> Image:
    """A white page in the proportions of US letter, with the picture as large as it fits."""
    from PIL import Image, ImageOps

    size = (width_px, width_px * 22 // 17)
    page = Image.new("RGB", size, "white")
    page.paste(ImageOps.contain(picture, size))
    return page


def make_batch(folder: Path, n_pages: int, seed: int = 0, *, width_px: int = 0, faults: bool = False) -> Batch:
    """`n_pages` in PDFs of up to 20 pages, TIFFs of two, PNGs and JPEGs, on letter pages if there is a width.

    With `faults` the last page has the pixels of another, and there is one document more, which is broken.
    """
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    n_drawn, copies = 0, int(faults and n_pages > 1)
    pages: list[tuple[Path, int]] = []
    while n_drawn < n_pages - copies:
        suffix = ("png", "pdf", "pdf", "tiff", "jpg")[len(pages) % 5]
        wanted = {"pdf": rng.randint(1, 20 if n_pages > 100 else 9), "tiff": 2}.get(suffix, 1)
        n = min(n_pages - copies - n_drawn, wanted)
        path = folder / f"{len(pages) + 1:03}.{suffix}"
        pictures = [draw_page(n_drawn + i, seed).picture for i in range(n)]
        _save([on_letter(picture, width_px) if width_px else picture for picture in pictures], path)
        pages.append((path, n))
        n_drawn += n
    if copies:
        pages.append((folder / f"{len(pages) + 1:03}.bmp", 1))
        _save_again(pages[0][0], pages[-1][0])
    found: list[tuple[str, int | None]] = [(str(path), i + 1) for path, n in pages for i in range(n)]
    if faults:
        broken = folder / f"{len(pages) + 1:03}.pdf"
        broken.write_bytes(b"%PDF-1.7 and nothing more")
        found.append((str(broken), None))
    return Batch(folder, tuple(found))


def _save(pictures: list[Image], path: Path) -> None:
    first, *others = pictures
    options: Json = {"save_all": True, "append_images": others} if path.suffix in (".pdf", ".tiff") else {}
    if path.suffix == ".pdf":
        options["resolution"] = 200
    first.save(path, **options)


def _save_again(source: Path, path: Path) -> None:
    from PIL import Image

    with Image.open(source) as image:
        image.convert("RGB").save(path)


# --- processes ---


def in_new_process(function: Callable[..., T], *arguments: Any) -> T:
    """What a function of a module returns in an interpreter of its own, whose memory holds nothing else."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def records_of(path: Path) -> Iterator[Json]:
    """Records as `results.jsonl` holds them, with no code of ours; a line that did not end is none."""
    if path.exists():
        with path.open("rb") as file:
            yield from (json.loads(line) for line in file if line.endswith(b"\n"))
