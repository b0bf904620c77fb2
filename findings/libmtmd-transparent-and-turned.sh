#!/usr/bin/env bash
# libmtmd: a transparent PNG loses its alpha channel, and a phone's photo stays on its side
#
# Expected: the image loader of a vision runtime shows the model what an image viewer shows a person:
#   transparent pixels on a light background, and the EXIF orientation applied, or
#   refuses or reports what it leaves out.
# Observed (libmtmd as shipped by llama-cpp-python 0.3.36): mtmd_helper_bitmap_init_from_buf() asks
#   its decoder for three channels. Alpha is cut off and the colour stored under transparent pixels
#   shows, which is often black; palette transparency is dropped likewise. EXIF
#   orientation is ignored, so width and height come out swapped. No log line for either.
# Output:
#   llama-cpp-python 0.3.36
#   black ink on a transparent page: ink [0, 0, 0], page [0, 0, 0]
#   palette PNG, entry 1 transparent: [255, 0, 0], [0, 0, 0]
#   JPEG 16x8, orientation 6 (portrait): loaded as 16x8
# Why it matters: signatures, logos, exported charts and scanned stamps are often black on
#   transparent: the model sees a black square and describes it. Pages photographed by phone arrive
#   turned by 90 degrees, with a grid of tiles for the wrong shape. Flatten and turn images before
#   handing them over.
#
# llama-cpp-python is built from source when no wheel is at hand: several minutes and a C++ compiler.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    'llama-cpp-python==0.3.36' 'pillow==13.0.0' 'numpy==2.4.6'
"$work/venv/bin/python" - <<'PYTHON'
import ctypes
import io
from importlib.metadata import version

import numpy as np
from llama_cpp import mtmd_cpp
from PIL import Image, ImageOps


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def loaded(data):
    """Pixels (height, width, 3) that libmtmd reads from a file's bytes."""
    buffer = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
    bitmap = mtmd_cpp.mtmd_helper_bitmap_init_from_buf(None, buffer, len(data), False)
    assert bitmap
    width, height = mtmd_cpp.mtmd_bitmap_get_nx(bitmap), mtmd_cpp.mtmd_bitmap_get_ny(bitmap)
    memory = ctypes.cast(mtmd_cpp.mtmd_bitmap_get_data(bitmap), ctypes.POINTER(ctypes.c_uint8))
    pixels = np.ctypeslib.as_array(memory, (height, width, 3)).copy()
    mtmd_cpp.mtmd_bitmap_free(bitmap)
    return pixels


print("llama-cpp-python", version("llama-cpp-python"))
page = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
page.putpixel((0, 0), (0, 0, 0, 255))
ink, paper = loaded(encoded(page, "PNG"))[0].tolist()
print(f"black ink on a transparent page: ink {ink}, page {paper}")
assert ink == paper == [0, 0, 0]
flat = Image.alpha_composite(Image.new("RGBA", page.size, "white"), page).convert("RGB")
assert loaded(encoded(flat, "PNG"))[0].tolist() == [[0, 0, 0], [255, 255, 255]]

palette = Image.new("P", (2, 1))
palette.putpalette([255, 0, 0, 0, 0, 0])
palette.putpixel((1, 0), 1)
first, second = loaded(encoded(palette, "PNG", transparency=1))[0].tolist()
print(f"palette PNG, entry 1 transparent: {first}, {second}")
assert (first, second) == ([255, 0, 0], [0, 0, 0])

exif = Image.Exif()
exif[0x0112] = 6  # Orientation: turn by 90 degrees
photo = encoded(Image.new("RGB", (16, 8), "white"), "JPEG", exif=exif)
assert ImageOps.exif_transpose(Image.open(io.BytesIO(photo))).size == (8, 16)
height, width, _ = loaded(photo).shape
print(f"JPEG 16x8, orientation 6 (portrait): loaded as {width}x{height}")
assert (width, height) == (16, 8)
PYTHON
