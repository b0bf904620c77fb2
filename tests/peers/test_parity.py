"""Comparison with transformers in float32, stage by stage: tiles, token counts, streams, logits, greedy tokens."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

import granite4v
from granite4v.clip_projector import VisionEncoder, count_tokens, load_image
from granite4v.clip_projector.pixels import normalize
from granite4v.clip_projector.tiles_anyres import cut
from granite4v.ggml.backend import Backend
from granite4v.ggml.graph import Graph
from tests.helpers.parity import LOGITS_F32, REAL_SIZES, STREAMS_F16, check_streams
from tests.helpers.pictures import SIZES, SMALL_SIZES, blank_picture, noise_picture, odd_files, text_picture
from tests.peers.reference import relative_l2
from tests.toy.checkpoint import MAPPING_CASES, PRESETS, CheckpointSpec

if TYPE_CHECKING:
    from tests.peers.reference import Reference

REAL_TILES = PRESETS["tiny-real-tiles"]
MODELS: dict[str, CheckpointSpec] = {
    "tiny": PRESETS["tiny"],
    "real-tiles": REAL_TILES,
    "untied": replace(PRESETS["tiny"], tied=False),
    "fused-mlp": replace(PRESETS["tiny"], text_type="granitemoehybrid"),
    "two-layerwise": PRESETS["tiny-wide"],
    **MAPPING_CASES,
}
Pair = tuple["Reference", granite4v.Model]


@pytest.fixture(scope="module")
def pair(
    load_reference: Callable[..., Reference], make_model: Callable[..., Path]
) -> Iterator[Callable[[CheckpointSpec], Pair]]:
    """Returns the reference and our model from F32 files for a specification."""
    opened: dict[CheckpointSpec, granite4v.Model] = {}

    def get(spec: CheckpointSpec) -> Pair:
        if spec not in opened:
            opened[spec] = granite4v.load(make_model(spec), n_ctx=8192, device="cpu")
        # transformers cannot read the fused MLP here; the dense checkpoint of the same seed has the same weights
        return load_reference(replace(spec, text_type="granite")), opened[spec]

    yield get
    for model in opened.values():
        model.close()


@pytest.mark.parametrize("size", REAL_SIZES)
def test_real_tiles_from_pixels_to_answer(pair: Callable[..., Pair], size: tuple[int, int]) -> None:
    reference, model = pair(REAL_TILES)
    encoder = model.engine.encoder()
    for picture in (noise_picture(size), text_picture(size)):
        tiles = normalize(cut(picture, encoder.config.tiling), encoder.config.tiling)
        np.testing.assert_array_equal(tiles.transpose(0, 3, 1, 2), reference.tiles(picture))
        assert count_tokens(size, encoder.config) == reference.n_tokens(picture)
        check_streams(reference, encoded_by(encoder), picture)
        check_answer(reference, model, picture)


def encoded_by(encoder: VisionEncoder) -> Callable[[Any], granite4v.ImageFeatures]:
    return lambda picture: encoder.encode([load_image(picture)])[0]


def check_answer(reference: Reference, model: granite4v.Model, picture: object) -> None:
    expected, tokens = reference.logits_and_greedy("<tables_json>", [picture], 32)
    found = model.logits("<tables_json>", [picture])
    assert relative_l2(found, expected) <= LOGITS_F32
    assert int(found.argmax()) == int(expected.argmax())
    answer = model.generate("<tables_json>", [picture], max_tokens=32)
    assert answer.tokens == tokens


@pytest.mark.parametrize("name", odd_files())
def test_files_of_other_kinds(pair: Callable[..., Pair], name: str) -> None:
    reference, model = pair(PRESETS["tiny"])
    data, tiling = odd_files()[name], model.engine.encoder().config.tiling
    if name == "16-bit":
        with pytest.warns(granite4v.ImageWarning, match="above 255 are read as white"):
            picture = load_image(data, as_reference=True)
    else:
        picture = load_image(data)
    tiles = normalize(cut(picture.pillow, tiling), tiling).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(tiles, reference.tiles(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("name", [name for name in MODELS if name != "real-tiles"])
def test_streams_of_every_configuration(pair: Callable[..., Pair], name: str) -> None:
    reference, model = pair(MODELS[name])
    for size in SMALL_SIZES:
        check_streams(reference, encoded_by(model.engine.encoder()), noise_picture(size))


@pytest.mark.parametrize("size", SIZES[2::3])
def test_half_precision_weights_with_default_settings(
    load_reference: Callable[..., Reference], make_model: Callable[..., Path], size: tuple[int, int]
) -> None:
    with VisionEncoder(next(make_model(REAL_TILES, "F16", "F16").glob("mmproj-*.gguf"))) as encoder:
        check_streams(load_reference(REAL_TILES), encoded_by(encoder), text_picture(size), STREAMS_F16)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "real-tiles"])
def test_answers_of_every_configuration(pair: Callable[..., Pair], name: str) -> None:
    reference, model = pair(MODELS[name])
    check_answer(reference, model, text_picture((150, 100)))


def test_two_pictures_a_later_picture_and_none(pair: Callable[..., Pair]) -> None:
    reference, model = pair(PRESETS["tiny"])
    first, second = noise_picture((150, 100), 1), text_picture((70, 200), 2)
    part = {"type": "image"}
    cases = [
        ("What differs?", [first, second]),
        ("No picture here: 1234567.", []),
        (
            [
                {"role": "user", "content": [part, {"type": "text", "text": "First?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
                {"role": "user", "content": [{"type": "text", "text": "And now"}, part]},
            ],
            [first, second],
        ),
    ]
    for prompt, pictures in cases:
        expected, tokens = reference.logits_and_greedy(prompt, pictures, 32)
        assert relative_l2(model.logits(prompt, pictures), expected) <= LOGITS_F32
        assert model.generate(prompt, pictures, max_tokens=32).tokens == tokens


def test_equal_tiles_are_computed_once(pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    reference, model = pair(PRESETS["tiny"])
    encoder = model.engine.encoder()
    n_values: list[int] = []
    compute = Graph.run

    def counted(graph: Graph, *arguments: Any, pixels: np.ndarray) -> Any:
        n_values.append(pixels.size)
        return compute(graph, *arguments, pixels=pixels)

    monkeypatch.setattr(Graph, "run", counted)
    check_streams(reference, encoded_by(encoder), blank_picture((128, 128)))
    assert n_values == [3 * encoder.config.tiling.tile_px**2]


def test_all_tiles_at_once_from_copied_weights(
    load_reference: Callable[..., Reference], make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Takes a GPU's path on the CPU: one graph over all tiles, weights in the device's own buffer."""
    begin = Backend.__init__

    def as_accelerator(self: Backend, *arguments: object, **options: object) -> None:
        begin(self, *arguments, **options)  # type: ignore[arg-type]
        self.is_cpu = False

    monkeypatch.setattr(Backend, "__init__", as_accelerator)
    spec = PRESETS["tiny"]
    with VisionEncoder(next(make_model(spec).glob("mmproj-*.gguf")), "cpu") as encoder:
        check_streams(load_reference(spec), encoded_by(encoder), noise_picture((300, 200)))
