"""LLaVA-NeXT files: libmtmd reads ours, we read those of llama.cpp's converter, and the commands take them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import granite4v
from granite4v.cli.main import app
from granite4v.clip_projector import VisionEncoder, load_image
from granite4v.families.registry import read_vision
from granite4v.ggml.gguf_file import GgufFile
from tests.helpers.gguf_edit import copy_gguf, older_layout
from tests.helpers.pictures import noise_picture, text_picture
from tests.peers.llama import encode_pieces
from tests.peers.reference import relative_l2
from tests.toy.checkpoint import PRESETS, CheckpointSpec

EMBEDDINGS = 2e-5
GRANITE, LLAMA = PRESETS["tiny-granite-3.3"], PRESETS["tiny-clip-llama"]
MISTRAL = PRESETS["tiny-clip-mistral"]
QUESTION = "What is the total of 12345?"


def test_stock_libmtmd_makes_the_same_embeddings_of_every_tile(make_model: Callable[..., Path]) -> None:
    """As close as possible: libmtmd rounds patches to F16 and uses gelu's other form in the projector, from an F16
    table.

    Its packing differs: the overview is last, padding is kept and has another colour, there are no newlines, and no
    grid for an image that is no larger than a tile.
    """
    folder, side = make_model(GRANITE), GRANITE.tile_px
    picture = noise_picture((2 * side, side))
    pieces = encode_pieces(folder / "text-F32.gguf", folder / "mmproj-F32.gguf", np.asarray(picture))
    with VisionEncoder(folder / "mmproj-F32.gguf", "cpu") as encoder:
        rows = encoder.encode([load_image(picture)])[0].streams[0]
        n = encoder.config.tokens_side
    overview, grid = rows[: n * n], rows[n * n :].reshape(n, 2 * n + 1, -1)[:, : 2 * n]
    ours = [*(grid[:, n * i : n * (i + 1)].reshape(n * n, -1) for i in range(2)), overview]
    assert len(pieces) == 3
    for found, expected in zip(pieces, ours, strict=True):
        assert relative_l2(found, expected) < 6e-4


def test_where_libmtmd_parts_from_the_reference_with_a_class_token(make_model: Callable[..., Path]) -> None:
    """It puts the class token last and then drops the first patch. Ours follows the reference."""
    folder = make_model(LLAMA)
    picture = noise_picture((LLAMA.tile_px,) * 2)
    (found,) = encode_pieces(folder / "text-F32.gguf", folder / "mmproj-F32.gguf", np.asarray(picture))
    with VisionEncoder(folder / "mmproj-F32.gguf", "cpu") as encoder:
        ours = encoder.encode([load_image(picture)])[0].streams[0][: len(found)]
    assert relative_l2(found, ours) > 0.1


def test_a_pair_as_published_runs(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """Swapped feed-forward names, the newline's old name, half-precision positions, no width, no activation."""
    folder = make_model(GRANITE)
    mmproj = older_layout(folder / "mmproj-F32.gguf", tmp_path / "mmproj-model-f16.gguf", GRANITE)
    text = tmp_path / "granite-vision-3.2-2b-F32.gguf"
    copy_gguf(folder / "text-F32.gguf", text, without=("granite4v.", "tokenizer.huggingface"))
    with GgufFile.open(mmproj) as theirs, GgufFile.open(folder / "mmproj-F32.gguf") as ours:
        assert read_vision(theirs)[1] == read_vision(ours)[1]
    picture = noise_picture((150, 100))
    with granite4v.load(text, mmproj=mmproj, device="cpu") as found, granite4v.load(folder, device="cpu") as expected:
        assert any("contains no tokenizer.json" in warning for warning in found.warnings)
        streams = [model.encode_image(picture).streams for model in (found, expected)]
        assert relative_l2(*streams) < 1.5e-3  # half-precision weights
        assert found.prepare(QUESTION, [picture]).spans == expected.prepare(QUESTION, [picture]).spans
        assert relative_l2(found.logits(QUESTION, [picture]), expected.logits(QUESTION, [picture])) < 1e-2


# --- commands ---


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "page.png"
    text_picture((150, 100)).save(path)
    return path


def test_ask_bench_and_extract(make_model: Callable[..., Path], page: Path) -> None:
    folder = make_model(GRANITE)
    asked = run("ask", page, "What is this?", "--model", folder, "--max-tokens", 6)
    assert asked.exit_code == 0 and asked.stdout.endswith("\n")
    with granite4v.load(folder) as model:
        expected = model.generate("<tables_json>", [page], max_tokens=6).text  # not a task of this model's template
    assert run("ask", page, "<tables_json>", "--model", folder, "--max-tokens", 6).stdout == f"{expected}\n"
    measured = run("bench", "--model", folder, "--image", page, "--max-tokens", 4)
    assert measured.exit_code == 0, measured.stderr
    assert json.loads(measured.stdout.splitlines()[-1])["image_tokens"] > 0
    read = run("extract", page, "--prompt", "What is this?", "--model", folder, "--max-tokens", 6, "--json")
    record = json.loads(read.stdout.splitlines()[-1])
    assert (record["task"], record["error"]) == ("prompt", None)


def test_task_tags_are_offered_only_where_the_template_knows_them(make_model: Callable[..., Path], page: Path) -> None:
    result = run("extract", page, "--task", "tables_json", "--model", make_model(GRANITE))
    assert result.exit_code == 1
    assert (
        "does not know the task 'tables_json'; it knows page_md, kvp, and any model takes a question" in result.stderr
    )


def test_inspect_shows_the_joined_hidden_states(make_model: Callable[..., Path]) -> None:
    shown = run("inspect", make_model(GRANITE)).stdout
    assert "hidden state 1, 2, 4, 5 -> decoder layer 0\n" in shown
    assert "llava_next" in shown and "two layers" in shown


@pytest.mark.parametrize("spec", [GRANITE, LLAMA, MISTRAL], ids=["granite", "clip-llama", "clip-mistral"])
def test_verify(
    spec: CheckpointSpec, make_checkpoint: Callable[..., Path], make_model: Callable[..., Path], page: Path
) -> None:
    """The second one's processor has no patch fields; the third one's template is in tokenizer_config.json."""
    result = run(
        *("verify", make_model(spec), "--reference", make_checkpoint(spec), "--image", page),
        *("--exact", "--positions", 4, "--json"),
    )
    assert result.exit_code == 0, result.stderr
    with_picture, text_only = json.loads(result.stdout)["comparisons"]
    assert with_picture["n_image_tokens"] == with_picture["n_image_tokens_reference"] > 0
    assert [stream["relative_l2"] < EMBEDDINGS for stream in with_picture["streams"]] == [True]
    for comparison in (with_picture, text_only):
        assert comparison["same_prompt_tokens"] is True
        assert comparison["same_top"] == 1.0 and comparison["logits_max"] < 1e-4
