"""Shared fixtures: checkpoints, models and references, each made once per run."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from granite4v.converter import Options, convert
from tests.toy.checkpoint import CheckpointSpec, write_checkpoint

if TYPE_CHECKING:
    from tests.peers.reference import Reference

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach the network
os.environ["GRANITE4V_CONFIG"] = os.devnull  # ignores the user's own configuration
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def pytest_configure() -> None:
    """Restores the default SIGINT handler. A shell starts background jobs with Ctrl-C ignored, and every process that
    the tests start would inherit that."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def own_page_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives each test a page store of its own, because the user's may hold pages from an earlier run. Child processes
    use the test's store, too, unless a test gives them another."""
    monkeypatch.setattr("granite4v.runtime.engine.page_store.FOLDER", str(tmp_path / "own-page-store"))


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[CheckpointSpec], Path]:
    """Returns the directory of a checkpoint. Each specification is written once per run; treat it as read-only."""
    made: dict[CheckpointSpec, Path] = {}

    def make(spec: CheckpointSpec) -> Path:
        if spec not in made:
            made[spec] = write_checkpoint(tmp_path_factory.mktemp("checkpoint"), spec)
        return made[spec]

    return make


@pytest.fixture(scope="session")
def make_model(
    make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Returns the model directory of a specification, F32 by default. Converted once per run; treat it as read-only."""
    made: dict[tuple[CheckpointSpec, str, str], Path] = {}

    def make(spec: CheckpointSpec, text_type: str = "F32", vision_type: str = "F32") -> Path:
        if (spec, text_type, vision_type) not in made:
            out = tmp_path_factory.mktemp("model") / "model"
            convert(make_checkpoint(spec), out, Options(text_type=text_type, vision_type=vision_type))
            made[spec, text_type, vision_type] = out
        return made[spec, text_type, vision_type]

    return make


@pytest.fixture(scope="session")
def load_reference(make_checkpoint: Callable[[CheckpointSpec], Path]) -> Callable[..., Reference]:
    """Returns the reference for a specification (and an adapter's directory), loaded once per run."""
    from tests.peers.reference import Reference

    loaded: dict[tuple[CheckpointSpec, Path | None], Reference] = {}

    def load(spec: CheckpointSpec, adapter: Path | None = None) -> Reference:
        if (spec, adapter) not in loaded:
            loaded[spec, adapter] = Reference(make_checkpoint(spec), adapter)
        return loaded[spec, adapter]

    return load
