"""`granite4v models`, and `--model` with a name on the hub: processes, signals, and a fake hub over real HTTP."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import granite4v
from granite4v import default_model
from granite4v.cli.main import app
from tests.helpers.hub import Hub, serving
from tests.toy.checkpoint import PRESETS, CheckpointSpec

TINY = PRESETS["tiny"]
TEXT, VISION = "tiny-Q4_K_M.gguf", "mmproj-model-f16.gguf"
HALF = 3_000_000  # about half of the vision file
# The command with a conversion that reports when it writes, and never ends.
STUCK = """
import time
from granite4v.converter import conversion
def write(file, path, *rest):
    path.write_bytes(b"half a file")
    print("writing", flush=True)
    time.sleep(60)
conversion.write_file = write
from granite4v.cli.entry import entry
entry()
"""
PAGE = Path(__file__).parents[1] / "data" / "invoice.png"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The models folder, which does not exist yet."""
    monkeypatch.setenv("GRANITE4V_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


@pytest.fixture(scope="module")
def pair(make_model: Callable[..., Path]) -> dict[str, bytes]:
    made = make_model(TINY, "F16", "F16")
    return {TEXT: (made / "text-F16.gguf").read_bytes(), VISION: (made / "mmproj-F16.gguf").read_bytes()}


class Command:
    """Runs `granite4v` as a process that uses a fake hub."""

    def __init__(self, hub: Hub, folder: Path, **variables: str) -> None:
        self.environment = {
            **{name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_OFFLINE")},
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(folder.with_name("hf-home")),
            "GRANITE4V_MODELS": str(folder),
            **variables,
        }

    def start(self, *arguments: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "granite4v", *map(str, arguments)]
        return subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def __call__(self, *arguments: Any) -> tuple[int, str, str]:
        with self.start(*arguments) as process:
            stdout, stderr = process.communicate(timeout=120)
        return process.returncode, stdout, stderr


def invoke(*arguments: Any) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


# --- pull ---


def test_pull_prints_the_model_and_its_folder(hub: Hub, folder: Path, pair: dict[str, bytes]) -> None:
    hub.add("ibm/tiny-GGUF", pair)
    run = Command(hub, folder)
    status, stdout, stderr = run("models", "pull", "ibm/tiny-GGUF")
    assert (status, stdout) == (0, f"ibm/tiny-GGUF:Q4_K_M  7.3 MB  {folder / 'ibm--tiny-GGUF--Q4_K_M'}\n")
    assert stderr.startswith(f"pulling 'ibm/tiny-GGUF' (Q4_K_M, 2 files, 7.3 MB) from {hub.url} to '{folder}")
    assert run("models", "pull", "ibm/tiny-GGUF") == (0, stdout, "")
    assert len(hub.downloads(VISION)) == 1


def test_a_pull_that_fails_does_not_stop_the_others(hub: Hub, folder: Path, pair: dict[str, bytes]) -> None:
    hub.add("ibm/tiny-GGUF", pair)
    status, stdout, stderr = Command(hub, folder)("models", "pull", "ibm/none", "ibm/tiny-GGUF", "tiny")
    assert (status, stdout) == (1, f"ibm/tiny-GGUF:Q4_K_M  7.3 MB  {folder / 'ibm--tiny-GGUF--Q4_K_M'}\n")
    assert "granite4v: 'ibm/none': " in stderr and "granite4v: 'tiny': 'tiny' does not exist, and it is no" in stderr
    assert stderr.endswith("granite4v: 2 of 3 models failed: ibm/none, tiny\n")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_pull_that_was_ended_goes_on(hub: Hub, folder: Path, pair: dict[str, bytes], number: signal.Signals) -> None:
    hub.add("ibm/tiny-GGUF", pair)
    hub.faults.holds[VISION] = HALF
    run = Command(hub, folder)
    with run.start("models", "pull", "ibm/tiny-GGUF") as process:
        assert hub.held.wait(60)
        wait_for_bytes(folder, len(pair[TEXT]) + HALF - (1 << 18))
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    if number != signal.SIGKILL:
        assert "what is downloaded is kept; the same command goes on from there" in stderr and "Traceback" not in stderr
    assert invoke("models", "path", "ibm/tiny-GGUF")[0] == 1
    status, stdout, stderr = invoke("models", "list")
    assert (status, stdout) == (0, "") and "MB of 'ibm/tiny-GGUF'; 'models pull' goes on with it" in stderr

    hub.go_on.set()
    hub.faults.holds.clear()
    hub.requests.clear()
    assert run("models", "pull", "ibm/tiny-GGUF")[0] == 0
    ((start, n_bytes),) = hub.downloads(VISION)
    assert start is not None and HALF - (1 << 18) <= start <= HALF and n_bytes == len(pair[VISION]) - start
    assert hub.downloads(TEXT) == []
    made = folder / "ibm--tiny-GGUF--Q4_K_M"
    assert {name: (made / name).read_bytes() for name in pair} == pair


def wait_for_bytes(folder: Path, n_bytes: int) -> None:
    """Returns once `n_bytes` of a download are on disk."""
    for _ in range(600):
        if sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) >= n_bytes:
            return
        time.sleep(0.05)
    raise AssertionError("the download does not proceed")


def test_two_processes_that_pull_at_once_download_once(hub: Hub, folder: Path, pair: dict[str, bytes]) -> None:
    hub.add("ibm/tiny-GGUF", pair)
    hub.faults.holds[VISION] = HALF
    run = Command(hub, folder)
    with run.start("models", "pull", "ibm/tiny-GGUF") as first:
        assert hub.held.wait(60)
        with run.start("models", "pull", "ibm/tiny-GGUF") as second:
            assert second.stderr is not None
            assert "another process is pulling from this repository" in second.stderr.readline()
            status, _, stderr = invoke("models", "rm", "ibm/tiny-GGUF")
            assert status == 1 and "another process is pulling from 'ibm/tiny-GGUF'; end it first" in stderr
            hub.go_on.set()
            ended = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0) and ended[0] == ended[1] != ""
    assert [one for name in (TEXT, VISION) for one in hub.downloads(name)] == [
        (None, len(pair[TEXT])),
        (None, len(pair[VISION])),
    ]


def test_a_name_that_is_wrong(hub: Hub, folder: Path, pair: dict[str, bytes], tmp_path: Path) -> None:
    hub.add("ibm/tiny-GGUF", pair)
    run = Command(hub, folder)
    for arguments, message in (
        (("models", "pull", "ibm/tiny-GGUF:Q9"), "'ibm/tiny-GGUF' has no 'Q9'; it has: Q4_K_M."),
        (("models", "pull", "tiny"), "'tiny' does not exist, and it is no hub id ('owner/name', or "),
        (("ask", "Hello", "--model", "ibm/none"), f"there is no file or folder 'ibm/none' here; {hub.url} has no "),
        (("ask", "Hello", "--model", "tiny"), "'tiny' does not exist, and it is no hub id ('owner/name', or "),
        (("inspect", "some/deep/path"), "'some/deep/path' does not exist, and it is no hub id ('owner/name', or "),
        (("ask", "Hello", "--model", f"{tmp_path}/none"), "does not exist; give a model directory made by"),
        (
            ("ask", "Hello", "--model", "ibm/text.gguf"),
            "'ibm/text.gguf' does not exist; give a model directory made by",
        ),
        (
            ("ask", "Hello", "--model", "https://huggingface.co/ibm/tiny-GGUF"),
            "is a web address; give the hub id 'ibm/tiny-GGUF'.",
        ),
    ):
        status, stdout, stderr = run(*arguments)
        assert (status, stdout) == (1, "") and stderr.startswith("granite4v: ") and message in stderr
        assert len(stderr.splitlines()) == 1


# --- use ---


def test_a_command_pulls_on_first_use_and_never_asks_again(hub: Hub, folder: Path, pair: dict[str, bytes]) -> None:
    hub.add("ibm/tiny-GGUF", pair)
    run = Command(hub, folder)
    ask = ("ask", "Hello", "--max-tokens", "4", "--model", "ibm/tiny-GGUF:q4_k_m")
    status, answer, stderr = run(*ask)
    assert status == 0 and answer and "pulling 'ibm/tiny-GGUF' (Q4_K_M, 2 files" in stderr
    hub.requests.clear()
    assert run(*ask)[:2] == (0, answer)
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        offline = Command(hub, folder, **{variable: "1"})
        assert offline(*ask)[:2] == (0, answer)
        status, stdout, stderr = offline("ask", "Hello", "--model", "ibm/tiny-GGUF:Q8_0")
        assert (status, stdout) == (1, "") and "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) forbids it" in stderr
    assert hub.requests == []


def test_a_path_comes_before_a_name_on_the_hub(
    hub: Hub, folder: Path, pair: dict[str, bytes], make_model: Callable[..., Path], tmp_path: Path
) -> None:
    hub.add("ibm/tiny-GGUF", pair)
    (tmp_path / "ibm").mkdir()
    (tmp_path / "ibm" / "tiny-GGUF").symlink_to(make_model(TINY))
    done = subprocess.run(
        [sys.executable, "-m", "granite4v", "inspect", "ibm/tiny-GGUF"],
        env={**Command(hub, folder).environment, "PYTHONPATH": os.getcwd()},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "ibm/tiny-GGUF/text-F32.gguf" in done.stdout
    assert hub.requests == [] and not folder.exists()


def test_a_checkpoint_is_converted_on_first_use(
    hub: Hub, folder: Path, make_checkpoint: Callable[[CheckpointSpec], Path]
) -> None:
    hub.add("ibm/tiny", {path.name: path.read_bytes() for path in make_checkpoint(TINY).iterdir()})
    run = Command(hub, folder)
    status, stdout, stderr = run("inspect", "ibm/tiny:Q8_0", "--json")
    assert status == 0 and "converting 'ibm/tiny' to Q8_0 ..." in stderr
    files = {Path(file["path"]).name for file in json.loads(stdout)["files"]}
    assert files == {"text-Q8_0.gguf", "mmproj-F16.gguf"}
    assert run("inspect", "ibm/tiny:Q8_0", "--json") == (0, stdout, "")


def test_a_conversion_that_was_killed_begins_again_without_a_download(
    hub: Hub, folder: Path, make_checkpoint: Callable[[CheckpointSpec], Path]
) -> None:
    hub.add("ibm/tiny", {path.name: path.read_bytes() for path in make_checkpoint(TINY).iterdir()})
    run = Command(hub, folder)
    command = [sys.executable, "-c", STUCK, "models", "pull", "ibm/tiny"]
    with subprocess.Popen(command, env=run.environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        process.kill()
    assert invoke("models", "path", "ibm/tiny")[0] == 1
    hub.requests.clear()
    assert run("models", "pull", "ibm/tiny")[0] == 0
    assert [one.path for one in hub.requests if "/resolve/" in one.path] == []
    made = folder / "ibm--tiny--Q4_K_M"
    left = [path for path in folder.rglob("*") if made not in (path, path.parent)]
    assert sorted(path.name for path in left) == [".downloads", "ibm--tiny", "ibm--tiny.lock"]
    assert sorted(path.name for path in made.iterdir()) == [
        "granite4v-model.json",
        "mmproj-F16.gguf",
        "text-Q4_K_M.gguf",
    ]


def test_a_page_is_read_by_a_model_of_the_hub(hub: Hub, folder: Path) -> None:
    """The trained model under official names gives the same answer as the embedded one."""
    nano = default_model.embedded_model(lambda line: None)
    names = {"nano-vision-f16.gguf": "text-F16.gguf", "mmproj-model-f16.gguf": "mmproj-F16.gguf"}
    hub.add("ibm/nano-GGUF", {name: (nano / own).read_bytes() for name, own in names.items()})
    ask = ("ask", PAGE, "<tables_json>", "--max-tokens", "300")
    run = Command(hub, folder)
    status, ours, _ = run(*ask, "--model", "ibm/nano-GGUF")
    embedded = run(*ask)
    assert (status, ours) == embedded[:2] and ours.startswith("{")


def test_python_loads_it_by_its_name(hub: Hub, folder: Path, pair: dict[str, bytes]) -> None:
    hub.add("ibm/tiny-GGUF", pair)
    code = (
        "import granite4v\n"
        "with granite4v.load('ibm/tiny-GGUF') as model:\n"
        "    print(model.files.text.path)\n"
        "    print(model.files.vision.path)\n"
    )
    environment = Command(hub, folder).environment
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    made = folder / "ibm--tiny-GGUF--Q4_K_M"
    assert done.stdout.splitlines() == [str(made / TEXT), str(made / VISION)]
    with pytest.raises(granite4v.ModelFileError, match="does not exist"):
        granite4v.load(Path("ibm/tiny-GGUF"))  # a Path is a path


# --- list, path, rm ---


@pytest.fixture
def two(hub: Hub, folder: Path, pair: dict[str, bytes]) -> Path:
    """A models folder with two variants of one repository."""
    hub.add("ibm/tiny-GGUF", {**pair, "tiny-Q8_0.gguf": pair[TEXT] + bytes(32)})
    assert Command(hub, folder)("models", "pull", "ibm/tiny-GGUF", "ibm/tiny-GGUF:Q8_0")[0] == 0
    return folder


def test_list_names_sizes_and_dates(two: Path) -> None:
    os.utime(two / "ibm--tiny-GGUF--Q8_0" / "granite4v-model.json", (1.7e9, 1.7e9))
    status, stdout, stderr = invoke("models", "list")
    assert (status, stderr) == (0, "")
    heading, first, second = stdout.splitlines()
    assert heading.split() == ["NAME", "SIZE", "LAST", "USED", "COMMIT"]
    assert first.split()[:3] == ["ibm/tiny-GGUF:Q4_K_M", "7.3", "MB"]
    assert second.split()[0] == "ibm/tiny-GGUF:Q8_0" and "2023-11-1" in second
    assert invoke("inspect", "ibm/tiny-GGUF:Q8_0")[0] == 0  # which counts as a use
    assert "2023" not in invoke("models", "list")[1]
    data = json.loads(invoke("models", "list", "--json")[1])
    assert data["folder"] == str(two) and data["incomplete"] == []
    assert [(model["variant"], model["path"]) for model in data["models"]] == [
        (variant, str(two / f"ibm--tiny-GGUF--{variant}")) for variant in ("Q4_K_M", "Q8_0")
    ]


def test_path_prints_the_folder_alone(two: Path) -> None:
    assert invoke("models", "path", "ibm/tiny-GGUF") == (0, f"{two / 'ibm--tiny-GGUF--Q4_K_M'}\n", "")
    assert invoke("models", "path", "ibm/tiny-GGUF:q8_0") == (0, f"{two / 'ibm--tiny-GGUF--Q8_0'}\n", "")
    status, stdout, stderr = invoke("models", "path", "ibm/tiny-GGUF:F16")
    assert (status, stdout) == (1, "") and "'granite4v models pull ibm/tiny-GGUF:F16' fetches it" in stderr


def test_rm_removes_one_model_and_says_what_that_frees(two: Path, pair: dict[str, bytes]) -> None:
    status, stdout, stderr = invoke("models", "rm", "ibm/tiny-GGUF")
    assert (status, stdout) == (1, "")
    assert "there are several models of 'ibm/tiny-GGUF'; name one: ibm/tiny-GGUF:Q4_K_M, ibm/tiny-GGUF:Q8_0." in stderr
    # the vision file stays, because the other model uses it, too
    assert invoke("models", "rm", "ibm/tiny-GGUF:Q4_K_M") == (0, "", "removed ibm/tiny-GGUF:Q4_K_M: 0.8 MB freed\n")
    assert invoke("models", "rm", "ibm/tiny-GGUF") == (0, "", "removed ibm/tiny-GGUF:Q8_0: 7.3 MB freed\n")
    assert [path.name for path in two.iterdir()] == [".downloads"]
    assert invoke("models", "rm", "ibm/tiny-GGUF")[0] == 1


@pytest.mark.parametrize("name", ["..", ".", "/", "~", "../models", "ibm--tiny-GGUF--Q8_0", ".downloads", "a/../b", ""])
def test_rm_removes_nothing_but_models(two: Path, name: str) -> None:
    before = sorted(two.rglob("*"))
    status, stdout, stderr = invoke("models", "rm", name)
    assert (status, stdout) == (1, "") and "is not the name of a model in" in stderr
    assert sorted(two.rglob("*")) == before


def test_rm_follows_no_link(two: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (two / "ibm--tiny-GGUF--Q8_0").rename(elsewhere)
    (two / "ibm--tiny-GGUF--Q8_0").symlink_to(elsewhere)
    status, _, stderr = invoke("models", "rm", "ibm/tiny-GGUF:Q8_0")
    assert status == 1 and "is a link, not a model in the models folder" in stderr
    assert len(list(elsewhere.iterdir())) == 3


def test_rm_removes_what_an_interrupted_pull_left(hub: Hub, folder: Path, pair: dict[str, bytes]) -> None:
    hub.add("ibm/tiny-GGUF", pair)
    hub.faults.cuts[VISION] = [HALF]
    hub.faults.dead_after[VISION] = 1
    assert Command(hub, folder)("models", "pull", "ibm/tiny-GGUF")[0] == 1
    status, stdout, stderr = invoke("models", "rm", "ibm/tiny-GGUF")
    assert (status, stdout) == (0, "") and stderr.startswith("removed ibm/tiny-GGUF: 3.")
    assert not [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
