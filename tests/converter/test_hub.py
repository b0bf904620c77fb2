"""Checkpoints by hub id, from a handmade cache: no test reaches the network."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from granite4v.converter import Options, convert, hub, plan_conversion
from granite4v.converter.hub import locate
from granite4v.errors import CheckpointError
from tests.helpers.gguf_edit import tensor_bytes
from tests.toy.checkpoint import PRESETS, AdapterSpec, CheckpointSpec, write_adapter

TINY = PRESETS["tiny"]
COMMIT, OTHER = "0123456789abcdef" * 2 + "01234567", "f" * 40


@pytest.fixture
def cache(make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with 'owner/model' in two commits, and with 'owner/adapter', whose base it is."""
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


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Goes online with a hub that has nothing; the list records what it is asked for."""
    from huggingface_hub import constants

    asked: list[str] = []

    def snapshot_download(repository: str, **options: object) -> str:
        asked.append(repository)
        raise OSError("no network in tests")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    return asked


def test_a_base_that_an_adapter_chooses_is_announced_before_it_is_fetched(online: list[str], tmp_path: Path) -> None:
    spec = AdapterSpec(base_model_name_or_path="owner/model")
    adapter = write_adapter(tmp_path / "adapter", TINY, spec)
    told: list[tuple[str, int]] = []
    with pytest.raises(CheckpointError, match="the hub repository of that name could not be fetched"):
        plan_conversion(adapter, report=lambda line: told.append((line, len(online))))
    ((line, asked),) = told
    assert line.startswith(f"the adapter '{adapter}' names its base model: there is no directory 'owner/model' here; ")
    assert "fetching 'owner/model' from https://" in line
    assert asked == 0
    assert online == ["owner/model"]


def test_without_a_reporter_that_base_is_logged(
    online: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = write_adapter(tmp_path / "adapter", TINY, AdapterSpec(base_model_name_or_path="owner/model"))
    with pytest.raises(CheckpointError):
        plan_conversion(adapter)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "fetching 'owner/model' from https://" in caplog.text


def test_the_command_announces_it_on_stderr(online: list[str], tmp_path: Path) -> None:
    from granite4v.cli.main import app

    adapter = write_adapter(tmp_path / "adapter", TINY, AdapterSpec(base_model_name_or_path="owner/model"))
    result = CliRunner().invoke(app, ["convert", str(adapter), str(tmp_path / "out")])
    assert (result.exit_code, result.stdout) == (1, "")
    first, *_ = result.stderr.splitlines()
    assert first.startswith(f"the adapter '{adapter}' names its base model: ")


def test_nothing_is_fetched_for_a_base_that_is_given(
    online: list[str], make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", TINY, AdapterSpec(base_model_name_or_path="owner/model"))
    told: list[str] = []
    plan_conversion(make_checkpoint(TINY), Options(adapter=str(adapter)), told.append)
    assert (online, told) == ([], [])


@pytest.mark.parametrize(
    "name",
    ["./models/granite", "../models/granite", "/models/granite", "models/granite/4.1", "~/models", "a..b/c", "x" * 400],
)
def test_a_path_that_does_not_exist_is_not_asked_of_the_hub(name: str, online: list[str]) -> None:
    with pytest.raises(CheckpointError, match="there is no directory|cannot read") as caught:
        plan_conversion(name)
    assert name in str(caught.value)
    assert online == []


def test_a_name_without_a_home(online: list[str]) -> None:
    with pytest.raises(CheckpointError, match="cannot read '~no-such-user/models'"):
        plan_conversion("~no-such-user/models")


def test_a_web_address_is_answered_with_the_hub_id(online: list[str]) -> None:
    for address, advice in (
        ("https://huggingface.co/owner/model", "'owner/model'."),
        ("https://huggingface.co/owner/model/", "'owner/model'."),
        ("http://www.huggingface.co/owner/model?library=x", "'owner/model'."),
        ("huggingface.co/owner/model.v1", "'owner/model.v1'."),
        ("https://hf.co/owner/model/tree/v2", "'owner/model', with --revision v2."),
        ("https://huggingface.co/owner/model/blob/main/config.json", "'owner/model', with --revision main."),
    ):
        with pytest.raises(CheckpointError) as caught:
            locate(address)
        assert str(caught.value) == f"'{address}' is a web address; give the hub id {advice}"
    assert online == []


def test_a_download_has_one_bar_that_moves_no_cursor() -> None:
    """The three bars of huggingface_hub's snapshot_download are active at the same time."""
    stream = io.StringIO()
    options = [
        {"unit": "B", "unit_scale": True, "name": "huggingface_hub.snapshot_download.transfer", "desc": "Downloading"},
        {"unit": "B", "unit_scale": True, "name": "huggingface_hub.snapshot_download", "desc": "Reconstructing"},
        {"desc": "Fetching 3 files"},
    ]
    bars = [hub.DownloadBar(total=10, file=stream, mininterval=0, miniters=1, **option) for option in options]
    for _ in range(10):
        for bar in bars:
            bar.update(1)
    for bar in bars:
        bar.close()
    shown = stream.getvalue()
    assert "Reconstructing: 100%" in shown and "\x1b" not in shown
    assert "Downloading" not in shown and "Fetching" not in shown
