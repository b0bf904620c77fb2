"""The check of flat memory passes with small numbers, and detects a leak."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance import memory
from tests.acceptance.conftest import Ran


@pytest.mark.slow
def test_it_says_what_it_saw(model: Path, run: Callable[..., Ran]) -> None:
    arguments = ("--pages", 6, "--from-page", 3, "--tolerance", 5, "--max-tokens", 4, "--width-px", 170)
    status, told, err = run(memory.main, "--model", model, *arguments)
    assert (status, told["ok"], told["pages"], told["from_page"]) == (0, True, 6, 3)
    assert told["rss_ratio"] == pytest.approx(told["rss_mb"][1] / told["rss_mb"][0], abs=1e-3)
    assert len(told["trend_mb"]) == 6 and len(told["peak_mb"]) == 2 and "peak_ratio" in told
    assert "MB around page 3" in err


def test_a_leak_is_a_broken_promise(model: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Ran]) -> None:
    def leaking(function: Any, folder: Path, *_: Any) -> list[tuple[float, float | None]]:
        assert function is memory.memory_by_page and folder.is_dir()
        return [(100.0 + i, 150.0) for i in range(40)]

    monkeypatch.setattr(memory, "in_new_process", leaking)
    status, told, _ = run(memory.main, "--model", model, "--pages", 40, "--width-px", 17)
    assert (status, told["rss_mb"], told["peak_ratio"]) == (1, [114.5, 134.5], 1.0)
    assert told["broken"] == ["rss grew by 17.5% from page 20 to 40; expected at most 5%"]
