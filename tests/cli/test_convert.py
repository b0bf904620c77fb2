"""`granite4v convert`: its stdout, its stderr, and its exit status."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from granite4v.cli.main import app
from granite4v.converter import Options, convert
from tests.toy.checkpoint import PRESETS, AdapterSpec, CheckpointSpec, write_adapter

TINY = PRESETS["tiny"]


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["convert", *map(str, arguments)], catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


def test_files_on_stdout_and_remarks_on_stderr(
    make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    status, stdout, stderr = run(make_checkpoint(TINY), out)
    assert status == 0
    assert [line.split("  ")[0] for line in stdout.splitlines()] == [
        str(out / "text-Q4_K_M.gguf"),
        str(out / "mmproj-F16.gguf"),
    ]
    assert "note: text-Q4_K_M.gguf: 44 tensors are Q5_0, for rows of 64 are not whole blocks of Q4_K" in stderr
    n_bytes = sum(path.stat().st_size for path in out.iterdir())
    assert re.fullmatch(rf"converted in \d+\.\d s: 2 files, {n_bytes / 1e6:.2f} MB on disk", stderr.splitlines()[-1])


def test_options_reach_the_converter(make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", TINY, AdapterSpec())
    out = tmp_path / "out"
    options = ("--text-type", "q8_0", "--vision-type", "bf16", "--lora", "separate", "--adapter", adapter)
    status, _, stderr = run(make_checkpoint(TINY), out, *options)
    assert status == 0
    assert sorted(path.name for path in out.iterdir()) == ["lora-F16.gguf", "mmproj-BF16.gguf", "text-Q8_0.gguf"]
    assert f"note: the adapter '{adapter}' was written to a separate file" in stderr
    assert run(make_checkpoint(TINY), out)[0] == 1
    assert run(make_checkpoint(TINY), out, "--force")[0] == 0
    assert sorted(path.name for path in out.iterdir()) == ["mmproj-F16.gguf", "text-Q4_K_M.gguf"]


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path: Path
) -> None:
    status, stdout, stderr = run(make_checkpoint(TINY), tmp_path / "out", "--dry-run")
    assert (status, stderr) == (0, "")
    assert "text-Q4_K_M.gguf  (granite, 74 tensors" in stdout
    assert "token_embd.weight" in stdout
    assert "left out:" in stdout
    assert not (tmp_path / "out").exists()


def test_a_dry_run_ends_with_a_summary(make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path: Path) -> None:
    source = shutil.copytree(make_checkpoint(replace(TINY, tied=False)), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, source / "model.safetensors")
    status, stdout, _ = run(source, tmp_path / "out", "--dry-run", "--text-type", "F32")
    n_vision = len(re.findall(r"^  \S+ +F\d+ +\S+ +<- model\.(?!language)", stdout, re.MULTILINE))
    summary = stdout.split("\nsummary:\n")[1].splitlines()
    assert status == 0
    sizes = convert(source, tmp_path / "real", Options("F32", "F16")).plan
    assert summary[0] == f"  text-F32.gguf: {sizes.files[0].data_bytes / 1e6:.2f} MB, 74 tensors (74 F32)"
    assert summary[1].startswith(f"  mmproj-F16.gguf: {sizes.files[1].data_bytes / 1e6:.2f} MB, {n_vision} tensors (")
    assert summary[2] == f"  2 files, {sizes.data_bytes / 1e6:.2f} MB in all"
    assert summary[3].startswith("  left out: 11 tensors, the pooling head")
    assert summary[4].endswith("the checkpoint has none; tied")
    assert len(summary) == 5


def test_warnings_go_to_stderr(make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path: Path) -> None:
    source = shutil.copytree(make_checkpoint(TINY), tmp_path / "source")
    (source / "chat_template.jinja").unlink()
    status, stdout, stderr = run(source, tmp_path / "out")
    assert status == 0
    assert f"warning: '{source}' has no chat template; prompts must be given in the model's raw format\n" in stderr
    assert "warning:" not in stdout


def test_one_tensor_is_not_several(make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path: Path) -> None:
    one_layer = replace(TINY, text_layers=1, deepstack_layer_map=((-1, 0),))
    _, _, stderr = run(make_checkpoint(one_layer), tmp_path / "out", "--text-type", "Q4_K_M")
    assert "note: text-Q4_K_M.gguf: 1 tensor is F16, for rows of 176 are not whole blocks of " in stderr


def test_a_revision_of_a_directory_is_wrong_usage(tmp_path: Path) -> None:
    status, stdout, stderr = run(tmp_path, tmp_path / "out", "--revision", "v2")
    assert (status, stdout) == (2, "") and "which has no revisions" in " ".join(stderr.replace("│", " ").split())
    assert run("nano", tmp_path / "out", "--revision", "v2")[0] == 2 and not (tmp_path / "out").exists()


def test_a_failure_is_one_message_and_status_1(tmp_path: Path) -> None:
    status, stdout, stderr = run(tmp_path, tmp_path / "out")
    assert (status, stdout) == (1, "")
    assert stderr == f"granite4v: '{tmp_path}' has no 'config.json'; it is not a Hugging Face checkpoint.\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--text-type", "Q1"), "unknown quantization type 'Q1' for --text-type; known: F32, F16,"),
        (("--vision-type", "Q4_K_M"), "unknown quantization type 'Q4_K_M' for --vision-type; known: F32, F16,"),
        (("--lora", "apply"), "unknown adapter mode 'apply'; known: merge, separate, ignore"),
        (("--threads", "0"), "'--threads' (env var: 'GRANITE4V_THREADS'): 0 is not in the range"),
        (("--threads", "9999999"), "'--threads' (env var: 'GRANITE4V_THREADS'): 9999999 is not in the range"),
    ],
)
def test_wrong_usage_is_status_2(options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    status, stdout, stderr = run(tmp_path, tmp_path / "out", *options)
    assert (status, stdout) == (2, "")
    assert message in " ".join(stderr.split())
