"""Tiling by 'anyres' in config.json, preprocessor_config.json and GGUF: for every family that cuts pictures so.

GGUF keys are llama.cpp's, which lists grids as (width, height); here and in Hugging Face they are (height, width).
"""

from __future__ import annotations

from typing import Any

from granite4v import gguf_keys as keys
from granite4v.errors import CheckpointError, ModelFileError
from granite4v.families.base import Metadata, TilingConfig, TowerConfig
from granite4v.families.fields import need, short

Triple = tuple[float, float, float]


def tiling_from_hf(
    pinpoints: Any, preprocessor: Metadata, tower: TowerConfig, mean: Triple, std: Triple
) -> TilingConfig:
    """The tiling of a checkpoint whose grids are `pinpoints`; `mean` and `std` where the processor says none.

    Raises CheckpointError when the processor's tiles are not the tower's, or its grids not the model's.
    """
    tile_px = _tile_px(preprocessor, tower)
    if not pinpoints:
        raise CheckpointError("config.json has no 'image_grid_pinpoints'; expected (height, width) pairs.")
    if preprocessor.get("image_grid_pinpoints", pinpoints) != pinpoints:
        raise CheckpointError(
            "'image_grid_pinpoints' differ between config.json and preprocessor_config.json; they must agree."
        )
    if any(side % tile_px for pair in pinpoints for side in pair):
        raise CheckpointError(f"'image_grid_pinpoints' {pinpoints} are not all multiples of the {tile_px} px tile.")
    return TilingConfig(
        tile_px=tile_px,
        image_grid_pinpoints=tuple((int(h), int(w)) for h, w in pinpoints),
        image_mean=tuple(float(value) for value in preprocessor.get("image_mean", mean)),
        image_std=tuple(float(value) for value in preprocessor.get("image_std", std)),
        rescale_factor=float(preprocessor.get("rescale_factor", 1 / 255)),
        resample=int(preprocessor.get("resample", 3)),
    )


def _tile_px(preprocessor: Metadata, tower: TowerConfig) -> int:
    """The side of the processor's tiles: a size by height and width, or by its shortest edge, and perhaps a crop."""
    size, crop = preprocessor.get("size") or {}, preprocessor.get("crop_size") or {}
    tile_px = size.get("height") or size.get("shortest_edge") or tower.image_size
    sides = [tile_px, size.get("width", tile_px), crop.get("height", tile_px), crop.get("width", tile_px)]
    if any(side != tower.image_size for side in sides):
        given = f"{size!r}" if not crop or set(sides[2:]) == {tile_px} else f"{size!r} cropped to {crop!r}"
        raise CheckpointError(
            f"preprocessor_config.json makes tiles of size {given}, but the tower takes "
            f"{tower.image_size}x{tower.image_size}."
        )
    return int(tile_px)


def tiling_from_gguf(metadata: Metadata, tower: TowerConfig, *, height_first: bool = False) -> TilingConfig:
    """The tiling of a vision file. `height_first`: its grids are listed (height, width). Raises ModelFileError."""
    flat = [int(value) for value in need(metadata, keys.IMAGE_GRID_PINPOINTS)]
    if len(flat) % 2 or not flat:
        raise ModelFileError(f"'{keys.IMAGE_GRID_PINPOINTS}' holds {len(flat)} numbers; expected pairs.")
    pairs = list(zip(flat[::2], flat[1::2], strict=True))
    tile_px = int(metadata.get(keys.PREPROC_IMAGE_SIZE, tower.image_size))
    if any(side <= 0 or side % tile_px for side in flat):
        raise ModelFileError(f"'{keys.IMAGE_GRID_PINPOINTS}' {flat} are not all multiples of the {tile_px} px tile.")
    return TilingConfig(
        tile_px=tile_px,
        image_grid_pinpoints=tuple(pairs if height_first else [(h, w) for w, h in pairs]),
        image_mean=tuple(short(value) for value in need(metadata, keys.IMAGE_MEAN)),
        image_std=tuple(short(value) for value in need(metadata, keys.IMAGE_STD)),
        rescale_factor=float(metadata.get(keys.RESCALE_FACTOR, 1 / 255)),
        resample=int(metadata.get(keys.RESAMPLE, 3)),
    )


def tiling_metadata(tiling: TilingConfig) -> dict[str, Any]:
    """What `tiling_from_gguf` reads back."""
    return {
        keys.PREPROC_IMAGE_SIZE: tiling.tile_px,
        keys.IMAGE_MEAN: list(tiling.image_mean),
        keys.IMAGE_STD: list(tiling.image_std),
        keys.RESCALE_FACTOR: repr(tiling.rescale_factor),  # as text: float32 would move pixels by a last bit
        keys.RESAMPLE: tiling.resample,
        keys.IMAGE_GRID_PINPOINTS: [px for h, w in tiling.image_grid_pinpoints for px in (w, h)],
    }
