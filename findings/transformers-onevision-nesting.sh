#!/usr/bin/env bash
# transformers, LLaVA-OneVision: one pair of brackets around the images decides how finely they are read
#
# Expected: the image processor treats an image the same whether images come as a flat list or
#   grouped by conversation; grouping only says which prompt an image belongs to. LLaVA-NeXT's
#   processor, from which this one descends, does so.
# Observed (transformers 5.24.0): [[a, b]] (two images in one conversation, as apply_chat_template
#   passes them) gives one 384-pixel square for each image. [a, b] gives the full tiling for each.
#   [[a]] tiles as well, so that the second image of a conversation changes what the first one becomes.
# Output (a 640x480 and a 300x900 image; tiles for each, overview included):
#   transformers 5.24.0
#   LLaVA-OneVision: [[a]] 5; [a, b] 5, 4; [[a, b]] 1, 1; [[a], [b]] 5, 4
#   LLaVA-NeXT:      [[a]] 5; [a, b] 5, 4; [[a, b]] 5, 4; [[a], [b]] 5, 4
# Why it matters: a two-page document asked about in one prompt is read at a fraction of the
#   resolution of its single pages, and text that was legible is not. A cache of image features keyed
#   by the image alone returns the wrong ones as soon as a conversation gains an image.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    'transformers==5.24.0' 'pillow==13.0.0' 'numpy==2.4.6'
TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

from PIL import Image
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

a, b = Image.new("RGB", (640, 480), "white"), Image.new("RGB", (300, 900), "white")
layouts = {"[[a]]": [[a]], "[a, b]": [a, b], "[[a, b]]": [[a, b]], "[[a], [b]]": [[a], [b]]}
pinpoints = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
square = {"height": 384, "width": 384}
processors = {
    "LLaVA-OneVision": LlavaOnevisionImageProcessorPil(size=square, image_grid_pinpoints=pinpoints),
    "LLaVA-NeXT": LlavaNextImageProcessorPil(
        size={"shortest_edge": 384}, crop_size=square, image_grid_pinpoints=pinpoints
    ),
}
print("transformers", version("transformers"))
for name, processor in processors.items():
    counts = {}
    for label, images in layouts.items():
        pixels = processor(images, return_tensors="np")["pixel_values"]
        assert pixels.shape[2:] == (3, 384, 384)
        # Images with fewer tiles are padded with zeros; a tile of a white image has none.
        counts[label] = [sum(bool(tile.any()) for tile in image) for image in pixels]
    print(f"{name + ':':<16} " + "; ".join(f"{label} {', '.join(map(str, n))}" for label, n in counts.items()))
    together = [1, 1] if name == "LLaVA-OneVision" else [5, 4]
    assert counts == {"[[a]]": [5], "[a, b]": [5, 4], "[[a, b]]": together, "[[a], [b]]": [5, 4]}, counts
PYTHON
