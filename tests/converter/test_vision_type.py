"""`--vision-type auto`: picks the type that was measured fastest, of equally fast ones the more exact one, and says
why."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from granite4v.cli.main import app
from granite4v.converter import fastest_vision_type
from granite4v.ggml import autotune
from granite4v.ggml.kernel_timing import MANY
from granite4v.ggml.kernels import FLOAT32, ONEDNN_BF16, PLAIN
from tests.toy.checkpoint import PRESETS


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the measured seconds of each type's kernels."""

    def put(**seconds: dict[str, float]) -> None:
        times = {kind: {name: {MANY: one} for name, one in by_name.items()} for kind, by_name in seconds.items()}
        monkeypatch.setattr(
            autotune,
            "times",
            lambda backend, wanted, *_: {
                trial.type_name: {
                    name: rows
                    for name, rows in times.get(trial.type_name, {}).items()
                    if any(other[:2] == (trial.type_name, name) for other in wanted)
                }
                for trial in wanted
            },
        )

    return put


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({"F16": {PLAIN: 1.0}, "Q8_0": {PLAIN: 0.5}, "Q6_K": {PLAIN: 0.8}}, "Q8_0"),
        ({"F16": {PLAIN: 1.0}, "Q8_0": {PLAIN: 1.2}, "Q6_K": {PLAIN: 0.5}}, "Q6_K"),
        ({"F16": {PLAIN: 1.0, FLOAT32: 0.5}, "Q8_0": {PLAIN: 1.2}, "Q6_K": {PLAIN: 0.47}}, "F16"),  # equally fast
        ({"F16": {PLAIN: 1.0}, "BF16": {PLAIN: 0.54}, "Q8_0": {PLAIN: 0.5}, "Q6_K": {PLAIN: 0.5}}, "BF16"),
        ({"F16": {PLAIN: 1.0}, "BF16": {ONEDNN_BF16: 0.5, PLAIN: 2.0}, "Q8_0": {PLAIN: 0.8}}, "BF16"),
        ({"F16": {PLAIN: 1.0}, "Q8_0": {PLAIN: math.inf}, "Q6_K": {PLAIN: math.inf}}, "F16"),  # they crash
        ({"F16": {PLAIN: 1.0}}, "F16"),  # there was no time to measure more
        ({}, "F16"),
    ],
)
def test_the_fastest_type_is_taken(
    seconds: dict[str, dict[str, float]], expected: str, measured: Callable[..., None]
) -> None:
    measured(**seconds)
    assert fastest_vision_type(1).type_name == expected


def test_half_precision_weights_are_not_rounded_to_be_faster(measured: Callable[..., None]) -> None:
    measured(F16={PLAIN: 1.0, ONEDNN_BF16: 0.1}, Q8_0={PLAIN: 0.5}, Q6_K={PLAIN: 0.5})
    assert fastest_vision_type(1).type_name == "Q8_0"


def test_the_reason_names_the_rates(measured: Callable[..., None]) -> None:
    """2 * 1152 * 4352 * rows operations, whatever the length of a K-quant's rows."""
    n_operations = 2 * 1152 * 4352 * MANY
    rates = {"F16": 300, "BF16": 100, "Q8_0": 200, "Q6_K": 700}
    measured(**{kind: {PLAIN: n_operations / rate / 1e9} for kind, rate in rates.items()})
    assert str(fastest_vision_type(1)) == (
        "vision type Q6_K: GFLOP/s of this CPU are F16 300 (plain), BF16 100 (plain), Q8_0 200 (plain), "
        "Q6_K 700 (plain)"
    )


def test_the_commands_say_what_they_chose(
    measured: Callable[..., None],
    make_checkpoint: Callable[..., Path],
    make_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    def run(*arguments: Any) -> Any:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)

    measured(F16={PLAIN: 1.0}, Q8_0={PLAIN: 0.5}, Q6_K={PLAIN: 0.8})
    result = run("convert", make_checkpoint(PRESETS["tiny"]), tmp_path / "out", "--vision-type", "auto")
    assert result.exit_code == 0 and (tmp_path / "out" / "mmproj-Q8_0.gguf").exists()
    assert result.stderr.startswith("note: vision type Q8_0: GFLOP/s of this CPU are F16")
    named = run("convert", make_checkpoint(PRESETS["tiny"]), tmp_path / "named", "--vision-type", "Q8_0")
    assert named.exit_code == 0 and "GFLOP/s" not in named.stderr
    files = [tmp_path / folder / "mmproj-Q8_0.gguf" for folder in ("out", "named")]
    assert files[0].read_bytes() == files[1].read_bytes()
    folder = shutil.copytree(make_model(PRESETS["tiny"], "F32", "F16"), tmp_path / "model")
    result = run("requantize", folder, "--vision-type", "AUTO")
    assert result.exit_code == 0 and "note: vision type Q8_0" in result.stderr
    shown = run("inspect", folder / "mmproj-Q8_0.gguf", "--json").stdout
    assert json.loads(shown)["files"][0]["provenance"]["policy"] == "Q8_0"
