"""Models from a hub into the models folder, over real HTTP, with everything that can go wrong."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from granite4v import models
from granite4v.default_model import pull_model
from granite4v.errors import CheckpointError, Granite4vError, HubError, OutputError
from granite4v.ggml.gguf_file import GgufFile
from granite4v.models import HubName
from tests.helpers.gguf_edit import tensor_bytes
from tests.helpers.hub import Hub
from tests.toy.checkpoint import PRESETS, CheckpointSpec

TINY = PRESETS["tiny"]
NAME = HubName("ibm/tiny-GGUF")
TEXT, VISION = "tiny-Q4_K_M.gguf", "mmproj-model-f16.gguf"


def pull(name: HubName = NAME, revision: str | None = None) -> models.Installed:
    return pull_model(name, lambda line: None, revision=revision)


def told(name: HubName = NAME) -> list[str]:
    """Returns the messages of a pull."""
    lines: list[str] = []
    pull_model(name, lines.append)
    return lines


def names(folder: Path) -> list[str]:
    """Returns everything in the models folder except locks and empty directories."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return sorted(map(str, found))


# --- a pair ---


def test_a_pair_comes_with_a_manifest(hub: Hub, folder: Path, pair: dict[str, bytes]) -> None:
    commit = hub.add("ibm/tiny-GGUF", pair)
    model = pull()
    assert model.path == folder / "ibm--tiny-GGUF--Q4_K_M"
    assert {name: (model.path / name).read_bytes() for name in (TEXT, VISION)} == {n: pair[n] for n in (TEXT, VISION)}
    assert names(folder) == sorted(f"{model.path.name}/{name}" for name in (TEXT, VISION, "granite4v-model.json"))
    manifest = json.loads((model.path / "granite4v-model.json").read_text())
    assert (manifest["repository"], manifest["commit"], manifest["variant"]) == ("ibm/tiny-GGUF", commit, "Q4_K_M")
    assert {file["name"]: (file["n_bytes"], file["sha256"]) for file in manifest["files"]} == {
        name: (len(pair[name]), hashlib.sha256(pair[name]).hexdigest()) for name in (TEXT, VISION)
    }
    assert models.find(NAME) == models.find(HubName("ibm/tiny-GGUF", "q4_k_m")) == model


def test_progress_grows_to_all_bytes_and_each_file_is_checked(hub: Hub, folder: Path, pair: dict[str, bytes]) -> None:
    hub.add("ibm/tiny-GGUF", pair)
    seen: list[models.PullProgress] = []
    pull_model(NAME, lambda line: None, pulled=seen.append)
    total = len(pair[TEXT]) + len(pair[VISION])
    downloading = [one.done_bytes for one in seen if one.stage == "downloading"]
    assert downloading == sorted(downloading) and (downloading[0], downloading[-1]) == (0, total)
    assert {one.total_bytes for one in seen if one.stage == "downloading"} == {total}
    assert {one.file for one in seen if one.stage == "checking"} == {TEXT, VISION}


def test_what_is_there_is_downloaded_again_only_when_it_changed(hub: Hub, folder: Path, pair: dict[str, bytes]) -> None:
    hub.add("ibm/tiny-GGUF", pair)
    first = pull()
    assert told() == [] and len(hub.downloads(TEXT)) == 1
    newer = hub.add("ibm/tiny-GGUF", {**pair, "tiny-Q4_K_M.gguf": pair[TEXT] + bytes(64)})
    model = pull()
    assert model.path == first.path and model.manifest.commit == newer != first.manifest.commit
    assert (model.path / TEXT).read_bytes() == pair[TEXT] + bytes(64)
    assert (len(hub.downloads(TEXT)), len(hub.downloads(VISION))) == (2, 1)
    back = pull(revision=first.manifest.commit)
    assert back.manifest.commit == first.manifest.commit and (back.path / TEXT).read_bytes() == pair[TEXT]
    assert len(models.installed()) == 1 and names(folder) == sorted(
        f"{back.path.name}/{name}" for name in (TEXT, VISION, "granite4v-model.json")
    )


def test_two_variants_share_the_vision_file(hub: Hub, folder: Path, pair: dict[str, bytes]) -> None:
    hub.add("ibm/tiny-GGUF", {**pair, "tiny-Q8_0.gguf": pair[TEXT] + bytes(32)})
    small, large = pull(), pull(HubName("ibm/tiny-GGUF", "Q8_0"))
    assert len(hub.downloads(VISION)) == 1
    assert (small.path / VISION).samefile(large.path / VISION)
    assert models.find(NAME) == small
    own = [small.path / name for name in (TEXT, "granite4v-model.json")]
    expected = sum(path.stat().st_size for path in own)
    assert models.remove(small) == expected and not small.path.exists()
    assert (large.path / VISION).read_bytes() == pair[VISION]
    assert models.find(NAME) == large


def test_a_damaged_model_is_not_there_and_is_mended(hub: Hub, folder: Path, pair: dict[str, bytes]) -> None:
    hub.add("ibm/tiny-GGUF", pair)
    model = pull()
    (model.path / VISION).unlink()
    assert models.find(NAME) is None
    assert pull().path == model.path and (model.path / VISION).read_bytes() == pair[VISION]
    manifest = json.loads((model.path / "granite4v-model.json").read_text())
    damaged: list[object] = [[], {**manifest, "commit": 5}, {**manifest, "pulled": "yesterday"}, {**manifest, "x": 1}]
    for content in (*map(json.dumps, damaged), "[" * 100_000, "\xff"):
        (model.path / "granite4v-model.json").write_text(content, "latin-1")
        assert models.installed() == [] and models.find(NAME) is None
    assert pull().path == model.path


# --- interrupted transfers ---


def test_a_cut_transfer_goes_on_where_it_stopped(hub: Hub, folder: Path, pair: dict[str, bytes]) -> None:
    hub.add("ibm/tiny-GGUF", pair)
    hub.faults.cuts[VISION] = [3_000_000, 2_000_000]
    model = pull()
    assert (model.path / VISION).read_bytes() == pair[VISION]
    (zero, first), (start, second), (last, rest) = hub.downloads(VISION)
    assert (zero, first, second) == (None, 3_000_000, 2_000_000)
    assert start is not None and 2_500_000 < start <= first  # at most one piece was not written yet
    assert last is not None and start + 1_500_000 < last <= start + second
    assert rest == len(pair[VISION]) - last


def test_a_later_pull_goes_on_where_an_earlier_one_gave_up(hub: Hub, folder: Path, pair: dict[str, bytes]) -> None:
    hub.add("ibm/tiny-GGUF", pair)
    hub.faults.cuts[VISION] = [4_000_000]
    hub.faults.dead_after[VISION] = 1
    with pytest.raises(HubError) as caught:
        pull()
    hub.faults.dead_after.clear()
    assert "cannot be fetched from" in str(caught.value) and "what is downloaded is kept" in str(caught.value)
    assert models.find(NAME) is None
    begun = models.incomplete()["ibm/tiny-GGUF"]
    assert len(pair[TEXT]) + 3_500_000 < begun <= len(pair[TEXT]) + 4_000_000
    hub.requests.clear()
    (line,) = told()
    assert f"{begun / 1e6:.1f} MB of it here already" in line
    ((start, n_bytes),) = hub.downloads(VISION)
    assert start == begun - len(pair[TEXT]) and n_bytes == len(pair[VISION]) - start
    assert hub.downloads(TEXT) == [] and models.incomplete() == {}
    model = models.find(NAME)
    assert model is not None and (model.path / VISION).read_bytes() == pair[VISION]


def test_a_server_without_ranges_sends_it_all_again(hub: Hub, folder: Path, pair: dict[str, bytes]) -> None:
    hub.add("ibm/tiny-GGUF", pair)
    hub.faults.cuts[VISION] = [3_000_000]
    hub.faults.ignores_ranges = True
    assert (pull().path / VISION).read_bytes() == pair[VISION]
    assert [n_bytes for _, n_bytes in hub.downloads(VISION)] == [3_000_000, len(pair[VISION])]


def test_a_server_without_ranges_that_always_breaks_off_is_given_up(
    hub: Hub, folder: Path, pair: dict[str, bytes]
) -> None:
    hub.add("ibm/tiny-GGUF", pair)
    hub.faults.cuts[VISION] = [3_000_000] * 20
    hub.faults.ignores_ranges = True
    with pytest.raises(HubError, match="cannot be fetched from"):
        pull()
    assert len(hub.downloads(VISION)) == 4  # the first one, and one after each of the fixture's three waits


def test_errors_that_pass_are_waited_for(hub: Hub, folder: Path, pair: dict[str, bytes]) -> None:
    hub.add("ibm/tiny-GGUF", pair)
    hub.faults.statuses = {"/api/models/ibm/tiny-GGUF": [500, -1, 503], TEXT: [502, 429, -1]}
    assert (pull().path / TEXT).read_bytes() == pair[TEXT]


# --- damage ---


def test_bytes_that_were_changed_on_the_way_are_noticed(hub: Hub, folder: Path, pair: dict[str, bytes]) -> None:
    hub.add("ibm/tiny-GGUF", pair)
    hub.faults.flips[VISION] = [5_000_000]
    with pytest.raises(HubError, match="'mmproj-model-f16.gguf' arrived damaged: its checksum is not the one that "):
        pull()
    assert models.installed() == []
    assert (pull().path / VISION).read_bytes() == pair[VISION]
    assert len(hub.downloads(TEXT)) == 1


def test_a_damaged_beginning_is_downloaded_again(hub: Hub, folder: Path, pair: dict[str, bytes]) -> None:
    hub.add("ibm/tiny-GGUF", pair)
    key = hashlib.sha256(pair[VISION]).hexdigest()
    partial = folder / ".downloads" / "ibm--tiny-GGUF" / f"{key}.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(bytes(1_000_000))
    assert "what was downloaded of 'mmproj-model-f16.gguf' before is damaged; downloading it again ..." in told()
    assert hub.downloads(VISION) == [(1_000_000, len(pair[VISION]) - 1_000_000), (None, len(pair[VISION]))]
    model = models.find(NAME)
    assert model is not None and (model.path / VISION).read_bytes() == pair[VISION]


def test_a_partial_file_that_is_too_long_is_dropped(hub: Hub, folder: Path, pair: dict[str, bytes]) -> None:
    hub.add("ibm/tiny-GGUF", pair)
    key = hashlib.sha256(pair[TEXT]).hexdigest()
    partial = folder / ".downloads" / "ibm--tiny-GGUF" / f"{key}.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(pair[TEXT] + b"more")
    assert (pull().path / TEXT).read_bytes() == pair[TEXT]


def test_a_damaged_file_of_another_model_is_not_taken_over(hub: Hub, folder: Path, pair: dict[str, bytes]) -> None:
    hub.add("ibm/tiny-GGUF", {**pair, "tiny-Q8_0.gguf": pair[TEXT] + bytes(32)})
    with (pull().path / VISION).open("r+b") as file:
        file.seek(5_000_000)
        file.write(b"damage")
    assert (pull(HubName("ibm/tiny-GGUF", "Q8_0")).path / VISION).read_bytes() == pair[VISION]
    assert len(hub.downloads(VISION)) == 2


@pytest.mark.parametrize(
    "listed",
    [
        {"lfs": {"sha256": "../../../outside", "size": 9, "pointerSize": 134}},
        {"lfs": {"sha256": "/tmp/outside", "size": 9, "pointerSize": 134}},
        {"lfs": None, "blobId": "../../outside"},
        {"size": "9"},
        {"size": -9},
        {"rfilename": "tiny\0-Q4_K_M.gguf"},
    ],
)
def test_a_listing_of_a_mirror_that_means_harm(
    hub: Hub, folder: Path, pair: dict[str, bytes], listed: dict[str, Any]
) -> None:
    """Its checksums and names become file names: no byte may be written outside the folder."""
    hub.add("ibm/tiny-GGUF", pair)
    hub.faults.listed[TEXT] = listed
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(HubError, match="neither GGUF files of a text model nor safetensors"):
        pull()
    assert sorted(folder.parent.rglob("*")) == before and hub.downloads(TEXT) == []


def test_files_that_are_no_model_are_refused(hub: Hub, folder: Path, pair: dict[str, bytes]) -> None:
    hub.add("ibm/tiny-GGUF", {"tiny-Q4_K_M.gguf": pair[VISION]})
    with pytest.raises(HubError, match="none of the chosen files is a text model: 'tiny-Q4_K_M.gguf' is a vision file"):
        pull()
    hub.add("ibm/tiny-GGUF", {"tiny-Q4_K_M.gguf": b"GGUF but not really"})
    with pytest.raises(Granite4vError, match="tiny-Q4_K_M.gguf"):
        pull()
    assert models.installed() == []


# --- refusals ---


def test_what_the_hub_does_not_have(hub: Hub, folder: Path, pair: dict[str, bytes]) -> None:
    hub.add("ibm/tiny-GGUF", pair)
    with pytest.raises(HubError, match=r"has no repository 'ibm/none', or it is private; check the name, or log in"):
        pull(HubName("ibm/none"))
    with pytest.raises(HubError, match=r"'ibm/tiny-GGUF' has no revision 'v9'; look at http"):
        pull(revision="v9")
    with pytest.raises(HubError, match=r"'ibm/tiny-GGUF' has no 'Q8_0'; it has: Q4_K_M\."):
        pull(HubName("ibm/tiny-GGUF", "Q8_0"))
    hub.add("ibm/empty", {})
    with pytest.raises(HubError, match="lists no files of 'ibm/empty'"):
        pull(HubName("ibm/empty"))
    assert not any(folder.glob("*"))


def test_gated_and_private_repositories_open_with_a_token(
    hub: Hub, folder: Path, pair: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("ibm/tiny-GGUF", pair)
    hub.faults.gated.add("ibm/tiny-GGUF")
    with pytest.raises(
        HubError, match=r"'ibm/tiny-GGUF' is gated: accept its conditions at http.*/ibm/tiny-GGUF, then"
    ):
        pull()
    hub.faults.private.add("ibm/tiny-GGUF")
    with pytest.raises(HubError, match="or it is private"):
        pull()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match=r"refuses access to 'ibm/tiny-GGUF' \(status 401\); check HF_TOKEN"):
        pull()
    monkeypatch.setenv("HF_TOKEN", hub.token)
    pull()
    sent = {one.authorization for one in hub.requests[-4:] if one.host.startswith("localhost")}
    assert sent == {None}  # the token is not sent to hosts that the hub redirects to


def test_a_rate_limit_that_lasts_is_told_at_once(hub: Hub, folder: Path, pair: dict[str, bytes]) -> None:
    hub.add("ibm/tiny-GGUF", pair)
    hub.faults.statuses["/api/models/ibm/tiny-GGUF"] = [429]
    hub.faults.retry_after = "300"
    with pytest.raises(HubError, match=r"limits how much may be asked of it \(status 429\); try again in 300 seconds"):
        pull()


def test_a_hub_that_stays_broken(hub: Hub, folder: Path, pair: dict[str, bytes]) -> None:
    hub.add("ibm/tiny-GGUF", pair)
    hub.faults.statuses["/api/models/ibm/tiny-GGUF"] = [500] * 9
    with pytest.raises(HubError, match=r"cannot be fetched from http.*: status 500\. Check the network, or try again"):
        pull()
    assert len(hub.faults.statuses["/api/models/ibm/tiny-GGUF"]) == 9 - 4


def test_no_connection(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        HubError, match=r"'ibm/tiny-GGUF' cannot be fetched from http://127.0.0.1:9: .*Check the network"
    ):
        pull()


def test_a_disk_without_room_is_seen_before_the_download(
    hub: Hub, folder: Path, pair: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("ibm/tiny-GGUF", pair)
    usage = shutil.disk_usage(folder.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=70_000_000))
    with pytest.raises(OutputError, match=r"needs 0\.07 GB and its disk has 0\.07 GB free\. GRANITE4V_MODELS names"):
        pull()
    assert hub.downloads(TEXT) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=80_000_000))
    pull()


def test_a_folder_that_cannot_be_made(
    hub: Hub, pair: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("ibm/tiny-GGUF", pair)
    (tmp_path / "file").touch()
    monkeypatch.setenv("GRANITE4V_MODELS", str(tmp_path / "file" / "models"))
    with pytest.raises(OutputError, match="GRANITE4V_MODELS names the models folder"):
        pull()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full, a disk that is always full")
def test_a_disk_that_fills_up_keeps_what_came(hub: Hub, folder: Path, pair: dict[str, bytes]) -> None:
    hub.add("ibm/tiny-GGUF", pair)
    key = hashlib.sha256(pair[VISION]).hexdigest()
    partial = folder / ".downloads" / "ibm--tiny-GGUF" / f"{key}.partial"
    partial.parent.mkdir(parents=True)
    partial.symlink_to("/dev/full")
    with pytest.raises(OutputError, match="no space left for"):
        pull()
    partial.unlink()
    pull()
    assert len(hub.downloads(TEXT)) == 1


# --- checkpoints ---


@pytest.fixture
def checkpoint(make_checkpoint: Callable[[CheckpointSpec], Path]) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in make_checkpoint(TINY).iterdir()}


def test_a_checkpoint_is_converted_and_not_kept(
    hub: Hub, folder: Path, checkpoint: dict[str, bytes], make_model: Callable[..., Path]
) -> None:
    commit = hub.add("ibm/tiny", {**checkpoint, "README.md": b"read me"})
    model = pull(HubName("ibm/tiny", "f16"))
    assert model.path == folder / "ibm--tiny--F16" and model.manifest.is_converted
    expected = make_model(TINY, "F16", "F16")
    for name in ("text-F16.gguf", "mmproj-F16.gguf"):
        assert tensor_bytes(model.path / name) == tensor_bytes(expected / name)
        with GgufFile.open(model.path / name) as file:
            assert (file["granite4v.source"], file["granite4v.revision"]) == ("ibm/tiny", commit)
    files = ("granite4v-model.json", "mmproj-F16.gguf", "text-F16.gguf")
    assert names(folder) == [f"ibm--tiny--F16/{name}" for name in files]
    assert hub.downloads("README.md") == []


def test_the_default_is_that_of_convert(hub: Hub, folder: Path, checkpoint: dict[str, bytes]) -> None:
    hub.add("ibm/tiny", checkpoint)
    assert sorted(path.name for path in pull(HubName("ibm/tiny")).path.glob("*.gguf")) == [
        "mmproj-F16.gguf",
        "text-Q4_K_M.gguf",
    ]


def test_an_unknown_type_is_refused_before_the_download(hub: Hub, folder: Path, checkpoint: dict[str, bytes]) -> None:
    hub.add("ibm/tiny", checkpoint)
    with pytest.raises(Granite4vError, match="unknown quantization type 'Q9' .*known: F32"):
        pull(HubName("ibm/tiny", "Q9"))
    assert hub.downloads(".safetensors") == []


@pytest.mark.parametrize("has_hard_links", [True, False])
def test_a_conversion_that_fails_keeps_the_download(
    hub: Hub, folder: Path, checkpoint: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, has_hard_links: bool
) -> None:
    hub.add("ibm/tiny", checkpoint)

    def fail(*_: object) -> None:
        raise CheckpointError("no conversion today.")

    def refuse(*_: object) -> None:
        raise PermissionError("no hard links here")

    with monkeypatch.context() as context:
        if not has_hard_links:
            context.setattr("granite4v.models.pulling.os.link", refuse)
        context.setattr("granite4v.converter.convert", fail)
        with pytest.raises(CheckpointError, match="no conversion today"):
            pull(HubName("ibm/tiny"))
    assert models.installed() == [] and models.incomplete() == {"ibm/tiny": sum(map(len, checkpoint.values()))}
    hub.requests.clear()
    pull(HubName("ibm/tiny"))
    assert not any(one.n_bytes for one in hub.requests)
    assert models.incomplete() == {}
