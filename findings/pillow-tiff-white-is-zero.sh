#!/usr/bin/env bash
# Pillow: a WhiteIsZero TIFF is inverted when read at 1, 4 or 8 bits, and not at 16 or 32
#
# Expected: PhotometricInterpretation 0 (WhiteIsZero) means that 0 is white at every bit depth. A
#   reader either inverts all depths, or none and says so.
# Observed (Pillow 13.0.0): 1, 4 and 8 bits are inverted on reading, so that white is the highest
#   value in the array. 16-bit integers and 32-bit floats are returned as stored, in the same modes
#   ("I;16", "F") as a BlackIsZero file. The tag remains readable, but nothing else tells the two
#   apart. (Whoever inverts all WhiteIsZero files by the tag turns the 8-bit ones into negatives.)
# Output (pixels stored as 0, half, full):
#   Pillow 13.0.0
#    1 bit:  BlackIsZero [0, 255, 255], WhiteIsZero [255, 0, 0]
#    4 bits: BlackIsZero [0, 119, 255], WhiteIsZero [255, 136, 0]
#    8 bits: BlackIsZero [0, 127, 255], WhiteIsZero [255, 128, 0]
#   16 bits: BlackIsZero [0, 32767, 65535], WhiteIsZero [0, 32767, 65535]
#   32 bits: BlackIsZero [0.0, 0.5, 1.0], WhiteIsZero [0.0, 0.5, 1.0]
# Why it matters: microfilm and book scanners write 16-bit WhiteIsZero grey. Such a page reaches the
#   model as a negative, while the same scanner's 8-bit pages are right.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'pillow==13.0.0' 'numpy==2.4.6'
"$work/venv/bin/python" - <<'PYTHON'
import io
import struct

import numpy as np
import PIL
from PIL import Image

SHORT, LONG = 3, 4
IS_FLOAT = (339, SHORT, 3)  # SampleFormat


def tiff(photometric, bits, data, *extra):
    """A baseline little-endian TIFF of one row and three grey pixels."""
    tags = [(256, LONG, 3), (257, LONG, 1), (258, SHORT, bits), (259, SHORT, 1), (262, SHORT, photometric)]
    tags += [(273, LONG, None), (277, SHORT, 1), (278, LONG, 1), (279, LONG, len(data)), *extra]
    start = 8 + 2 + 12 * len(tags) + 4  # of the pixels: header, tag count, tags, "no next page"
    entries = b"".join(
        struct.pack("<HHIHxx" if kind == SHORT else "<HHII", tag, kind, 1, start if value is None else value)
        for tag, kind, value in sorted(tags, key=lambda entry: entry[0])
    )
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + data


print("Pillow", PIL.__version__)
for bits, data, extra, black_is_zero, white_is_zero in (
    (1, b"\x60", (), [0, 255, 255], [255, 0, 0]),
    (4, b"\x07\xf0", (), [0, 119, 255], [255, 136, 0]),
    (8, bytes([0, 127, 255]), (), [0, 127, 255], [255, 128, 0]),
    (16, struct.pack("<3H", 0, 32767, 65535), (), [0, 32767, 65535], [0, 32767, 65535]),
    (32, struct.pack("<3f", 0, 0.5, 1), (IS_FLOAT,), [0.0, 0.5, 1.0], [0.0, 0.5, 1.0]),
):
    images = [Image.open(io.BytesIO(tiff(photometric, bits, data, *extra))) for photometric in (1, 0)]
    assert images[0].mode == images[1].mode and [image.tag_v2[262] for image in images] == [1, 0]
    read = [np.asarray(image.convert("L") if image.mode == "1" else image)[0].tolist() for image in images]
    print(f"{bits:2} bit{'s:' if bits > 1 else ': '} BlackIsZero {read[0]}, WhiteIsZero {read[1]}")
    assert read == [black_is_zero, white_is_zero], read
PYTHON
