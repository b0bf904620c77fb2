"""Reads and writes 'anyres' tiling in config.json, preprocessor_config.json and GGUF, for every family that uses it.

GGUF keys are llama.cpp's, which lists grids as (width, height); here and in Hugging Face they are (height, width).
"""

from __future__ import annotations

from typing import Any

from granite4v import gguf_keys as keys
from granite4v.errors import CheckpointError, ModelFileError
from granite4v.families.base import CanvasConfig, TilingConfig, TowerConfig
from granite4v.families.fields import short
from granite4v.families.hf_fields import MAX_PINPOINTS, MAX_PIXELS, Fields, is_integer, is_number, shown
from granite4v.ggml.metadata import AGAIN, GgufMetadata

Triple = tuple[float, float, float]

MAX_TILES = 256  # most tiles of a grid
MAX_GRID_PX = MAX_PIXELS * MAX_TILES
MAX_CANVAS_PX = 1 << 27  # most pixels of a grid, which is in memory at once: 0.4 GB as RGB
MAX_CHANNEL = 1e6  # of a mean or standard deviation
MIN_STD = 1e-6
FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # the index is the PIL.Image.Resampling value


def tiling_from_hf(
    config: Fields, preprocessor: Fields, tower: TowerConfig, mean: Triple, std: Triple, default: Any = None
) -> TilingConfig:
    """Reads the tiling of a checkpoint. `default`: the grids if neither file gives any. `mean`, `std`: used if the
    processor gives none.

    Raises CheckpointError if the tile sizes of processor and tower differ, or the grids of processor and model.
    """
    tile_px = _tile_px(preprocessor, tower)
    given = [
        fields.pairs("image_grid_pinpoints", 1, MAX_GRID_PX, most=MAX_PINPOINTS)
        for fields in (config, preprocessor)
        if fields.get("image_grid_pinpoints")
    ]
    if not given and not default:
        raise CheckpointError(f"'{config.file}' has no 'image_grid_pinpoints'; expected (height, width) pairs.")
    if len(given) == 2 and given[0] != given[1]:
        raise CheckpointError(
            f"'image_grid_pinpoints' differ between {config.file} and {preprocessor.file}; they must agree."
        )
    pinpoints = given[0] if given else default
    wrong = [[h, w] for h, w in pinpoints if h % tile_px or w % tile_px or h * w > MAX_TILES * tile_px**2]
    if wrong:
        raise CheckpointError(
            f"'image_grid_pinpoints' {shown(wrong)} are not all multiples of the {tile_px} px tile, or of more than "
            f"{MAX_TILES} tiles."
        )
    return TilingConfig(
        tile_px=tile_px,
        image_grid_pinpoints=tuple((h, w) for h, w in pinpoints),
        **pixel_scaling(preprocessor, mean, std),
    )


def pixel_scaling(preprocessor: Fields, mean: Triple, std: Triple, resample: str = "bicubic") -> dict[str, Any]:
    """Reads the rescaling, normalization and resampling of pixels, as fields of a TilingConfig. A step that the
    processor turns off gets values that change nothing. `resample`: the filter if the processor gives none."""
    normalize, rescale = preprocessor.flag("do_normalize", True), preprocessor.flag("do_rescale", True)
    return {
        "image_mean": _channels(preprocessor, "image_mean", mean) if normalize else (0.0, 0.0, 0.0),
        "image_std": _channels(preprocessor, "image_std", std, positive=True) if normalize else (1.0, 1.0, 1.0),
        "rescale_factor": preprocessor.number("rescale_factor", 0, 1, 1 / 255, positive=True) if rescale else 1.0,
        "resample": _resample(preprocessor, resample),
    }


def scaling_from_gguf(metadata: GgufMetadata, resample: str = "bicubic") -> dict[str, Any]:
    """Reads the fields of `pixel_scaling` from a vision file. `resample`: the filter of files that give none. Raises
    ModelFileError."""
    return {
        "image_mean": tuple(short(value) for value in metadata.numbers(keys.IMAGE_MEAN, 3, -MAX_CHANNEL, MAX_CHANNEL)),
        "image_std": tuple(short(value) for value in metadata.numbers(keys.IMAGE_STD, 3, MIN_STD, MAX_CHANNEL)),
        "rescale_factor": metadata.number(keys.RESCALE_FACTOR, 1e-12, 1, 1 / 255),
        "resample": metadata.integer(keys.RESAMPLE, 0, len(FILTERS) - 1, FILTERS.index(resample)),
    }


def scaling_metadata(tiling: TilingConfig | CanvasConfig) -> dict[str, Any]:
    """The metadata that `scaling_from_gguf` reads back."""
    return {
        keys.IMAGE_MEAN: list(tiling.image_mean),
        keys.IMAGE_STD: list(tiling.image_std),
        keys.RESCALE_FACTOR: repr(tiling.rescale_factor),  # as text: float32 would change the last bit of pixel values
        keys.RESAMPLE: tiling.resample,
    }


def _channels(preprocessor: Fields, key: str, default: Triple, *, positive: bool = False) -> Triple:
    """Reads one number per channel."""
    value = preprocessor.get(key, default)
    low = MIN_STD if positive else -MAX_CHANNEL
    if (
        not isinstance(value, (list, tuple))
        or len(value) != 3
        or not all(is_number(item) and low <= item <= MAX_CHANNEL for item in value)
    ):
        raise preprocessor.error(key, f"a list of 3 numbers from {low:g} to {MAX_CHANNEL:g}, one a channel")
    red, green, blue = map(float, value)
    return red, green, blue


def _resample(preprocessor: Fields, default: str) -> int:
    """Reads the resampling filter and returns Pillow's number for it; some files give its name."""
    value = preprocessor.get("resample", FILTERS.index(default))
    if isinstance(value, str) and value.lower() in FILTERS:
        return FILTERS.index(value.lower())
    if not is_integer(value) or not 0 <= value < len(FILTERS):
        raise preprocessor.error("resample", f"one of Pillow's filters, 0 to {len(FILTERS) - 1}")
    return int(value)


def _tile_px(preprocessor: Fields, tower: TowerConfig) -> int:
    """Reads the tile side of the processor. All sides of `size` and of the optional `crop_size` must be the tower's;
    raises CheckpointError otherwise.

    Older files give an integer, which transformers reads as the shortest edge of the size and the side of the crop,
    or a list of height and width (`get_size_dict`).
    """
    size = _size(preprocessor, "size", ("height", "width", "shortest_edge"))
    crop = _size(preprocessor, "crop_size", ("height", "width"))
    if any(side != tower.image_size for side in (*size, *crop)):
        found = f"{preprocessor.get('size')!r}"
        cropped = f" cropped to {preprocessor.get('crop_size')!r}" if crop and set(crop) != set(size) else ""
        raise CheckpointError(
            f"{preprocessor.file} makes tiles of size {found}{cropped}, but the tower takes "
            f"{tower.image_size}x{tower.image_size}."
        )
    return tower.image_size


def _size(preprocessor: Fields, key: str, names: tuple[str, ...]) -> list[int]:
    """The sides in a size field of any form: integer, list or object; empty if the field is missing."""
    value = preprocessor.get(key, {})
    if isinstance(value, dict):
        sides = [value[name] for name in names if value.get(name) is not None]
        if value and not sides:
            sides = [None]
    else:
        sides = value if isinstance(value, list) and len(value) == 2 else [value]
    if not all(is_integer(side) and 1 <= side <= MAX_PIXELS for side in sides):
        raise preprocessor.error(key, f"a side in pixels from 1 to {MAX_PIXELS}, or an object of {', '.join(names)}")
    return list(sides)


def tiling_from_gguf(metadata: GgufMetadata, tower: TowerConfig, *, height_first: bool = False) -> TilingConfig:
    """Reads the tiling of a vision file. `height_first`: the file lists grids as (height, width). Raises
    ModelFileError."""
    flat = metadata.integers(keys.IMAGE_GRID_PINPOINTS, 1, MAX_GRID_PX, max_length=2 * MAX_PINPOINTS)
    if len(flat) % 2:
        raise ModelFileError(
            f"'{metadata.path}': '{keys.IMAGE_GRID_PINPOINTS}' holds {len(flat)} numbers, expected pairs; {AGAIN}."
        )
    pairs = list(zip(flat[::2], flat[1::2], strict=True))
    tile_px = metadata.integer(keys.PREPROC_IMAGE_SIZE, 1, MAX_PIXELS, tower.image_size)
    if tile_px != tower.image_size:
        raise ModelFileError(
            f"'{metadata.path}' cuts tiles of {tile_px} px ('{keys.PREPROC_IMAGE_SIZE}') for a tower that takes "
            f"{tower.image_size} px ('{keys.IMAGE_SIZE}'), expected equal sizes; {AGAIN}."
        )
    most_px = min(MAX_TILES * tile_px**2, MAX_CANVAS_PX)
    for first, second in pairs:
        if first % tile_px or second % tile_px or first * second > most_px:
            raise ModelFileError(
                f"'{metadata.path}': '{keys.IMAGE_GRID_PINPOINTS}' holds a grid of {first:,} x {second:,} px, expected "
                f"multiples of the {tile_px} px tile and at most {most_px:,} pixels; {AGAIN}."
            )
    return TilingConfig(
        tile_px=tile_px,
        image_grid_pinpoints=tuple(pairs if height_first else [(h, w) for w, h in pairs]),
        **scaling_from_gguf(metadata),
        max_tiles_of_tokens=_optional(metadata, keys.MAX_TILES_OF_TOKENS, MAX_TILES),
        square_if_several=metadata.flag(keys.SQUARE_IF_SEVERAL, False),
        video_pooling=_optional(metadata, keys.VIDEO_POOLING, tower.grid_side),
    )


def _optional(metadata: GgufMetadata, key: str, high: int) -> int | None:
    return metadata.integer(key, 1, high) if key in metadata else None


def tiling_metadata(tiling: TilingConfig) -> dict[str, Any]:
    """The metadata that `tiling_from_gguf` reads back."""
    optional = {
        keys.MAX_TILES_OF_TOKENS: tiling.max_tiles_of_tokens,
        keys.SQUARE_IF_SEVERAL: tiling.square_if_several or None,
        keys.VIDEO_POOLING: tiling.video_pooling,
    }
    return {
        keys.PREPROC_IMAGE_SIZE: tiling.tile_px,
        **scaling_metadata(tiling),
        keys.IMAGE_GRID_PINPOINTS: [px for h, w in tiling.image_grid_pinpoints for px in (w, h)],
        **{key: value for key, value in optional.items() if value is not None},
    }
