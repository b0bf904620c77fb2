"""Damaged files of the page store are misses: answers equal those without a store, and each file costs one warning.

    python -m tests.acceptance.stored_pages --corruptions 200

Some pages are stored. Then, repeatedly, one file is cut, extended, changed in some bits, partly overwritten, emptied,
or replaced by another page's or another format's file, and a newly loaded model is asked about its page. A sound file
must be used.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

import granite4v
from granite4v import PageStore, PageStoreWarning
from granite4v.errors import Granite4vError
from granite4v.runtime.engine.state_file import FORMAT
from tests.acceptance.harness import Json, Result, options_parser, run_check, tell
from tests.acceptance.pages import draw_page

PROMPT = "What is written here?"
N_PAGES = 4
Damage = Callable[[Path, random.Random, Sequence[Path]], None]
Found = tuple[list[int], np.ndarray]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = options_parser(__doc__ or "", max_tokens=12)
    parser.add_argument("--corruptions", type=int, default=200)
    return run_check(stored_pages, parser.parse_args(arguments), "F16")


def stored_pages(options: argparse.Namespace, work: Path) -> Result:
    rng = random.Random(options.seed)
    pages = [draw_page(number, options.seed).picture for number in range(N_PAGES)]
    asker = Asker(options.model, options.threads, options.max_tokens)
    alone = [asker.ask(page, None)[0] for page in pages]
    whole = PageStore(work / "whole")
    files = [stored(asker, page, whole) for page in pages]
    counts: Counter[str] = Counter()
    broken: list[str] = []
    for number in range(options.corruptions):
        damage, chosen = DAMAGES[number % len(DAMAGES)], rng.randrange(N_PAGES)
        store = copied(whole, work / "damaged")
        paths = [store.folder / file.name for file in files]
        damage(paths[chosen], rng, [path for path in paths if path != paths[chosen]])
        looked_at = [chosen] if number % 4 else [chosen, (chosen + 1) % N_PAGES]  # now and then also at a sound one
        for page in looked_at:
            problem = judge(asker, pages[page], store, alone[page], is_sound=page != chosen)
            if problem:
                broken.append(f"{damage.__name__} ({number}), page {page}: {problem}")
        counts[damage.__name__] += 1
        if number % 20 == 19:
            tell(f"{number + 1} of {options.corruptions}, {len(broken)} broken promises")
    figures: Json = {
        "corruptions": dict(counts),
        "pages": N_PAGES,
        "file_bytes": [file.stat().st_size for file in files],
    }
    return Result("stored_pages", figures, [f"{sum(counts.values())} corruptions"], broken)


class Asker:
    """Asks about a page with a newly loaded model."""

    def __init__(self, model: Path, n_threads: int, max_tokens: int) -> None:
        self._model, self._n_threads, self._max_tokens = model, n_threads, max_tokens

    def ask(self, page: object, store: PageStore | None) -> tuple[Found, granite4v.Timings]:
        with granite4v.load(self._model, device="cpu", n_threads=self._n_threads, page_store=store) as model:
            answer = model.generate(PROMPT, [page], max_tokens=self._max_tokens, ignore_eos=True)
            return (answer.tokens, model.logits(PROMPT, [page])), answer.timings


def stored(asker: Asker, page: object, store: PageStore) -> Path:
    """Stores a page that was not stored before and returns its file."""
    before = {entry.path for entry in store.entries()}
    asker.ask(page, store)
    (path,) = {entry.path for entry in store.entries()} - before
    return path


def copied(store: PageStore, folder: Path) -> PageStore:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(store.folder, folder)
    return PageStore(folder)


def judge(asker: Asker, page: object, store: PageStore, alone: Found, *, is_sound: bool) -> str | None:
    """Describes what is wrong with an answer or its cost; None if nothing is."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            (tokens, logits), timings = asker.ask(page, store)
        except Granite4vError as error:
            return f"no answer: {error}"
    n_warnings = sum(issubclass(each.category, PageStoreWarning) for each in said)
    if tokens != alone[0] or not np.array_equal(logits, alone[1]):
        return "another answer than without a store"
    if (timings.n_stored > 0) != is_sound:
        return f"{timings.n_stored} tokens from the store"
    wanted = 0 if is_sound else 1
    return None if n_warnings == wanted else f"{n_warnings} warnings, expected {wanted}"


# --- damage ---


def cut(path: Path, rng: random.Random, others: Sequence[Path]) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def cut_the_end(path: Path, rng: random.Random, others: Sequence[Path]) -> None:
    os.truncate(path, path.stat().st_size - rng.randint(1, 64))


def extend(path: Path, rng: random.Random, others: Sequence[Path]) -> None:
    with path.open("ab") as file:
        file.write(rng.randbytes(rng.randint(1, 1000)))


def flip(path: Path, rng: random.Random, others: Sequence[Path]) -> None:
    _flip(path, rng, 1, path.stat().st_size)


def flip_many(path: Path, rng: random.Random, others: Sequence[Path]) -> None:
    _flip(path, rng, 101, path.stat().st_size)


def flip_the_head(path: Path, rng: random.Random, others: Sequence[Path]) -> None:
    _flip(path, rng, 1, 24)


def _flip(path: Path, rng: random.Random, n_bits: int, n_bytes: int) -> None:
    data = bytearray(path.read_bytes())
    for bit in rng.sample(range(8 * n_bytes), n_bits):
        data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def overwrite(path: Path, rng: random.Random, others: Sequence[Path]) -> None:
    with path.open("r+b") as file:
        file.seek(rng.randrange(path.stat().st_size - 4096))
        file.write(rng.randbytes(4096))


def swap(path: Path, rng: random.Random, others: Sequence[Path]) -> None:
    """Replaces the file with another page's sound file."""
    shutil.copy(rng.choice(others), path)


def replace_the_state(path: Path, rng: random.Random, others: Sequence[Path]) -> None:
    """Puts another page's state after this file's description."""
    own, other = path.read_bytes(), rng.choice(others).read_bytes()
    n_own, n_other = _state_bytes(own), _state_bytes(other)
    path.write_bytes(own[: len(own) - 32 - n_own] + other[len(other) - 32 - n_other :])


def _state_bytes(data: bytes) -> int:
    return int.from_bytes(data[16:24], "little")


def change_the_format(path: Path, rng: random.Random, others: Sequence[Path]) -> None:
    """Changes the format number as another version would, with a correct checksum."""
    data = bytearray(path.read_bytes()[:-32])
    data[8:12] = rng.choice([FORMAT + 1, FORMAT - 1, 1 << 31]).to_bytes(4, "little")
    path.write_bytes(data + hashlib.sha256(data).digest())


def empty(path: Path, rng: random.Random, others: Sequence[Path]) -> None:
    path.write_bytes(b"")


def scramble(path: Path, rng: random.Random, others: Sequence[Path]) -> None:
    path.write_bytes(rng.randbytes(path.stat().st_size))


DAMAGES: tuple[Damage, ...] = (
    cut,
    cut_the_end,
    extend,
    flip,
    flip_many,
    flip_the_head,
    overwrite,
    swap,
    replace_the_state,
    change_the_format,
    empty,
    scramble,
)


if __name__ == "__main__":
    sys.exit(main())
