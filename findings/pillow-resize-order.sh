#!/usr/bin/env bash
# Pillow: from version 13, the order of the two resize passes depends on the shape of the image
#
# Expected: Image.resize() with one filter, one input and one target size gives the same 8-bit pixels
#   in every release, horizontal pass first, rounded to 8 bits in between. Image processors of vision
#   models are built on that, and other runtimes imitate it to the bit.
# Observed (Pillow 12.3.0 and 13.0.0): 12.3.0 always goes horizontally first. 13.0.0 goes vertically
#   first when the height shrinks by more than twice as many pixels as the width does. For a noisy
#   image that changes a quarter of the pixels, by up to 9 levels. Other shapes come out as before,
#   so a test with one photo may not notice.
# Output (bicubic, noise):
#   Pillow 12.3.0: 850x1100 to 384x384 horizontal first; 400x1200 to 384x384 horizontal first
#   Pillow 13.0.0: 850x1100 to 384x384 horizontal first; 400x1200 to 384x384 vertical first
# Why it matters: receipts and narrow columns are exactly that shape. Image embeddings, cached or
#   compared with a reference, shift with the Pillow that happens to be installed; so do parity tests
#   against another implementation of the same resize.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/order.py" <<'PYTHON'
import sys

import numpy as np
import PIL
from PIL import Image

noise = np.random.default_rng(7)
side = 384
found = []
for width, height in ((850, 1100), (400, 1200)):
    image = Image.fromarray(noise.integers(0, 256, (height, width), dtype=np.uint8))
    resized, horizontal, vertical = (
        np.asarray(result)
        for result in (
            image.resize((side, side), Image.BICUBIC),
            image.resize((side, height), Image.BICUBIC).resize((side, side), Image.BICUBIC),
            image.resize((width, side), Image.BICUBIC).resize((side, side), Image.BICUBIC),
        )
    )
    assert (horizontal != vertical).mean() > 0.1
    order = {(True, False): "horizontal first", (False, True): "vertical first"}[
        (resized == horizontal).all(), (resized == vertical).all()
    ]
    found.append(f"{width}x{height} to {side}x{side} {order}")
print(f"Pillow {PIL.__version__}: " + "; ".join(found))
assert [entry.split(" ", 3)[3] for entry in found] == ["horizontal first", sys.argv[1]], found
PYTHON
for release in '12.3.0 horizontal' '13.0.0 vertical'; do
    read -r version order <<<"$release"
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install --quiet --disable-pip-version-check "pillow==$version" 'numpy==2.4.6'
    "$work/$version/bin/python" "$work/order.py" "$order first"
done
