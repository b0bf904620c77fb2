"""Fixtures: a model with random weights for all checks, and a function that runs a check in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.harness import model_directory

Ran = tuple[int, dict[str, Any], str]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_directory(None, tmp_path_factory.mktemp("acceptance"))


@pytest.fixture(scope="session")
def side_by_side(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in F16, which answers several questions at once."""
    return model_directory(None, tmp_path_factory.mktemp("acceptance"), "F16")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Calls a check's `main`; returns its status, the JSON of the last line on stdout, and stderr."""

    def run(main: Callable[[list[str]], int], *arguments: Any) -> Ran:
        status = main([*map(str, arguments), "--threads", "1"])
        out, err = capsys.readouterr()
        return status, json.loads(out.splitlines()[-1]), err

    return run
