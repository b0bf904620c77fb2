"""Fixtures: a fake model and documents for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.fake_model import FakeModel, make_scans


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    monkeypatch.setenv("GRANITE4V_CACHE", str(tmp_path / "cache"))
    return FakeModel(tmp_path / "text.gguf")


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    return make_scans(tmp_path / "scans")
