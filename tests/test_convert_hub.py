"""Checkpoints by hub id, from a cache made by hand: no test reaches the network."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from make_checkpoint import PRESETS, AdapterSpec, CheckpointSpec, write_adapter
from test_quant import tensor_bytes

from granite4v.converter import Options, convert, plan_conversion
from granite4v.converter.hub import locate
from granite4v.errors import CheckpointError

TINY = PRESETS["tiny"]
COMMIT, OTHER = "0123456789abcdef" * 2 + "01234567", "f" * 40


@pytest.fixture
def cache(make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with 'owner/model' in two commits, and 'owner/adapter', which names it as its base."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model, adapter = tmp_path / "hub" / "models--owner--model", tmp_path / "hub" / "models--owner--adapter"
    shutil.copytree(make_checkpoint(TINY), model / "snapshots" / COMMIT)
    shutil.copytree(make_checkpoint(replace(TINY, seed=3)), model / "snapshots" / OTHER)
    spec = AdapterSpec(base_model_name_or_path="owner/model")
    write_adapter(adapter / "snapshots" / COMMIT, TINY, spec)
    for repository, revisions in ((model, {"main": COMMIT, "v2": OTHER}), (adapter, {"main": COMMIT})):
        (repository / "refs").mkdir()
        for name, commit in revisions.items():
            (repository / "refs" / name).write_text(commit)
    return tmp_path / "hub"


def test_a_hub_id_is_converted_from_the_cache_and_its_commit_is_kept(cache: Path, tmp_path: Path) -> None:
    summary = convert("owner/model", tmp_path / "out", Options("F32", "F32"))
    metadata = summary.plan.files[0].metadata
    assert metadata["granite4v.source"] == "owner/model"
    assert metadata["granite4v.revision"] == COMMIT
    assert metadata["general.name"] == "model"


def test_a_revision_is_honoured(cache: Path) -> None:
    assert locate("owner/model", "v2").revision == OTHER
    assert plan_conversion("owner/model", Options(revision="v2")).files[0].metadata["granite4v.revision"] == OTHER


def test_a_snapshot_given_as_a_directory_knows_its_commit(cache: Path) -> None:
    assert locate(str(cache / "models--owner--model" / "snapshots" / COMMIT)).revision == COMMIT


def test_an_adapter_on_the_hub_brings_its_base(cache: Path, tmp_path: Path) -> None:
    convert("owner/adapter", tmp_path / "alone", Options("F32", "F32"))
    convert("owner/model", tmp_path / "given", Options("F32", "F32", adapter="owner/adapter"))
    ours, theirs = (tensor_bytes(tmp_path / name / "text-F32.gguf") for name in ("alone", "given"))
    assert ours == theirs


def test_what_is_neither_here_nor_on_the_hub(cache: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no directory 'owner/absent' here, and the hub repository"):
        locate("owner/absent")
    with pytest.raises(CheckpointError, match="of that name at revision 'v9' could not be fetched"):
        locate("owner/model", "v9")
