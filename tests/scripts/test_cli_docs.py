"""docs/cli.md matches the commands' current help, and is complete."""

from __future__ import annotations

import re
from pathlib import Path

from granite4v.cli.main import app
from granite4v.cli.outcome import EXIT_STATUSES
from scripts.cli_docs import ENVIRONMENT, TARGET, document
from tests.helpers.source_tree import product_files

VARIABLE = re.compile(r"environ(?:\.get\(|\[)\"([A-Z0-9_]+)\"")


def test_the_page_is_what_the_commands_say() -> None:
    assert TARGET.read_text(encoding="utf-8") == document(), "stale: run python -m scripts.cli_docs"


def test_every_command_option_and_task_is_on_the_page() -> None:
    page = document()
    for command in app.registered_commands:
        assert command.callback is not None
        assert f"## granite4v {command.callback.__name__}\n" in page
    for text in (
        "`--ctx-size N`",
        "tables_html, ",
        "csv, html, json, otsl, md, parquet, xlsx, docling",
        "[IMAGE...] PROMPT",
    ):
        assert text in page
    assert "DIR --reference HF_DIR [OPTIONS]" in page
    assert "{" not in page


def test_the_statuses_are_those_of_the_signals_and_failures() -> None:
    assert list(EXIT_STATUSES) == [0, 1, 2, 70, 129, 130, 141, 143]


def test_every_variable_that_the_source_reads_is_on_the_page() -> None:
    known = {name for names in ENVIRONMENT for name in names.split(", ")}
    sources = [Path(path).read_text(encoding="utf-8") for path in product_files()]
    read = {name for text in sources for name in VARIABLE.findall(text)}
    assert "GRANITE4V_CACHE" in read
    assert read - known == set()
