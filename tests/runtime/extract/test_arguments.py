"""Tests of arguments that contradict each other."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import granite4v
from granite4v.runtime.extract import ArgumentError, ExtractOptions
from granite4v.runtime.extract.arguments import checked


def check(tasks: tuple[str, ...] = ("tables_html",), formats: tuple[str, ...] = (), **options: Any) -> None:
    if "kvp" in tasks:
        options["schema"] = {}
    if "prompt" in tasks:
        options["prompt"] = "What is this?"
    checked(["a.png"], ExtractOptions(tasks=tasks, formats=formats, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tasks", "formats"),
    [
        (("kvp",), ("otsl",)),
        (("kvp", "prompt"), ("json", "html")),
        (("chart2summary",), ("otsl",)),
        (("kvp",), ("md",)),
    ],
)
def test_a_format_that_no_task_has_is_refused(tasks: tuple[str, ...], formats: tuple[str, ...]) -> None:
    with pytest.raises(
        ArgumentError, match=f"the format '{formats[-1]}' is for tables and chart data, which kvp|chart"
    ):
        check(tasks, formats)


def test_a_format_that_a_task_has_is_not(tmp_path: Path) -> None:
    for tasks, formats in (
        (("kvp", "chart2csv"), ("csv", "md", "html")),
        (("kvp",), ("json",)),
        (("prompt",), ("md",)),
        (("kvp",), ("docling",)),
        (("kvp",), ("csv", "parquet", "xlsx")),
    ):
        check(tasks, formats, out=tmp_path)


@pytest.mark.parametrize("name", ["drafting", "resume", "report", "unconstrained", "fast_forward", "csv_safe"])
@pytest.mark.parametrize("value", [None, 1, "no"])
def test_what_is_neither_true_nor_false_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=f"{name} is {value!r}; expected True or False"):
        check(**{name: value})


@pytest.mark.parametrize(
    "name", ["-", "", "a\0b", "x.json", "x.JSONL", "deep/out.csv", "results.html", "scan.pdf", "t.xlsx"]
)
def test_what_is_no_directory_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError, match=r"\(--out\) .* directory"):
        check(out=name)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_may_have_any_name(tmp_path: Path) -> None:
    (tmp_path / "x.json").mkdir()
    for name in ("x.json", "v1.2", "2026-11-28", "out.d", "\u00e9 x"):
        check(out=tmp_path / name)
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(ArgumentError, match="which is not a directory"):
            check(out=tmp_path / name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retry_failed": True}, r"add 'resume' \(--resume\)"),
        ({"csv_safe": True}, r"'csv_safe' needs a directory"),
        ({"formats": ("xlsx",)}, "the format 'xlsx' needs a directory"),
        ({"tasks": ("kvp",), "formats": ("csv",)}, "the format 'csv' needs a directory"),
        ({"csv_safe": True, "out": "new"}, "'csv_safe' applies to CSV files, but none are requested"),
        ({"formats": ("html",), "csv_safe": True, "out": "new", "tasks": ("chart2csv",)}, "none are requested"),
    ],
)
def test_options_that_need_another(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        check(**options)
    check(("chart2csv",), out="new", csv_safe=True)
    check(out="new", resume=True, retry_failed=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: granite4v.extract("a.png", "tables"), "there is no task 'tables'"),
        (lambda: granite4v.extract("a.png", "kvp"), "the task 'kvp' needs a schema"),
        (lambda: granite4v.extract("a.png", "tables_html", formats="xls", out="out"), "there is no format 'xls'"),  # type: ignore[arg-type]
        (lambda: granite4v.extract("a.png", "tables_html", pages="x"), "'x'"),
        (lambda: granite4v.extract("a.png", "tables_html", crop="1"), "1"),
        (lambda: granite4v.load(n_ctx=0), "n_ctx is 0; expected 1 or more"),
        (lambda: granite4v.load(vision_compute="int4"), "vision_compute is 'int4'"),  # type: ignore[arg-type]
        (lambda: granite4v.load(cache_type="q4"), "cache_type is 'q4'"),  # type: ignore[arg-type]
        (lambda: granite4v.grammar_for("table"), "unknown task 'table'"),
        (lambda: granite4v.grammar_for("tables_html", {}), "only 'kvp' takes one"),
        (lambda: granite4v.GenerationOptions(max_tokens=-1), "max_tokens is -1; expected 0 or more"),
        (lambda: granite4v.Sampling(temperature=-1), "temperature is -1; expected 0 or more"),
        (lambda: granite4v.load_video("a.mp4", frames=1, fps=1), "not both"),
    ],
)
def test_arguments_that_make_no_sense_are_expected_errors(call: Callable[[], Any], message: str) -> None:
    """They are Granite4vErrors, as the README promises, and ValueErrors too, for callers that catch those."""
    with pytest.raises(granite4v.ArgumentError, match=re.escape(message)) as raised:
        call()
    assert isinstance(raised.value, granite4v.Granite4vError) and isinstance(raised.value, ValueError)
