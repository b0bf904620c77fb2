"""Opens the server's own page in a browser, uses it as a person would, and reads it."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, expect

from scripts.nano.evaluate import Question
from tests.helpers.served import Served

WAIT_MS = 20_000


@dataclass
class Seen:
    """Side effects seen while a page was used."""

    errors: list[str] = field(default_factory=list)  # of the page's scripts, and of its content security policy
    origins: set[str] = field(default_factory=set)  # to which the page sent a request
    lines: list[str] = field(default_factory=list)


@contextlib.contextmanager
def opened(server: Served, browser: Browser, seen: Seen, **settings: Any) -> Iterator[Page]:
    settings = {"viewport": {"width": 1280, "height": 860}, **settings}
    with contextlib.closing(browser.new_context(accept_downloads=True, **settings)) as context:
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        page.on("console", lambda said: seen.errors.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: seen.errors.append(str(error)))
        page.on("request", lambda asked: seen.origins.add(_origin(asked.url)))
        page.goto(server.url)
        expect(page.locator("#task option", has_text="tables_html")).to_have_count(1)
        yield page


def _origin(url: str) -> str:
    return url[:5] if url.startswith(("data:", "blob:")) else "/".join(url.split("/")[:3])


def choose(page: Page, question: Question, task: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "page.png"
        question.document.picture.save(path)
        page.get_by_label("Drop an image or a PDF here").set_input_files(path)
        expect(page.locator("#pages img")).to_have_count(1)
    page.get_by_label("Task", exact=True).select_option(task)


def finish(page: Page) -> str:
    """Returns the text of the answer once it is complete."""
    expect(page.get_by_role("button", name="Stop")).to_be_disabled(timeout=WAIT_MS)
    return page.locator("#text").text_content() or ""


def press(page: Page) -> str:
    page.get_by_role("button", name="Read").click()
    return finish(page)


def downloads(page: Page, button: str, n: int) -> list[bytes]:
    files: list[Path] = []
    page.on("download", lambda download: files.append(download.path()))
    page.get_by_role("button", name=button, exact=True).click()
    for _ in range(100):
        if len(files) == n:
            break
        page.wait_for_timeout(50)
    same(len(files), n, f"files by {button}")
    return [path.read_bytes() for path in files]


def shown(page: Page) -> list[list[list[str]]]:
    """Returns the texts of all tables on the page, by slot, read from the page's elements alone."""
    grids: list[list[list[str]]] = page.evaluate(
        """() => [...document.querySelectorAll("#view table")].map((table) => {
          const grid = [...table.rows].map(() => []);
          [...table.rows].forEach((row, i) => {
            for (const cell of row.cells) {
              let j = 0;
              while (grid[i][j] !== undefined) j += 1;
              const text = [...cell.childNodes].filter((one) => one.nodeType === 3).map((one) => one.data).join("");
              for (let a = 0; a < cell.rowSpan; a += 1)
                for (let b = 0; b < cell.colSpan; b += 1) grid[i + a][j + b] = text;
            }
          });
          return grid;
        })"""
    )
    return grids


def same(found: Any, expected: Any, what: str) -> None:
    assert found == expected, f"{what}: found {found!r:.300}, expected {expected!r:.300}"
