"""Compares our model with the reference numerically.

F32 files differ from the reference only by the order of float32 sums (observed 1e-6), F16 files by the rounding of the
weights (observed 8e-4 at these widths).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from PIL import Image

from granite4v import ImageFeatures, Model
from tests.helpers import pictures
from tests.helpers.pictures import noise_picture
from tests.peers.reference import Reference, relative_l2

STREAMS_F32, STREAMS_F16, LOGITS_F32 = 2e-5, 1.5e-3, 1e-4
SIZES = ((150, 100), (64, 64), (70, 300))
FEW = ((1, 1), (383, 385), (640, 480))
# Image sizes for tests of real tile geometry; the fast tests use a few of them.
REAL_SIZES = [pytest.param(size, marks=[] if size in FEW else pytest.mark.slow) for size in pictures.SIZES]


def check_streams(
    reference: Reference,
    encode: Callable[[Image.Image], ImageFeatures],
    picture: Image.Image,
    limit: float = STREAMS_F32,
) -> None:
    """Checks that the features from `encode` match the reference, layer by layer."""
    expected, features = reference.streams(picture), encode(picture)
    assert features.layers == sorted(expected)
    for layer, stream in zip(features.layers, features.streams, strict=True):
        difference = relative_l2(stream, expected[layer])
        assert difference <= limit, f"{picture.size}, stream before layer {layer}: {difference:.2e} over {limit:.0e}"


def check_logits(reference: Reference, model: Model, picture: Image.Image) -> None:
    """Compares the logits after a prompt that has one placeholder per row of the reference's own streams."""
    n_tokens = len(next(iter(reference.streams(picture).values())))
    before, after = reference.prompt_text("<tables_json>", 1).split("<image>")
    ids = reference.processor.tokenizer(before + "<image>" * n_tokens + after).input_ids
    expected, found = reference.logits_after(ids, [picture]), model.logits("<tables_json>", [picture])
    assert relative_l2(found, expected) < LOGITS_F32, picture.size


def check_model(reference: Reference, model: Model) -> None:
    """Compares streams and logits for images below, at and above the size of a tile."""
    for picture in map(noise_picture, SIZES):
        check_streams(reference, model.encode_image, picture)
        check_logits(reference, model, picture)
