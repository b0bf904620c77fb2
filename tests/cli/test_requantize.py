"""`granite4v requantize`: its stdout, its stderr, and its exit status."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from typer.testing import CliRunner

from granite4v.cli.main import app
from granite4v.runtime.llama.files import ModelFiles
from tests.toy.checkpoint import PRESETS


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["requantize", *map(str, arguments)], catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


def test_the_file_on_stdout_and_the_time_on_stderr(make_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(make_model(PRESETS["tiny"], "F32", "F16"), tmp_path / "model")
    status, stdout, stderr = run(folder, "--vision-type", "q8_0", "--threads", 2)
    path = folder / "mmproj-Q8_0.gguf"
    assert (status, stdout) == (0, f"{path}  {path.stat().st_size / 1e6:,.1f} MB\n")
    assert re.fullmatch(r"quantized in \d+\.\d s", stderr.splitlines()[-1])  # after the progress, if it takes long
    assert run(folder, "--vision-type", "Q8_0")[::2] == (
        1,
        f"granite4v: '{path}' exists; give another file with --out, or --force to replace it.\n",
    )
    assert run(folder, "--vision-type", "Q8_0", "--force")[0] == 0
    assert run(folder, "--vision-type", "Q6_K", "--out", tmp_path)[:2] == (
        0,
        f"{tmp_path / 'mmproj-Q6_K.gguf'}  {(tmp_path / 'mmproj-Q6_K.gguf').stat().st_size / 1e6:,.1f} MB\n",
    )


def test_a_wrong_type_or_none_is_wrong_usage(tmp_path: Path) -> None:
    status, stdout, stderr = run(tmp_path, "--vision-type", "Q9")
    assert (status, stdout) == (2, "") and "unknown quantization type 'Q9'" in stderr
    assert run(tmp_path)[0] == 2


def test_a_second_file_beside_the_first_is_not_written(make_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(make_model(PRESETS["tiny"], "F32", "F16"), tmp_path / "model")
    assert run(folder, "--vision-type", "Q8_0")[0] == 0
    before = sorted(folder.iterdir())
    for more in ([], ["--force"]):
        assert run(folder, "--vision-type", "Q6_K", *more) == (
            1,
            "",
            f"granite4v: '{folder}' contains 'mmproj-Q8_0.gguf' already; with 'mmproj-Q6_K.gguf' beside it, the model "
            "would have more than one vision file to choose from, and not load. Remove that file first, or write "
            "elsewhere with --out (out= in Python).\n",
        )
    assert sorted(folder.iterdir()) == before
    ModelFiles.open(folder).close()
    (folder / "mmproj-Q8_0.gguf").unlink()
    assert run(folder, "--vision-type", "Q6_K")[0] == 0
    with ModelFiles.open(folder) as files:
        assert files.vision is not None and files.vision.path.name == "mmproj-Q6_K.gguf"


def test_quantizing_twice_is_warned_of(make_model: Callable[..., Path], tmp_path: Path) -> None:
    eight = make_model(PRESETS["tiny"], "F32", "Q8_0") / "mmproj-Q8_0.gguf"
    status, _, stderr = run(eight, "--vision-type", "q6_k", "--out", tmp_path)
    message = f"warning: '{eight}' is quantized to Q8_0 already; the new file keeps that error and Q6_K adds another. "
    assert status == 0 and stderr.startswith(message)
    assert "keeps that error. An F16" in run(eight, "--vision-type", "F16", "--out", tmp_path)[2]
    half = make_model(PRESETS["tiny"], "F32", "F16") / "mmproj-F16.gguf"
    assert "warning" not in run(half, "--vision-type", "Q6_K", "--out", tmp_path, "--force")[2]
