"""`granite4v verify`: small differences for the right checkpoint, large ones for another, clear failures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from granite4v.cli.main import app
from granite4v.converter import Options, convert
from granite4v.runtime.verify import divergence, relative_l2
from tests.helpers.pictures import noise_picture
from tests.toy.checkpoint import PRESETS, CheckpointSpec, write_checkpoint

TINY = PRESETS["tiny"]


@pytest.fixture(scope="module")
def folder(make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An F32 and a Q8_0 model of the tiny checkpoint, and an image."""
    folder = tmp_path_factory.mktemp("verify")
    for kind in ("F32", "Q8_0"):
        convert(make_checkpoint(TINY), folder / kind, Options(text_type=kind, vision_type=kind))
    noise_picture((150, 90)).save(folder / "picture.png")
    return folder


def verify(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["verify", *map(str, arguments)])


def comparisons(result: Result) -> list[dict]:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)["comparisons"]


@pytest.mark.slow
def test_unquantized_files_are_the_checkpoint(folder: Path, make_checkpoint: Callable[[CheckpointSpec], Path]) -> None:
    picture = folder / "picture.png"
    result = verify(
        folder / "F32", "--reference", make_checkpoint(TINY), "--image", picture, "--exact", "--positions", 8, "--json"
    )
    with_image, text_only = comparisons(result)
    assert with_image["image"] == str(picture)
    assert with_image["n_image_tokens"] == with_image["n_image_tokens_reference"] > 16
    assert [stream["layer"] for stream in with_image["streams"]] == [0, 2, 3, 4, 5, 7]
    assert all(stream["relative_l2"] < 2e-5 for stream in with_image["streams"])
    assert (text_only["image"], text_only["streams"]) == (None, [])
    for comparison in (with_image, text_only):
        assert comparison["same_prompt_tokens"] is True
        assert comparison["n_positions"] == 8
        assert comparison["same_top"] == 1.0
        assert comparison["logits_max"] < 1e-4
        assert 0 <= comparison["kl_max"] < 1e-8


@pytest.mark.slow
def test_quantized_files_show_their_damage(folder: Path, make_checkpoint: Callable[[CheckpointSpec], Path]) -> None:
    result = verify(folder / "Q8_0", "--reference", make_checkpoint(TINY), "--image", folder / "picture.png", "--json")
    with_image, text_only = comparisons(result)
    assert all(1e-3 < stream["relative_l2"] < 0.1 for stream in with_image["streams"])
    for comparison in (with_image, text_only):
        assert 1e-7 < comparison["kl_mean"] < 0.1
        assert 1e-4 < comparison["logits_relative_l2"] < 0.2


@pytest.mark.parametrize("preset", ["tiny-granite-3.3", "tiny-clip-llama"])
def test_the_other_family_is_compared_with_its_reference(
    preset: str, folder: Path, make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path: Path
) -> None:
    source = make_checkpoint(PRESETS[preset])
    convert(source, tmp_path / "model", Options("F32", "F32"))
    arguments = ("--image", folder / "picture.png", "--exact", "--positions", 4, "--json")
    with_image, text_only = comparisons(verify(tmp_path / "model", "--reference", source, *arguments))
    assert with_image["n_image_tokens"] == with_image["n_image_tokens_reference"]
    assert [stream["layer"] for stream in with_image["streams"]] == [0]
    for comparison in (with_image, text_only):
        assert (comparison["same_prompt_tokens"], comparison["same_top"]) == (True, 1.0)
        assert comparison["logits_max"] < 1e-4


def test_the_cache_goes_by_the_name_that_transformers_has_for_it(
    folder: Path, make_checkpoint: Callable[[CheckpointSpec], Path], recwarn: pytest.WarningsRecorder
) -> None:
    comparisons(verify(folder / "F32", "--reference", make_checkpoint(TINY), "--positions", 3, "--json"))
    assert not [warning for warning in recwarn if "past_key_values" in str(warning.message)]


def test_what_transformers_raises_is_one_message(
    folder: Path, make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path: Path
) -> None:
    broken = shutil.copytree(make_checkpoint(TINY), tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    for change in ({"vision_config": 7}, {"downsample_rate": None}, {"deepstack_layer_map": [["x"]]}):
        (broken / "config.json").write_text(json.dumps(config | change))
        result = verify(folder / "F32", "--reference", broken, "--positions", 1)
        assert (result.exit_code, result.stdout) == (1, "")
        assert f"cannot load '{broken}': " in result.stderr, result.stderr


@pytest.mark.slow
def test_another_checkpoint_is_noticed(folder: Path, make_checkpoint: Callable[[CheckpointSpec], Path]) -> None:
    other = make_checkpoint(replace(TINY, seed=7))
    result = verify(folder / "F32", "--reference", other, "--image", folder / "picture.png", "--json")
    with_image, text_only = comparisons(result)
    assert all(stream["relative_l2"] > 0.5 for stream in with_image["streams"])
    assert text_only["kl_mean"] > 0.5
    assert text_only["same_top"] < 0.5


def test_the_table_names_every_figure(folder: Path, make_checkpoint: Callable[[CheckpointSpec], Path]) -> None:
    result = verify(
        folder / "F32", "--reference", make_checkpoint(TINY), "--image", folder / "picture.png", "--positions", 2
    )
    assert result.exit_code == 0, result.stderr
    for words in ("image tokens", "prompt tokens", "stream of layer 7", "KL divergence", "same top token", "text only"):
        assert words in result.stdout
    assert "reference:" in result.stderr  # progress stays off stdout


def test_failures(
    folder: Path, make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = make_checkpoint(replace(TINY, text_type="granitemoehybrid"))
    smaller = write_checkpoint(tmp_path / "smaller", replace(TINY, n_bpe=300))
    checkpoint, other = make_checkpoint(TINY), make_checkpoint(PRESETS["tiny-clip-llama"])
    for model, reference, message in (
        (folder / "F32", tmp_path / "nowhere", "has no config.json"),
        (folder / "F32", fused, "cannot find"),
        (folder / "F32", smaller, "vocabulary of"),
        (folder / "F32", other, f"not converted from '{other}', whose family is llava_next with the decoder llama; "),
        (folder / "missing", checkpoint, "missing"),
    ):
        result = verify(model, "--reference", reference, "--positions", 1)
        assert (result.exit_code, result.stdout) == (1, ""), message
        assert message in result.stderr
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    result = verify(folder / "F32", "--reference", checkpoint)
    assert result.exit_code == 1
    assert "pip install 'granite4v[verify]'" in result.stderr


def test_divergence_by_hand() -> None:
    expected, found = np.log([[0.5, 0.5], [0.9, 0.1]]), np.log([[0.25, 0.75], [0.9, 0.1]]) + 3
    by_hand = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert np.allclose(divergence(expected, found), [by_hand, 0])
    assert relative_l2(np.array([3.0, 4.0]), np.array([3.0, 0.0])) == pytest.approx(4 / 3)
