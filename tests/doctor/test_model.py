"""How much memory a model takes, compared with what llama.cpp allocates for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from granite4v.doctor import model
from granite4v.doctor.model import WORKING_BYTES, check_model
from granite4v.runtime.engine.parallel import kv_bytes_per_token
from granite4v.runtime.llama.files import ModelFiles
from tests.toy.spec import PRESETS


@pytest.fixture(scope="module")
def folder(make_model: Callable[..., Path]) -> Path:
    return make_model(PRESETS["tiny"])


def test_the_kv_cache_is_what_the_checkpoint_s_sizes_say(folder: Path) -> None:
    spec = PRESETS["tiny"]
    with ModelFiles.open(folder) as files:
        head_dim = spec.text_hidden // spec.text_heads
        assert kv_bytes_per_token(files) == spec.text_layers * spec.text_kv_heads * head_dim * 2 * 2


def test_a_context_that_fits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = check_model(folder)
    weights = sum(path.stat().st_size for path in folder.glob("*.gguf"))
    assert found.data["weights_bytes"] == weights and not found.problems
    room = weights + WORKING_BYTES + 100 * found.data["kv_bytes_per_token"]
    monkeypatch.setattr(model, "available_memory", lambda: room)
    found = check_model(folder)
    assert found.data["context_that_fits"] == 100
    (problem,) = found.problems
    assert problem.is_serious and "'--ctx-size'" in problem.text
    monkeypatch.setattr(model, "available_memory", lambda: 0)
    assert check_model(folder).data["context_that_fits"] == 0
    monkeypatch.setattr(model, "available_memory", lambda: None)
    assert "context_that_fits" not in check_model(folder).data


def test_a_model_that_is_not_there_is_a_problem_of_its_own(tmp_path: Path) -> None:
    (problem,) = check_model(tmp_path / "nothing").problems
    assert problem.is_serious and "does not exist" in problem.text
