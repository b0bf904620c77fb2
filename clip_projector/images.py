"""Opens images from any source (path, bytes, file, Pillow image, array) as upright RGB images.

Independent of tiles and models. The page reader process imports this module and rarely needs NumPy, so NumPy is
imported inside functions.
"""

from __future__ import annotations

import hashlib
import io
import struct
import threading
import warnings
from pathlib import Path
from typing import Any, TypeAlias

import PIL
import PIL.Image
from PIL.Image import Transpose

from granite4v.clip_projector.files import MAX_FILE_BYTES, is_pdf, is_video, read_whole, shown, url_in, what_it_holds
from granite4v.errors import ArgumentError, ImageError, ImageWarning

Buffer: TypeAlias = "bytes | bytearray | memoryview"

MODE = "RGB"
ORIENTATION = 0x0112  # EXIF and TIFF tag
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SUBFILE_TYPE = 258, 262, 254  # TIFF tags
_WHITE_IS_ZERO = 0
_ANIMATED = ("GIF", "PNG", "WEBP")  # in other formats, frames are pages, or sizes of one image
_SHORT = 3  # EXIF type of two bytes
NOT_A_PAGE = 0b101  # bits of a TIFF frame's subfile type: a smaller copy of another page, or a mask
# Pillow needs 32 bytes per pixel of a side that it scales: gigabytes for a line of 80 million pixels, which its own
# limit allows.
MAX_SIDE_PX = 1_000_000
# the end of a message, for those who can follow it
BOMB_ADVICE = ", or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it."
_MOST_PAGES = 1000  # largest count of pages in a TIFF of which only the first is read


class Image:
    """An opened image: upright RGB pixels, and the digest that identifies them in every cache and record.

    Created once and passed along, so that a page is opened and hashed once for any number of questions. Immutable and
    thread-safe.
    """

    __slots__ = ("_digest", "_lock", "_pillow")

    def __init__(self, pillow: PIL.Image.Image, digest: bytes | None = None) -> None:
        """`pillow`: RGB, must not be modified afterwards; raises ArgumentError for another mode. `digest`: if already
        known."""
        if pillow.mode != MODE:
            raise ArgumentError(f"the image has mode {pillow.mode}; expected {MODE}, as load_image gives it.")
        self._pillow, self._digest = pillow, digest
        self._lock = threading.Lock()

    @classmethod
    def from_pixels(cls, size: tuple[int, int], pixels: Buffer) -> Image:
        """Creates an image from RGB pixels, 3 bytes each, row by row. `size`: (width, height).

        The pixels are hashed here, since hashing the Pillow image later would need a copy of them.
        """
        return cls(PIL.Image.frombytes(MODE, size, pixels), _hash(size, pixels))

    @property
    def pillow(self) -> PIL.Image.Image:
        """The RGB Pillow image; must not be modified."""
        return self._pillow

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels"""
        return self._pillow.size

    @property
    def digest(self) -> bytes:
        """SHA-256 of the size and the pixels: equal for equal pixels from any file. Computed once."""
        with self._lock:
            if self._digest is None:
                self._digest = _hash(self.size, self._pillow.tobytes())
            return self._digest

    @property
    def __array_interface__(self) -> Any:
        """Lets `np.asarray` read the pixels as uint8 `(height, width, 3)`."""
        return self._pillow.__array_interface__

    def __repr__(self) -> str:
        return f"Image({self.size[0]}x{self.size[1]})"

    def __reduce__(self) -> Any:
        """Supports copy and pickle, without the lock."""
        return Image, (self._pillow, self._digest)


ImageSource: TypeAlias = "Image | str | Path | bytes | PIL.Image.Image | Any"


def _hash(size: tuple[int, int], pixels: Buffer) -> bytes:
    digest = hashlib.sha256(repr((size, MODE)).encode())
    digest.update(pixels)
    return digest.digest()


def load_image(source: ImageSource, name: str | None = None, *, as_reference: bool = False) -> Image:
    """Opens an image with `open_rgb`; returns an Image unchanged.

    Raises and warns as `open_rgb` does.
    """
    return source if isinstance(source, Image) else Image(open_rgb(source, name, as_reference=as_reference))


def open_rgb(source: ImageSource, name: str | None = None, *, as_reference: bool = False) -> PIL.Image.Image:
    """Opens an image as a new 8-bit RGB Pillow image, upright by its EXIF orientation, with transparency on white.

    `source`: a path, encoded bytes, a binary file object, a Pillow image, or a uint8 array `(h, w)`,
    `(h, w, 3)` or `(h, w, 4)`. The first frame of a file with several frames is used. Colours are converted as in
    Hugging Face's image processors, so that tiles come out equal. `name`: what messages call the image;
    by default its path in quotes.

    Greyscale with more than 8 bits is scaled to 8. 16-bit values are scaled from 0..65535 (0..4095 for a 12-bit TIFF),
    or kept if none exceeds 255. 32-bit integers and floats are scaled from the narrowest of 0..1, 0..255 and 0..65535
    that contains all values, or else from their minimum to their maximum. `as_reference` clips values above 255 to
    white instead, as Pillow and transformers do, for comparison with them.

    Warns (ImageWarning) about a TIFF with more than one page, an animation, a guessed range, and clipped values.

    Raises ImageError for an image that is missing, empty, not an image, cut short or larger than MAX_FILE_BYTES, or has
    so many pixels that it is probably a decompression bomb (limits: `PIL.Image.MAX_IMAGE_PIXELS`, and MAX_SIDE_PX for a
    side).
    """
    name = name or _describe(source)
    head = b""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            if not isinstance(source, PIL.Image.Image):
                source = _content(source, name)
                head = source[:1024] if isinstance(source, bytes) else b""
            image = _open(source, name)
            image.load()
        if isinstance(source, bytes) and image.format == "TIFF":
            _warn_of_more_pages(source, name)
        if isinstance(source, bytes) and image.format in _ANIMATED and _is_animated(source):
            warnings.warn(f"{name} is animated; only its first frame is read.", ImageWarning, stacklevel=3)
        return _to_rgb(_upright(image), image, name, as_reference=as_reference)
    except ImageError:
        raise
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning):
        raise ImageError(
            f"{name} has more than {PIL.Image.MAX_IMAGE_PIXELS:,} pixels, which may be a decompression bomb; scale it "
            f"down{BOMB_ADVICE}"
        ) from None
    except PIL.UnidentifiedImageError:
        raise ImageError(_why_unknown(head, name)) from None
    except MemoryError:
        raise ImageError(f"{name} needs more memory than is available; scale it down.") from None
    except FileNotFoundError as error:
        raise ImageError(_why_missing(source, name, error)) from None
    except OSError as error:
        raise ImageError(f"{name} cannot be read as an image: {error.strerror or error}.") from None
    except Exception as error:  # decoders raise anything on damaged files: struct.error, KeyError, zlib.error
        what = str(error) or type(error).__name__
        raise ImageError(f"{name} is damaged: {what}.") from None


def _describe(source: ImageSource) -> str:
    if isinstance(source, str | Path):
        return f"'{shown(str(source))}'"
    if isinstance(source, bytes):
        return f"the image ({len(source):,} bytes)"
    return f"the image ({type(source).__name__})"


def _why_unknown(head: bytes, name: str) -> str:
    if is_pdf(head):
        return f"{name} is a PDF, not an image; 'granite4v extract' reads PDFs, page by page."
    if is_video(head):
        return f"{name} is a video, not an image; 'granite4v ask --video' takes videos."
    held = what_it_holds(head)
    if held is None:
        return f"{name} is not an image that Pillow can read; give a PNG, JPEG, WebP, TIFF or BMP."
    return f"{name} holds {held}, which Pillow cannot read here; give a PNG, JPEG, WebP, TIFF or BMP."


def _why_missing(source: ImageSource, name: str, error: OSError) -> str:
    url = url_in(str(source))
    if url is not None:
        return f"'{shown(url)}' is a URL, which is not supported; download the file and give its path."
    return f"{name} cannot be read as an image: {error.strerror}."


def _content(source: ImageSource, name: str) -> bytes | Any:
    """Reads the bytes of a path or file; returns other sources, such as arrays, unchanged."""
    if isinstance(source, str | Path):
        source = read_whole(Path(source))
    elif hasattr(source, "read"):
        source = source.read(MAX_FILE_BYTES + 1)
        if len(source) > MAX_FILE_BYTES:
            raise ImageError(f"{name} has more than {MAX_FILE_BYTES:,} bytes; save it again as PNG or JPEG.")
    if isinstance(source, bytes) and not source:
        raise ImageError(f"{name} is empty (0 bytes).")
    return source


def _open(source: ImageSource, name: str) -> PIL.Image.Image:
    if isinstance(source, PIL.Image.Image):
        image = source
    elif isinstance(source, bytes):
        image = PIL.Image.open(io.BytesIO(source))
    elif hasattr(source, "__array_interface__"):
        image = _from_array(source, name)
    else:
        raise ImageError(f"{name} is not an image; give a path, bytes, a file, a Pillow image or a uint8 array.")
    if image.width == 0 or image.height == 0:
        raise ImageError(f"{name} is empty ({image.width}x{image.height} pixels).")
    limit = PIL.Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise PIL.Image.DecompressionBombError
    if max(image.size) > MAX_SIDE_PX:
        raise ImageError(
            f"{name} has {image.width:,}x{image.height:,} pixels, and a side may have {MAX_SIDE_PX:,}; scale it down, "
            "or cut it into pages."
        )
    return image


def _from_array(array: Any, name: str) -> PIL.Image.Image:
    import numpy as np

    array = np.asarray(array)
    fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype != np.uint8 or not fits:
        raise ImageError(
            f"{name} has dtype {array.dtype} and shape {array.shape}; expected uint8 (h, w), (h, w, 3) or (h, w, 4)."
        )
    if array.size == 0:
        raise ImageError(f"{name} is empty (shape {array.shape}).")
    return PIL.Image.fromarray(array)


def _upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """Turns an image upright, as `PIL.ImageOps.exif_transpose` does; but that also rewrites all other EXIF values, and
    fails on unusual ones."""
    turns: dict[float, Transpose] = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # Pillow parses the entire block, and raises on damage anywhere in it
        orientation = None
    if orientation is None:
        orientation = _orientation_in(image.info.get("exif", b""))
    turn = turns.get(orientation) if isinstance(orientation, int | float) else None
    return image if turn is None else image.transpose(turn)


def _orientation_in(exif: bytes) -> int:
    """Reads the orientation from an EXIF block that may be damaged elsewhere; 1 (upright) if there is none."""
    tiff = exif[6:] if exif.startswith(b"Exif\0\0") else exif
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 8:
        return 1
    start = struct.unpack_from(order + "I", tiff, 4)[0] + 2  # first entry, after the 2-byte number of entries
    for entry in range(start, len(tiff) - 9, 12):
        tag, kind, count, value = struct.unpack_from(order + "HHIH", tiff, entry)
        if tag >= ORIENTATION:  # tags ascend
            return value if (tag, kind, count) == (ORIENTATION, _SHORT, 1) else 1
    return 1


def _warn_of_more_pages(data: bytes, name: str) -> None:
    """Warns about a TIFF with more than one page."""
    n_pages = count_tiff_pages(data, _MOST_PAGES + 1)
    if n_pages > 1:
        found = f"{n_pages:,} pages" if n_pages <= _MOST_PAGES else f"more than {_MOST_PAGES:,} pages"
        warnings.warn(
            f"{name} has {found}, of which only the first is read; 'granite4v extract' reads them all.",
            ImageWarning,
            stacklevel=4,
        )


def _is_animated(data: bytes) -> bool:
    try:
        with warnings.catch_warnings(), PIL.Image.open(io.BytesIO(data)) as image:
            warnings.simplefilter("ignore")
            return bool(getattr(image, "is_animated", False))
    except Exception:  # damage after the first frame, which is all that is read
        return False


def count_tiff_pages(data: bytes, enough: int) -> int:
    """Counts the frames of a TIFF that are pages, up to `enough`."""
    n_pages = 0
    with warnings.catch_warnings(), PIL.Image.open(io.BytesIO(data)) as image:
        warnings.simplefilter("ignore")
        try:
            for i in range(2 * enough):
                image.seek(i)
                kind = image.tag_v2.get(_SUBFILE_TYPE, 0)
                n_pages += not (isinstance(kind, int) and kind & NOT_A_PAGE)
                if n_pages == enough:
                    break
        except Exception:  # the end, or damage, which is reported when these pages are read
            pass
    return n_pages


def _to_rgb(image: PIL.Image.Image, opened: PIL.Image.Image, name: str, *, as_reference: bool) -> PIL.Image.Image:
    """Converts an image to 8-bit RGB. `opened`: the image before it was turned, which still has its file's tags."""
    if image.mode.startswith(("I", "F")):
        if not as_reference:
            return _scaled(image, opened, name).convert("RGB")
        _warn_if_clipped(image, name)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, (255, 255, 255, 255))
        return PIL.Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _scaled(image: PIL.Image.Image, opened: PIL.Image.Image, name: str) -> PIL.Image.Image:
    """Scales greyscale with more than 8 bits to 8 bits; see `open_rgb` for the ranges."""
    import numpy as np

    values = np.nan_to_num(np.asarray(image), posinf=0, neginf=0)
    lowest, highest = float(values.min()), float(values.max())
    tags = getattr(opened, "tag_v2", {})
    if (image.mode.startswith("I;16") or opened.format == "PNG") and lowest >= 0:
        bits = tags.get(_BITS_PER_SAMPLE, (16,))
        low, high = 0.0, 255.0 if highest <= 255 else 4095.0 if bits == (12,) and highest <= 4095 else 65535.0
    else:
        high = next((limit for limit in (1.0, 255.0, 65535.0) if lowest >= 0 and highest <= limit), highest)
        low = 0.0 if lowest >= 0 and highest <= 65535 else lowest
        warnings.warn(
            f"{name} is greyscale of {'floats' if image.mode == 'F' else 'large integers'} from {lowest:g} to "
            f"{highest:g}, which are read as if {low:g} were black and {high:g} white; if that is wrong, save it with "
            "8 bits per channel.",
            ImageWarning,
            stacklevel=5,
        )
    scaled = values.astype(np.float32)  # in place from here on: it may be large
    scaled -= low
    scaled *= 255 / ((high - low) or 1)
    grey = np.clip(np.rint(scaled, out=scaled), 0, 255, out=scaled).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow itself inverts only up to 8 bits
        grey = 255 - grey
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey[values == clear] = 255
    return PIL.Image.fromarray(grey)


def _warn_if_clipped(image: PIL.Image.Image, name: str) -> None:
    highest = image.getextrema()[1]
    if isinstance(highest, int | float) and highest > 255:
        warnings.warn(
            f"{name} is greyscale with values up to {highest:g}; those above 255 are read as white, as the reference "
            "does.",
            ImageWarning,
            stacklevel=5,
        )
