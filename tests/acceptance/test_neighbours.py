"""A page that fails, loops or reaches the token limit does not change the answers of the pages read in parallel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import granite4v
from tests.acceptance.pages import draw_page

TASKS = ("tables_html", "chart2csv")
MAX_TOKENS = 60


def broken(path: Path) -> None:
    path.write_bytes(b"\x89PNG and nothing more")


def blank(path: Path) -> None:
    """An image on which the embedded model repeats itself without end."""
    Image.new("RGB", (400, 300), "white").save(path)


def full(path: Path) -> None:
    """A table that needs more tokens than the limit."""
    draw_page(3, 0, "table").picture.save(path)


@pytest.mark.parametrize("draw, ending", [(broken, "error"), (blank, "repetition"), (full, "length")])
def test_neighbours_are_what_they_are_without_it(tmp_path: Path, draw: Callable[[Path], None], ending: str) -> None:
    folder = tmp_path / "pages"
    folder.mkdir()
    for i in range(6):
        draw_page(i, 1, "chart").picture.save(folder / f"{i}.png")
    odd = folder / "2 odd.png"
    with granite4v.load(n_threads=1, device="cpu", n_parallel=4) as model:
        alone = records(model, folder)
        draw(odd)
        found = records(model, folder)
    endings = {record["finish_reason"] or "error" for key, record in found.items() if key[0] == str(odd)}
    assert ending in endings
    assert {key: record for key, record in found.items() if key[0] != str(odd)} == alone and len(alone) == 12


def records(model: granite4v.Model, folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Returns the records by page and task, without timings."""
    most = 0

    def watch(state: Any) -> None:
        nonlocal most
        most = max(most, state.n_in_flight)

    found = list(granite4v.extract(folder, TASKS, model=model, max_tokens=MAX_TOKENS, watch=watch))
    assert most == 4  # side by side
    return {
        (record.source, record.task): {name: value for name, value in vars(record).items() if name != "timings"}
        for record in found
    }
