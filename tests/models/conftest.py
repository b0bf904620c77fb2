"""A fake hub in this process, and a models folder that does not exist yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from granite4v.models import hub as hub_client
from tests.helpers.hub import Hub, serving
from tests.toy.checkpoint import PRESETS


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """An empty hub in place of the real one, without a token and without long waits."""
    monkeypatch.setattr(hub_client, "WAITS_S", (0.01, 0.01, 0.01))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(tmp_path / "no-harnesses"), raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serving() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = f"{running.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield running


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The models folder, which does not exist yet."""
    monkeypatch.setenv("GRANITE4V_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


@pytest.fixture(scope="session")
def pair(make_model: Callable[..., Path]) -> dict[str, bytes]:
    """The files of a repository with a GGUF pair, under official names."""
    made = make_model(PRESETS["tiny"], "F16", "F16")
    return {
        "README.md": b"# A model",
        "tiny-Q4_K_M.gguf": (made / "text-F16.gguf").read_bytes(),
        "mmproj-model-f16.gguf": (made / "mmproj-F16.gguf").read_bytes(),
    }
