"""`granite4v inspect`: its output for our files, third-party files and broken ones."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from granite4v.cli.main import app
from granite4v.converter import Options, convert
from granite4v.ggml.gguf_file import TensorInfo
from granite4v.gguf_summary import summarize, tensor_types
from tests.helpers.gguf_edit import copy_gguf
from tests.toy.checkpoint import PRESETS, AdapterSpec, CheckpointSpec, write_adapter

TINY = PRESETS["tiny"]
DAMAGED = {
    "granite.deepstack_mapping": 3,
    "tokenizer.ggml.tokens": "abc",
    "granite.context_length": math.nan,
    "granite.attention.head_count": [1] * 1000,
    "tokenizer.ggml.model": [True],
    "granite4v.source": math.inf,
}


@pytest.fixture(scope="module")
def model(make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("inspect") / "model"
    convert(make_checkpoint(TINY), out, Options(text_type="Q8_0", vision_type="F16"))
    return out


def inspect(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


def test_a_directory_shows_every_file(model: Path) -> None:
    result = inspect(model)
    assert (result.exit_code, result.stderr) == (0, "")
    assert str(model / "text-Q8_0.gguf") in result.stdout
    assert str(model / "mmproj-F16.gguf") in result.stdout
    assert "hidden state 2 -> decoder layer 2 (area)" in result.stdout
    assert "hidden state 4 -> decoder layer 7 (corner 3)" in result.stdout


def test_json_says_what_is_in_the_files(model: Path) -> None:
    document = json.loads(inspect(model, "--json").stdout)
    vision, text = document["files"]
    assert (text["kind"], text["architecture"], text["chat_template"]) == ("text", "granite", True)
    assert text["text"] == {"layers": 8, "width": 64, "heads": 4, "kv_heads": 2, "context": 131072}
    assert text["injected_layers"] == [2, 3, 4, 5, 7]
    assert text["tokenizer"]["tokens"] == 406
    assert text["tokenizer"]["tokenizer.json"] is True
    assert vision["kind"] == "vision"
    assert [stream["text_layer"] for stream in vision["streams"]] == [0, 2, 3, 4, 5, 7]
    assert [stream["spatial_offset"] for stream in vision["streams"]] == [None, None, 0, 1, 2, 3]
    assert vision["provenance"]["pair"] == text["provenance"]["pair"]
    for file in document["files"]:
        assert file["bytes"] == Path(file["path"]).stat().st_size
        assert 0 < sum(entry["bytes"] for entry in file["tensor_types"].values()) < file["bytes"]


def test_parameters_are_those_of_the_checkpoint(model: Path) -> None:
    n_text = 406 * 64 + 8 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 176 * 64 + 2 * 64) + 64
    assert summarize(model / "text-Q8_0.gguf")["parameters"] == n_text


def test_an_adapter_file(make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", TINY, AdapterSpec(rank=4, alpha=6.0))
    convert(make_checkpoint(TINY), tmp_path / "out", Options("F32", "F32", lora="separate", adapter=str(adapter)))
    summary = summarize(next((tmp_path / "out").glob("lora-*.gguf")))
    assert summary["kind"] == "adapter"
    assert summary["adapter"] == {"type": "lora", "alpha": 6.0, "ranks": "4"}
    assert "rank" in inspect(tmp_path / "out").stdout


def test_a_file_of_another_family_is_shown_with_a_note(tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_string("clip.projector_type", "somebody_else")
    writer.add_tensor("v.patch_embd.weight", np.zeros((2, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    result = inspect(path)
    assert result.exit_code == 0
    assert "'somebody_else'" in result.stdout
    assert "F32" in result.stdout


def test_types_are_counted_and_sorted_by_size() -> None:
    infos = [
        TensorInfo("a", (2,), "F32", 0, 8),
        TensorInfo("b", (64,), "Q8_0", 8, 68),
        TensorInfo("c", (1,), "F32", 76, 4),
    ]
    assert list(tensor_types({info.name: info for info in infos}).items()) == [
        ("Q8_0", {"tensors": 1, "bytes": 68}),
        ("F32", {"tensors": 2, "bytes": 12}),
    ]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "notes.gguf").write_text("hello")
    for target, message in (
        (tmp_path / "notes.gguf", "is not a GGUF file"),
        (tmp_path / "missing.gguf", "No such file"),
    ):
        result = inspect(target)
        assert (result.exit_code, result.stdout) == (1, "")
        assert message in result.stderr
    (tmp_path / "empty").mkdir()
    result = inspect(tmp_path / "empty")
    assert result.exit_code == 1
    assert "contains no .gguf file" in result.stderr


def test_hidden_files_and_links_to_nothing_are_left_out(model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    (folder / "._text-Q8_0.gguf").write_bytes(b"\0\5\x16\7")  # macOS writes one next to each file on foreign disks
    (folder / "gone.gguf").symlink_to(folder / "nowhere")
    result = inspect(folder, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    names = [Path(file["path"]).name for file in json.loads(result.stdout)["files"]]
    assert names == ["mmproj-F16.gguf", "text-Q8_0.gguf"]


def test_a_broken_file_does_not_hide_the_others(model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    (folder / "other.gguf").write_bytes(b"nonsense")
    result = inspect(folder)
    assert result.exit_code == 1
    assert "text-Q8_0.gguf" in result.stdout and "mmproj-F16.gguf" in result.stdout
    assert f"'{folder / 'other.gguf'}' is not a GGUF file" in result.stderr


def test_an_importance_matrix_is_not_a_text_model(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "imatrix.gguf", "")  # no architecture
    writer.add_type("imatrix")
    writer.add_tensor("blk.0.ffn_up.weight.counts", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert summarize(tmp_path / "imatrix.gguf")["kind"] == "other"
    assert inspect(tmp_path / "imatrix.gguf").exit_code == 0


@pytest.mark.parametrize("damage", DAMAGED)
def test_metadata_of_wrong_types_are_shown_and_not_fatal(model: Path, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "f.gguf"
    values = {"general.name": [1, 2], "general.type": 5, "granite.block_count": "many", damage: DAMAGED[damage]}
    writer = gguf.GGUFWriter(path, "granite")
    for key, value in values.items():
        if key != "general.architecture":
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    writer.add_tensor("w", np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for options in ((), ("--json",)):
        result = inspect(path, *options)
        assert result.exit_code == 0, result.output
    json.loads(result.stdout, parse_constant=pytest.fail)


def test_escape_sequences_of_a_file_do_not_reach_the_terminal(model: Path, tmp_path: Path) -> None:
    change = {"general.name": "\x1b]0;title\x07\x1b[31mred\nnew line", "tokenizer.ggml.pre": "a\x9bb"}
    path = copy_gguf(model / "text-Q8_0.gguf", tmp_path / "f.gguf", change=change)
    result = inspect(path)
    assert result.exit_code == 0 and r"\x1b[31mred" in result.stdout and r"\x9b" in result.stdout
    assert not {"\x1b", "\x07", "\x9b"} & set(result.stdout)
    assert not any(line.startswith("new line") for line in result.stdout.splitlines())
    assert json.loads(inspect(path, "--json").stdout)["files"][0]["name"] == change["general.name"]
