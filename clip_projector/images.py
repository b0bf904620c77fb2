"""Opening pictures: whatever a person has (path, bytes, file, Pillow image, array) as an upright RGB image.

Knows nothing of tiles or models.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from granite4v.errors import ImageError, ImageWarning

if TYPE_CHECKING:
    from PIL.Image import Image

ImageSource: TypeAlias = "str | Path | bytes | Image | Any"


def load_image(source: ImageSource, name: str | None = None) -> Image:
    """The picture as Pillow RGB, uint8, turned upright by its EXIF orientation, transparency on white.

    `source`: a path, encoded bytes, a binary file object, a Pillow image, or a uint8 array `(h, w)`,
    `(h, w, 3)` or `(h, w, 4)`. Of a file with several frames the first is taken. Colours are converted as
    Hugging Face's image processors do, so that tiles come out equal. `name`: what messages call the picture;
    its path, in quotes, when it is not given.

    Warns (ImageWarning) of a greyscale picture with 16 or more bits: Pillow, and so the reference, cuts values
    above 255 to white, which a page rarely survives.

    Raises ImageError for what is missing, empty, not a picture, cut short, or so large that it is probably a
    decompression bomb (Pillow's limit, `PIL.Image.MAX_IMAGE_PIXELS`).
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    name = name or _describe(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = _open(source, name)
            image.load()
        _warn_if_clipped(image, name)
        return _to_rgb(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(
            f"{name} has more than {Image.MAX_IMAGE_PIXELS:,} pixels, which may be a decompression bomb; scale it "
            "down, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it."
        ) from None
    except UnidentifiedImageError:
        raise ImageError(
            f"{name} is not a picture that Pillow can read; give a PNG, JPEG, WebP, TIFF or BMP."
        ) from None
    except OSError as error:
        raise ImageError(f"{name} cannot be read as a picture: {error.strerror or error}.") from None
    except (SyntaxError, ValueError, EOFError) as error:  # what Pillow's decoders raise on damaged files
        raise ImageError(f"{name} is damaged: {error}.") from None


def _describe(source: ImageSource) -> str:
    if isinstance(source, str | Path):
        return f"'{source}'"
    if isinstance(source, bytes):
        return f"the picture ({len(source):,} bytes)"
    return f"the picture ({type(source).__name__})"


def _open(source: ImageSource, name: str) -> Image:
    from PIL import Image

    if isinstance(source, Image.Image):
        image = source
    elif isinstance(source, bytes):
        image = Image.open(io.BytesIO(_not_empty(source, name)))
    elif isinstance(source, str | Path):
        image = Image.open(io.BytesIO(_not_empty(Path(source).read_bytes(), name)))
    elif hasattr(source, "read"):
        image = Image.open(io.BytesIO(_not_empty(source.read(), name)))
    elif hasattr(source, "__array_interface__"):
        image = _from_array(source, name)
    else:
        raise ImageError(f"{name} is not a picture; give a path, bytes, a file, a Pillow image or a uint8 array.")
    if image.width == 0 or image.height == 0:
        raise ImageError(f"{name} is empty ({image.width}x{image.height} pixels).")
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise Image.DecompressionBombError
    return image


def _not_empty(data: bytes, name: str) -> bytes:
    if not data:
        raise ImageError(f"{name} is empty (0 bytes).")
    return data


def _from_array(array: Any, name: str) -> Image:
    import numpy as np
    from PIL import Image

    array = np.asarray(array)
    fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype != np.uint8 or not fits:
        raise ImageError(
            f"{name} has dtype {array.dtype} and shape {array.shape}; expected uint8 (h, w), (h, w, 3) or (h, w, 4)."
        )
    if array.size == 0:
        raise ImageError(f"{name} is empty (shape {array.shape}).")
    return Image.fromarray(array)


def _warn_if_clipped(image: Image, name: str) -> None:
    if image.mode.startswith(("I", "F")):
        highest = image.getextrema()[1]
        if isinstance(highest, int | float) and highest > 255:
            warnings.warn(
                f"{name} is greyscale with values up to {highest:g}; those above 255 are read as white. Save it "
                "with 8 bits a channel to keep its greys.",
                ImageWarning,
                stacklevel=3,
            )


def _to_rgb(image: Image) -> Image:
    from PIL import Image

    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
