"""The embedded model: converted on first use, kept, repaired, shared by processes; here with a random checkpoint."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import granite4v
from granite4v import default_model
from granite4v.cli.main import app
from granite4v.cli.options import NO_MODEL
from granite4v.errors import CheckpointError, OutputError
from granite4v.ggml import autotune
from granite4v.ggml.gguf_file import GgufFile
from granite4v.paths import cache_folder
from granite4v.runtime.extract import extract as run_extract
from granite4v.runtime.extract.options import ExtractFields
from tests.helpers.pictures import text_picture
from tests.toy.checkpoint import PRESETS, AdapterSpec, CheckpointSpec, write_adapter

TINY = PRESETS["tiny"]
FILES = ["files.json", "mmproj-F16.gguf", "text-F16.gguf"]
CONVERTING, DAMAGED = "converting the embedded model to", "is damaged; converting it again"
SHIPPED = Path(granite4v.__file__).parent / "nano" / "config.json"

# The command with another checkpoint inside the package; {extra} is additional code that changes it.
COMMAND = """
import os, pathlib, time
from granite4v import converter, default_model
from granite4v.converter import conversion
default_model.checkpoint_folder = lambda: pathlib.Path(os.environ["TEST_CHECKPOINT"])
{extra}
from granite4v.cli.entry import entry
entry()
"""
SLOW = """
whole = converter.convert
converter.convert = lambda *arguments: (time.sleep(1), whole(*arguments))[1]
"""
STUCK = """
def write(file, path, *rest):
    path.write_bytes(b"half a file")
    print("writing", flush=True)
    time.sleep(60)
conversion.write_file = write
"""


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base model and adapter in one folder, as in the package."""
    folder = tmp_path_factory.mktemp("package") / "nano"
    shutil.copytree(make_checkpoint(TINY), folder)
    return write_adapter(folder, TINY, AdapterSpec())


@pytest.fixture
def cache(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, except for this machine's measurements. `checkpoint` becomes the embedded one, also for
    subprocesses."""
    folder = tmp_path / "cache"
    measured = cache_folder() / autotune.CACHE
    if measured.exists():
        folder.mkdir()
        shutil.copy(measured, folder)
    monkeypatch.setenv("GRANITE4V_CACHE", str(folder))
    monkeypatch.setenv("TEST_CHECKPOINT", str(checkpoint))
    monkeypatch.setattr(default_model, "checkpoint_folder", lambda: checkpoint)
    return folder


def start(*arguments: Any, extra: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", COMMAND.format(extra=extra), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*arguments: Any, extra: str = "") -> tuple[int, str, str]:
    with start(*arguments, extra=extra) as process:
        stdout, stderr = process.communicate(timeout=120)
    return process.returncode, stdout, stderr


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def models(cache: Path) -> list[Path]:
    """Returns the model folders in the cache, including half-made ones."""
    return sorted(path for path in cache.glob("*nano*") if path.is_dir())


def make() -> tuple[Path, list[str]]:
    lines: list[str] = []
    return default_model.embedded_model(lines.append), lines


# --- first and second use ---


def test_without_a_model_ask_converts_the_embedded_one_once(cache: Path) -> None:
    ask = ("ask", "Hello", "--max-tokens", "4")
    status, stdout, stderr = run(*ask)
    assert status == 0 and stdout
    assert NO_MODEL in stderr.splitlines() and "--model DIR" in NO_MODEL
    (folder,) = models(cache)
    assert f"{CONVERTING} '{folder}' ..." in stderr.splitlines()
    assert sorted(path.name for path in folder.iterdir()) == FILES

    made = folder.stat().st_mtime_ns
    status, again, stderr = run(*ask)
    assert (status, again) == (0, stdout)
    assert NO_MODEL in stderr and CONVERTING not in stderr

    status, named, stderr = run(*ask, "--model", "nano")
    assert (status, named) == (0, stdout)
    assert NO_MODEL not in stderr and CONVERTING not in stderr
    assert models(cache) == [folder] and folder.stat().st_mtime_ns == made


def test_both_files_are_f16_with_the_adapter_merged(cache: Path) -> None:
    folder, _ = make()
    for name in ("text-F16.gguf", "mmproj-F16.gguf"):
        with GgufFile.open(folder / name) as file:
            assert file["granite4v.adapter"] == "merged"
            assert {info.type_name for info in file.tensors.values()} == {"F16", "F32"}


def test_python_loads_it_by_no_name_and_by_its_name(cache: Path) -> None:
    with granite4v.load() as model:
        answer = model.generate("Hello", max_tokens=4).text
        assert model.files.text.path.parent == models(cache)[0]
    with granite4v.load("nano") as model:
        assert model.generate("Hello", max_tokens=4).text == answer


def test_load_takes_what_model_load_takes() -> None:
    ours, theirs = (dict(inspect.signature(f).parameters) for f in (granite4v.load, granite4v.Model.load))
    assert ours.pop("path").default is None
    theirs.pop("path")
    assert ours == theirs


def test_bench_and_inspect_take_it(cache: Path, tmp_path: Path) -> None:
    text_picture((80, 60)).save(tmp_path / "page.png")
    result = invoke("bench", "--image", tmp_path / "page.png", "--max-tokens", 1, "--json")
    assert (result.exit_code, result.stderr) == (0, "") and json.loads(result.stdout)["image_tokens"] > 0
    result = invoke("bench", "--image", tmp_path / "page.png", "--max-tokens", 1)
    assert result.exit_code == 0 and NO_MODEL in result.stderr and json.loads(result.stdout)
    result = invoke("inspect", "nano")
    assert (result.exit_code, result.stderr) == (0, "") and str(models(cache)[0] / "text-F16.gguf") in result.stdout


def test_convert_takes_it_like_any_checkpoint(cache: Path, tmp_path: Path) -> None:
    result = invoke("convert", "nano", tmp_path / "out", "--text-type", "Q8_0", "--lora", "separate")
    assert result.exit_code == 0
    names = ["lora-F16.gguf", "mmproj-F16.gguf", "text-Q8_0.gguf"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert models(cache) == []


def test_what_is_called_nano_here_comes_first(
    cache: Path, checkpoint: Path, make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nano").symlink_to(make_model(TINY))
    assert "nano/text-F32.gguf" in invoke("inspect", "nano").stdout
    with granite4v.load("nano") as model:
        assert model.files.text.path == Path("nano/text-F32.gguf")
    assert invoke("convert", "nano", "out").exit_code == 1  # a model directory is not a checkpoint
    assert models(cache) == []
    with granite4v.load() as model:  # no name: the embedded one, whatever is in the current directory
        assert model.files.text.path.parent == models(cache)[0]


def test_a_path_that_ends_in_nano_is_a_path(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("ask", "Hello", "--model", "./nano")
    assert result.exit_code == 1 and "does not exist" in result.stderr
    assert models(cache) == []


# --- which folder ---


def test_another_checkpoint_or_package_gets_another_folder(
    cache: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = make()
    changed = tmp_path / "changed"
    shutil.copytree(checkpoint, changed)
    weights = bytearray((changed / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (changed / "model.safetensors").write_bytes(weights)
    monkeypatch.setattr(default_model, "checkpoint_folder", lambda: changed)
    second, _ = make()
    monkeypatch.setattr(default_model, "FORMAT", default_model.FORMAT + 1)
    third, _ = make()
    monkeypatch.setattr("importlib.metadata.version", lambda _: "9.9")
    fourth, _ = make()
    assert fourth.name.startswith("nano-9.9-")
    assert sorted({first, second, third, fourth}) == models(cache) and len(models(cache)) == 4


def test_a_package_without_the_checkpoint_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(granite4v, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(CheckpointError, match="is missing from this installation .* reinstall granite4v"):
        granite4v.load()
    result = invoke("ask", "Hello")
    assert result.exit_code == 1 and "is missing from this installation" in result.stderr


# --- damage ---


def cut(folder: Path) -> None:
    os.truncate(folder / "text-F16.gguf", 1000)


def flip(folder: Path) -> None:
    path = folder / "mmproj-F16.gguf"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def lose(folder: Path) -> None:
    (folder / "mmproj-F16.gguf").unlink()


def lose_the_record(folder: Path) -> None:
    (folder / "files.json").unlink()


def spoil_the_record(folder: Path) -> None:
    (folder / "files.json").write_text("[1]")


def add_a_stranger(folder: Path) -> None:
    shutil.copy(folder / "text-F16.gguf", folder / "copy.gguf")


@pytest.mark.parametrize("damage", [cut, flip, lose, lose_the_record, spoil_the_record, add_a_stranger])
def test_damage_is_noticed_and_repaired(cache: Path, damage: Callable[[Path], None]) -> None:
    folder, _ = make()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert make() == (folder, [])
    damage(folder)
    again, lines = make()
    assert again == folder and DAMAGED in "".join(lines)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert make() == (folder, [])


# --- several at once, interrupted, killed ---


def test_two_processes_at_once_convert_once(cache: Path) -> None:
    processes = [start("inspect", "nano", "--json", extra=SLOW) for _ in range(2)]
    ended = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert ended[0][0] == ended[1][0]
    said = "".join(stderr for _, stderr in ended)
    assert said.count(CONVERTING) == 1 and said.count("another process is converting") == 1
    (folder,) = models(cache)
    assert default_model.is_intact(folder)


def test_two_threads_at_once_convert_once(cache: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        made = [future.result() for future in [pool.submit(make) for _ in range(2)]]
    assert made[0][0] == made[1][0] == models(cache)[0]
    assert "".join(made[0][1] + made[1][1]).count(CONVERTING) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to a child there")
def test_ctrl_c_leaves_nothing(cache: Path) -> None:
    with start("inspect", "nano", extra=STUCK) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n" and models(cache)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in stderr and "Traceback" not in stderr
    assert models(cache) == []
    assert make()[0] == models(cache)[0]


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_what_a_killed_process_left_is_cleared_away(cache: Path) -> None:
    with start("inspect", "nano", extra=STUCK) as process:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        process.kill()
    assert len(models(cache)) == 1
    folder, lines = make()
    assert models(cache) == [folder] and CONVERTING in lines[0]


# --- a cache that cannot be written ---


def test_without_a_writable_cache_it_is_made_for_the_run(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("GRANITE4V_CACHE", str(tmp_path / "file" / "cache"))  # works for root as well, unlike chmod
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    status, stdout, stderr = run("inspect", "nano")
    assert status == 0 and str(tmp_path / "temporary") in stdout
    assert f"the embedded model cannot be kept in '{tmp_path / 'file' / 'cache'}' (" in stderr
    assert "set GRANITE4V_CACHE to a writable folder." in stderr
    assert not any((tmp_path / "temporary").iterdir())


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_such_a_cache(cache: Path) -> None:
    cache.mkdir(exist_ok=True)
    cache.chmod(0o500)
    folder, lines = make()
    cache.chmod(0o700)
    assert default_model.is_intact(folder) and folder.parent != cache and "Permission denied" in lines[0]


def test_a_process_makes_it_for_itself_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache.parent / "file").touch()
    monkeypatch.setenv("GRANITE4V_CACHE", str(cache.parent / "file"))
    folder, lines = make()
    assert CONVERTING in "".join(lines)
    again, lines = make()
    assert again == folder and CONVERTING not in "".join(lines)


def test_a_model_in_a_read_only_cache_is_used_as_it_is(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = make()

    def refuse(*_: Any) -> None:
        raise AssertionError("nothing is to be written")

    monkeypatch.setattr("granite4v.converter.convert", refuse)
    assert make() == (folder, [])


def test_with_no_place_at_all_the_error_says_what_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Path:
        raise FileNotFoundError("No usable temporary directory found")

    (cache.parent / "file").touch()
    monkeypatch.setenv("GRANITE4V_CACHE", str(cache.parent / "file"))
    monkeypatch.setattr(default_model, "temporary_folder", refuse)
    with pytest.raises(OutputError, match="No usable temporary directory.* set GRANITE4V_CACHE"):
        make()


# --- the real one ---


def test_the_shipped_checkpoint_is_small_and_converts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sum(path.stat().st_size for path in SHIPPED.parent.iterdir()) <= 20e6
    monkeypatch.setenv("GRANITE4V_CACHE", str(tmp_path))
    folder, _ = make()
    assert sorted(path.name for path in folder.iterdir()) == FILES


# --- signatures ---


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def test_load_takes_what_the_model_takes() -> None:
    ours, theirs = parameters(granite4v.load), parameters(granite4v.Model.load)
    assert (ours.pop("path").default, theirs.pop("path").default) == (None, inspect.Parameter.empty)
    assert ours == theirs


def test_extract_takes_what_the_runtime_takes() -> None:
    ours, theirs = parameters(granite4v.extract), parameters(run_extract)
    assert ours.pop("ray").default is None  # with it a path becomes a model for a cluster
    assert list(ours) == list(theirs)
    assert ours.pop("model") == theirs.pop("model").replace(default=None, annotation="Model | str | Path | None")
    assert ours == theirs


def test_extract_hands_every_argument_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {name: object() for name in (*ExtractFields.__annotations__, "inputs", "tasks", "model", "watch", "say")}
    found: dict[str, Any] = {}

    def record(inputs: Any, tasks: Any, **options: Any) -> None:
        found.update(inputs=inputs, tasks=tasks, **options)

    monkeypatch.setattr("granite4v.runtime.extract.extract", record)
    granite4v.extract(**given)  # type: ignore[arg-type]
    assert found == given


def test_a_model_that_is_no_path() -> None:
    with pytest.raises(TypeError, match="^the model is 5; expected a path, the name of a model, or None"):
        granite4v.load(5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="^the path of the model is 5; expected text or a Path"):
        granite4v.Model.load(5)  # type: ignore[arg-type]
