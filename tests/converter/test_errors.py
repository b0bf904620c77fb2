"""Bad input to the converter: each case has its own message, and nothing is left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from granite4v.converter import Options, Progress, convert
from granite4v.errors import CheckpointError, Granite4vError, OutputError
from tests.toy.checkpoint import PRESETS, CheckpointSpec, write_checkpoint

TINY = replace(PRESETS["tiny"], max_shard_bytes=3_000_000)
SINGLE = PRESETS["tiny"]


@pytest.fixture
def source(make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path: Path) -> Path:
    """A copy of a sharded checkpoint that a test may damage."""
    return shutil.copytree(make_checkpoint(TINY), tmp_path / "source")


@pytest.fixture
def single(make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path: Path) -> Path:
    """A copy of a checkpoint in one file."""
    return shutil.copytree(make_checkpoint(SINGLE), tmp_path / "single")


@pytest.fixture
def fails(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Converts, expects a failure, checks that the target's directory was not created, returns the message."""

    def run(checkpoint: Path, options: Options | None = None, kind: type[Granite4vError] = CheckpointError) -> str:
        parent = tmp_path / "models"
        with pytest.raises(kind) as caught:
            convert(checkpoint, parent / "out", options or Options("F32", "F32"))
        assert not parent.exists(), list(parent.rglob("*"))
        return str(caught.value)

    yield run


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_tensors(path: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


# --- the files ---


def test_an_index_that_names_an_absent_file(source: Path, fails: Callable[..., str]) -> None:
    absent = shards(source)[1]
    absent.unlink()
    message = fails(source)
    assert f"'model.safetensors.index.json' names '{absent.name}', which is not in" in message
    assert "missing tensor" not in message
    assert "Nothing was written." in message


def test_a_missing_shard_without_an_index(source: Path, fails: Callable[..., str]) -> None:
    (source / "model.safetensors.index.json").unlink()
    absent = shards(source)[1]
    absent.unlink()
    assert f"shard '{absent.name}' is missing" in fails(source)


def test_a_shard_cut_short_in_its_data(source: Path, fails: Callable[..., str]) -> None:
    shard = shards(source)[2]
    os.truncate(shard, shard.stat().st_size - 1000)
    assert f"'{shard.name}' is cut short: its tensors end at byte" in fails(source)


@pytest.mark.parametrize("size_bytes", [0, 5, 100])
def test_a_shard_cut_short_in_its_header(size_bytes: int, source: Path, fails: Callable[..., str]) -> None:
    os.truncate(shards(source)[0], size_bytes)
    assert ("is cut short or not a safetensors file" if size_bytes else "is empty; download it again") in fails(source)


def test_a_header_that_is_no_json(single: Path, fails: Callable[..., str]) -> None:
    (single / "model.safetensors").write_bytes((16).to_bytes(8, "little") + b"<html>not found")
    os.truncate(single / "model.safetensors", 24)
    assert "broken safetensors header" in fails(single)


def test_a_directory_without_weights(single: Path, fails: Callable[..., str]) -> None:
    (single / "model.safetensors").rename(single / "weights.npz")
    assert "has neither 'model.safetensors' nor 'model.safetensors.index.json'" in fails(single)


def test_weights_in_another_format_are_named_with_what_to_do(single: Path, fails: Callable[..., str]) -> None:
    weights = single / "model.safetensors"
    for name, advice in (
        ("consolidated.safetensors", "has the tensor names of the model's authors instead of Hugging Face's. Get the"),
        ("consolidated.00.pth", "is a pickle with the tensor names of the model's authors. Get the checkpoint in"),
        ("pytorch_model.bin", f"from_pretrained('{single}').save_pretrained('NEW_FOLDER')"),
        ("pytorch_model-00001-of-00002.bin", "a pickle, which can run code when it is opened"),
        ("text-Q8_0.gguf", "use it with --model"),
    ):
        weights = weights.rename(single / name)
        message = fails(single)
        assert f"'{single}' holds '{name}', but neither 'model.safetensors' nor" in message
        assert advice in message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "has no 'config.json'; it is not a Hugging Face checkpoint"),
        ("tokenizer.json", "has no 'tokenizer.json'"),
    ],
)
def test_a_missing_side_file(name: str, message: str, single: Path, fails: Callable[..., str]) -> None:
    (single / name).unlink()
    assert message in fails(single)


def test_no_settings_of_the_image_processor(single: Path, fails: Callable[..., str]) -> None:
    (single / "preprocessor_config.json").unlink()
    assert "has no 'preprocessor_config.json'" in fails(single)


def test_a_source_that_is_nowhere(tmp_path: Path, fails: Callable[..., str]) -> None:
    assert "there is no directory" in fails(tmp_path / "absent" / "here")
    assert "could not be fetched" in fails("no-such-owner/no-such-model")  # type: ignore[arg-type]


def test_a_source_that_is_a_file(single: Path, fails: Callable[..., str]) -> None:
    assert "is a file; give the checkpoint's directory" in fails(single / "config.json")


# --- the tensors ---


def test_unknown_missing_doubled_and_misshaped_tensors_are_reported_together(
    single: Path, fails: Callable[..., str]
) -> None:
    def damage(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.language_model.layers.0.self_attn.q_norm.weight"] = np.zeros(16, np.float32)
        tensors["model.vision_tower.vision_model.post_layernorm.bias"] = tensors[
            "model.vision_tower.post_layernorm.bias"
        ].copy()
        tensors["model.language_model.norm.weight"] = np.zeros(63, np.float32)
        del tensors["model.image_newline"]

    edit_tensors(single / "model.safetensors", damage)
    message = fails(single)
    assert "unknown tensor 'model.language_model.layers.0.self_attn.q_norm.weight' [16]" in message
    assert (
        "'model.vision_tower.post_layernorm.bias' and 'model.vision_tower.vision_model.post_layernorm.bias'" in message
    )
    assert "mis-shaped tensor 'model.language_model.norm.weight': found [63], expected [64]" in message
    assert "missing tensor 'model.image_newline' [64]" in message


def test_a_tensor_in_two_shards(source: Path, fails: Callable[..., str]) -> None:
    first, second = shards(source)[:2]
    name, values = next(iter(load_file(first).items()))
    edit_tensors(second, lambda tensors: tensors.__setitem__(name, values))
    assert f"'{name}' is in both '{first.name}' and '{second.name}'" in fails(source)


def test_a_name_that_stands_twice_in_one_header(single: Path, fails: Callable[..., str]) -> None:
    path = single / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip()
    entry = b', "model.image_newline": {"dtype": "F32", "shape": [64], "data_offsets": [0, 256]}}'
    header = header[:-1] + entry
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    assert "'model.image_newline' occurs twice in 'model.safetensors'" in fails(single)


def test_a_type_that_does_not_convert(single: Path, fails: Callable[..., str]) -> None:
    edit_tensors(
        single / "model.safetensors",
        lambda tensors: tensors.__setitem__("model.image_newline", np.zeros(64, np.int8)),
    )
    assert "'model.image_newline' in 'model.safetensors' has type I8; expected F32, F16, BF16" in fails(single)


def test_many_problems_are_cut_to_a_readable_list(single: Path, fails: Callable[..., str]) -> None:
    edit_json(single / "config.json", lambda config: config["text_config"].update(hidden_size=128, head_dim=16))
    lines = fails(single).splitlines()
    assert len(lines) == 23
    assert lines[-2].startswith("  - ... and ")


def test_values_that_are_no_numbers(single: Path, fails: Callable[..., str]) -> None:
    name = "model.language_model.layers.3.mlp.up_proj.weight"
    edit_tensors(single / "model.safetensors", lambda tensors: tensors[name].__setitem__((7, 7), np.nan))
    message = fails(single, Options("Q8_0", "F16"))
    assert f"'{name}' in" in message
    assert "holds values that are not finite numbers" in message


# --- the configuration ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(model_type="llama"), "model_type 'llama', which is not a vision-language family"),
        (lambda c: c.pop("vision_config"), "'config.json' has no 'vision_config'; expected a section"),
        (lambda c: c.pop("text_config"), "'config.json' has no 'text_config'; expected a section"),
        (
            lambda c: c.pop("image_token_index"),
            "'config.json' has no 'image_token_index'; expected an integer from 0 to 405",
        ),
        (lambda c: c["text_config"].update(model_type="bert"), "text_config has model_type 'bert'"),
        (
            lambda c: c["text_config"].update(hidden_act="gelu"),
            "'config.json': 'text_config.hidden_act' is 'gelu'; expected 'silu', which this architecture computes",
        ),
        (lambda c: c["text_config"].update(rope_parameters={"rope_type": "yarn"}), "rope type 'yarn'"),
        (
            lambda c: c["text_config"].update(model_type="granitemoehybrid", layer_types=["attention", "mamba"]),
            "layer types ['mamba']",
        ),
        (lambda c: (c.update(image_token_index=1), c["text_config"].update(vocab_size=300)), "has token 405"),
    ],
)
def test_configurations_that_do_not_convert(
    change: Callable[[dict[str, Any]], Any], message: str, single: Path, fails: Callable[..., str]
) -> None:
    edit_json(single / "config.json", change)
    if message.startswith("has token"):
        name = "model.language_model.embed_tokens.weight"
        edit_tensors(single / "model.safetensors", lambda t: t.__setitem__(name, t[name][:300].copy()))
    assert message in fails(single)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            Options(text_type="Q3_K_S"),
            "unknown quantization type 'Q3_K_S' for --text-type; known: F32, F16, BF16, Q8_0",
        ),
        (Options(vision_type="Q4_K_M"), "unknown quantization type 'Q4_K_M' for --vision-type; known: F32, F16, BF16"),
        (Options(lora="apply"), "unknown adapter mode 'apply'; known: merge, separate, ignore"),
        (Options(lora="separate"), "contains no adapter to write separately"),
    ],
)
def test_options_that_do_not_exist(options: Options, message: str, single: Path, fails: Callable[..., str]) -> None:
    assert message in fails(single, options, Granite4vError)


# --- the target ---


def test_a_target_that_exists(single: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "text-F16.gguf").write_bytes(b"precious")
    with pytest.raises(OutputError, match="exists and holds text-F16.gguf; give another directory, or --force"):
        convert(single, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["text-F16.gguf"]


def test_a_target_that_is_a_file(single: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="exists and is a file"):
        convert(single, tmp_path / "out", Options(force=True))


def test_too_little_space_is_seen_before_the_work(
    single: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(single)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    assert "GB and its disk has 0.00 GB free" in fails(single, kind=OutputError)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full, a disk that is always full")
@pytest.mark.parametrize("file", ["text-F32.gguf", "mmproj-F32.gguf"])
def test_a_disk_that_fills_up_while_writing(
    file: str, single: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tempfile.mkdtemp

    def mkdtemp(**where: Any) -> str:
        folder = real(**where)
        (Path(folder) / file).symlink_to("/dev/full")
        return folder

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    assert "no space left on the disk" in fails(single, kind=OutputError)


def test_a_target_that_may_not_be_written(single: Path, fails: Callable[..., str], monkeypatch: Any) -> None:
    def refuse(**where: Any) -> str:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    message = fails(single, kind=OutputError)
    assert "cannot write" in message
    assert message.endswith("Permission denied.")


def test_a_failure_with_force_keeps_the_model_that_is_there(single: Path, tmp_path: Path) -> None:
    convert(single, tmp_path / "out", Options("F16", "F16"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def interrupt(progress: Progress) -> None:
        if progress.file.startswith("mmproj"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(single, tmp_path / "out", Options("Q8_0", "Q8_0", force=True), interrupt)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("target", ["../single/config.json/out", "a/" * 10 + "x" * 300, "nul\0"])
def test_a_target_that_no_directory_can_have(target: str, single: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match="cannot write "):
        convert(single, tmp_path / "models" / target)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose conversion takes a moment."""
    spec = replace(PRESETS["tiny-wide"], text_hidden=1024, text_ffn=2048, text_heads=16, dtype="bfloat16")
    return write_checkpoint(tmp_path_factory.mktemp("large") / "source", spec)


def interrupt(source: Path, target: Path, number: int, *options: str) -> tuple[int, str, str]:
    """Starts `convert`, sends it a signal while it writes, and returns its status and output."""
    command = [sys.executable, "-m", "granite4v", "convert", source, target, *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    give_up = time.monotonic() + 60
    places = (target.parent, target)
    while not [path for place in places for path in place.glob(".out-partial-*/text-*.gguf")]:
        assert time.monotonic() < give_up
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_in_the_middle_leaves_nothing_and_no_traceback(
    name: str, status: int, large: Path, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    found, out, err = interrupt(large, models / "out", getattr(signal, name))
    assert (found, out) == (status, "")
    last = err.strip().splitlines()[-1]
    assert last == ("granite4v: interrupted" if name == "SIGINT" else f"granite4v: ended by {name}")
    assert "Traceback" not in err
    assert not models.exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL and locks")
@pytest.mark.parametrize("exists", [False, True], ids=["new directory", "empty directory"])
def test_what_a_killed_run_left_is_removed_by_the_next(exists: bool, large: Path, single: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    target = models / "out"
    if exists:
        target.mkdir(parents=True)
    assert interrupt(large, target, signal.SIGKILL)[0] == -signal.SIGKILL
    (left,) = (target if exists else models).iterdir()
    assert left.name.startswith(".out-partial-")
    convert(single, target, Options("F16", "F16"))
    assert [path.name for path in models.iterdir()] == ["out"]
    assert sorted(path.name for path in target.iterdir()) == ["mmproj-F16.gguf", "text-F16.gguf"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs locks")
def test_a_run_at_work_keeps_its_directory(single: Path, tmp_path: Path) -> None:
    """Another process converts to the same name meanwhile; the one that ends last gets an error."""
    other = [sys.executable, "-m", "granite4v", "convert", single, tmp_path / "models" / "out", "--text-type", "F16"]
    kept: list[bool] = []

    def meanwhile(progress: Progress) -> None:
        if not kept:
            (work,) = (tmp_path / "models").glob(".out-partial-*")
            subprocess.run(other, check=True, capture_output=True, timeout=120)
            kept.append(work.exists())

    with pytest.raises(OutputError, match="cannot write"):
        convert(single, tmp_path / "models" / "out", Options("F32", "F32"), meanwhile)
    assert kept == [True]
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["out"]
    assert sorted(path.name for path in (tmp_path / "models" / "out").iterdir()) == ["mmproj-F16.gguf", "text-F16.gguf"]


def test_a_source_that_shrinks_while_it_is_read(single: Path, tmp_path: Path) -> None:
    def truncate(progress: Progress) -> None:
        os.truncate(single / "model.safetensors", 100_000)

    with pytest.raises(CheckpointError, match="became shorter while it was read"):
        convert(single, tmp_path / "models" / "out", Options("F32", "F32", n_threads=1), truncate)
    assert not (tmp_path / "models").exists()
