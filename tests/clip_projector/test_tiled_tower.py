"""Canvases, the tower over all tiles and its projector, compared numerically with transformers 5.24.

Float32 files differ from the reference only by the order of sums (observed: 9e-7 in the worst tile).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from granite4v.clip_projector.cross_features import STATES, CrossFeatures, canvas_inputs, fill_states, max_nodes
from granite4v.clip_projector.grid_canvas import canvas_layout
from granite4v.clip_projector.pixels import normalize
from granite4v.clip_projector.tiles_canvas import cut_canvas
from granite4v.clip_projector.weights import Weights
from granite4v.errors import ModelFileError
from granite4v.ggml import onednn
from granite4v.ggml.backend import Backend
from granite4v.ggml.gguf_file import GgufFile
from granite4v.ggml.graph import Graph
from granite4v.ggml.kernels import ATTENTION, Kernel
from tests.helpers.pictures import noise_picture
from tests.peers.reference import relative_l2
from tests.toy.tiled_tower import IMAGENET_MEAN, IMAGENET_STD, TowerSpec, reference_tower, write_tower

SPEC = TowerSpec()
TOLERANCE = 2e-5
# (width, height): canvas (rows, columns); tiles of 56 pixels
CASES = {
    (56, 56): (1, 1),
    (30, 20): (1, 1),
    (100, 50): (1, 2),
    (160, 40): (1, 3),
    (1000, 9): (1, 4),
    (50, 100): (2, 1),
    (110, 100): (2, 2),
    (1700, 2200): (2, 2),
    (57, 160): (3, 1),
    (1, 700): (4, 1),
}


def reference_processor(spec: TowerSpec) -> Any:
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    size = {"height": spec.image_px, "width": spec.image_px}
    return MllamaImageProcessorPil(size=size, image_mean=list(IMAGENET_MEAN), image_std=list(IMAGENET_STD))


@pytest.fixture(scope="module")
def reference() -> Any:
    return reference_tower(SPEC)


@pytest.fixture(scope="module")
def file(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tower(tmp_path_factory.mktemp("tower") / "mmproj.gguf", *reference)


def ours(path: Path, size: tuple[int, int], kernels: dict[str, Kernel] | None = None) -> CrossFeatures:
    config = SPEC.config()
    backend = Backend("cpu", 2)
    with GgufFile.open(path) as opened:
        weights = Weights(opened, backend, kernels or {})
    graph = Graph(backend, max_nodes(config))
    try:
        where, inputs = canvas_inputs(noise_picture(size), config, SPEC.canvas())
        fill_states(graph, weights, config, SPEC.text_hidden, where.n_tiles)
        return CrossFeatures(graph.run(**inputs)[STATES], where)
    finally:
        graph.close()
        weights.close()
        backend.close()


def theirs(reference: Any, size: tuple[int, int]) -> np.ndarray:
    import torch

    tower, projector = reference
    given = reference_processor(SPEC)(noise_picture(size), return_tensors="pt")
    del given["num_tiles"]
    with torch.no_grad():
        states: np.ndarray = projector(tower(**given).last_hidden_state)[0, 0].numpy()
    return states


@pytest.mark.parametrize("side", [56, 560])
def test_tiles_are_the_references_to_the_last_bit(side: int) -> None:
    spec = TowerSpec(image_px=side)
    sizes = [*CASES, (side, side), (side + 1, side), (2 * side, side), (3 * side + 1, side), (640, 480), (1, 1)]
    for size in sizes:
        expected = reference_processor(spec)(noise_picture(size), return_tensors="np")
        where = canvas_layout(size, spec.canvas())
        assert where.aspect_ratio_id == expected["aspect_ratio_ids"][0, 0], size
        assert where.n_tiles == expected["num_tiles"][0][0] == expected["aspect_ratio_mask"].sum(), size
        found = normalize(cut_canvas(noise_picture(size), where, spec.canvas()), spec.canvas())
        np.testing.assert_array_equal(found.transpose(0, 3, 1, 2), expected["pixel_values"][0, 0, : where.n_tiles])


@pytest.mark.parametrize("size", CASES)
def test_canvases(size: tuple[int, int]) -> None:
    where = canvas_layout(size, SPEC.canvas())
    assert (where.rows, where.columns) == CASES[size]


def test_black_beside_the_image_and_zeros_for_tiles_that_it_lacks() -> None:
    where, inputs = canvas_inputs(noise_picture((100, 50)), SPEC.config(), SPEC.canvas())
    assert (where.width, where.height) == (100, 50)
    pixels = inputs["pixels"]
    black = normalize(np.zeros((1, 1, 1, 3), np.uint8), SPEC.canvas())[0, 0, 0]
    np.testing.assert_array_equal(pixels[1, -1].reshape(3, -1)[:, -1], black)
    assert pixels.shape == (4, 16, 3 * 14 * 14) and not pixels[2:].any() and pixels[:2].all()


@pytest.mark.parametrize("size", CASES)
def test_states_are_the_references(reference: Any, file: Path, size: tuple[int, int]) -> None:
    found, expected = ours(file, size), theirs(reference, size)
    assert found.states.shape == expected.shape == (4, 17, SPEC.text_hidden)
    assert (found.n_tiles, found.n_tokens) == (CASES[size][0] * CASES[size][1], 1)
    for tile in range(4):  # including tiles that the image does not have
        assert relative_l2(found.states[tile], expected[tile]) <= TOLERANCE, tile


@pytest.mark.skipif(not onednn.is_installed(), reason="needs the extra 'onednn'")
def test_products_of_onednn(reference: Any, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries are computed in pieces, of which the last is shorter."""
    monkeypatch.setattr("granite4v.clip_projector.tiled_tower.QUERIES_AT_ONCE", 16)
    exact = Kernel("onednn", arithmetic="F32")
    for size in ((160, 40), (110, 100)):
        found = ours(file, size, {"F32": exact, ATTENTION: exact})
        assert relative_l2(found.states, theirs(reference, size)) <= TOLERANCE
    if onednn.multiplies_bfloat16():
        rounded = ours(file, (160, 40), {ATTENTION: Kernel("onednn bf16", arithmetic="BF16")})
        assert 1e-5 < relative_l2(rounded.states, theirs(reference, (160, 40))) < 2e-2


def test_quantized_matrices(reference: Any, tmp_path: Path) -> None:
    path = write_tower(tmp_path / "mmproj-Q8_0.gguf", *reference, kind="Q8_0")
    assert 1e-4 < relative_l2(ours(path, (110, 100)).states, theirs(reference, (110, 100))) < 5e-2


def test_a_tensor_of_another_shape_is_a_message(tmp_path: Path) -> None:
    other = TowerSpec(image_px=70)
    path = write_tower(tmp_path / "mmproj.gguf", *reference_tower(other))
    with pytest.raises(ModelFileError, match=r"has tensor 'v\..*expected"):
        ours(path, (56, 56))
