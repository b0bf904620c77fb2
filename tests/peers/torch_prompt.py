"""Reads one prompt with PyTorch: its images, or the frames of a video, and the text, by transformers.

    python -m tests.peers.torch_prompt CHECKPOINT IMAGE... --dtype bfloat16 --threads 2 [--video]

The peer in figures about prefill. A small image is processed first, so that PyTorch's one-time work is not counted, and
the tiles are cut before the clock starts. Only the last row gets logits. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.peers.mtmd import peak_rss_gb
from tests.peers.onevision import OnevisionReference
from tests.peers.reference import Reference, user_turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("image", type=Path, nargs="+")
    parser.add_argument("--video", action="store_true", help="the images are the frames of one video")
    parser.add_argument("--prompt", default="What does this page say?")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--save", type=Path, help="write the logits after the prompt (n_vocab,) here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kind = json.loads((options.checkpoint / "config.json").read_text())["model_type"]
    peer = OnevisionReference if kind == "llava_onevision" else Reference
    reference = peer(options.checkpoint, dtype=getattr(torch, options.dtype), attention="sdpa")
    forward(reference, inputs_of(reference, options.prompt, [Image.new("RGB", (64, 64))], is_video=False))
    pictures = [Image.open(path).convert("RGB") for path in options.image]
    inputs = inputs_of(reference, options.prompt, pictures, is_video=options.video)
    encode_s, prefill_s, logits = forward(reference, inputs)
    if options.save:
        np.save(options.save, logits)
    placeholders = [reference.model.config.image_token_index, getattr(reference.model.config, "video_token_index", -1)]
    ids = inputs["input_ids"]
    result = {
        "encode_s": round(encode_s, 4),
        "prefill_s": round(prefill_s, 4),
        "prompt_tokens": ids.shape[1],
        "image_tokens": int(torch.isin(ids, torch.tensor(placeholders)).sum()),
        "peak_rss_gb": round(peak_rss_gb(), 4),
    }
    print(json.dumps(result))


def inputs_of(reference: Reference, prompt: str, pictures: list[Image.Image], *, is_video: bool) -> dict[str, Any]:
    """Returns the model's inputs for a prompt with the images."""
    if not isinstance(reference, OnevisionReference):
        pixels, sizes = reference.pixels(pictures[0])
        ids = torch.tensor([reference.prompt_ids(prompt, pictures)])
        return {"input_ids": ids, "pixel_values": pixels, "image_sizes": sizes}
    turn = user_turn(prompt, 0 if is_video else len(pictures))
    if is_video:
        turn["content"] = [{"type": "video"}, *turn["content"]]
        ids = reference.ids([turn], videos=[pictures])
        return {"input_ids": torch.tensor([ids]), "pixel_values_videos": reference.frames_of(pictures)}
    return {"input_ids": torch.tensor([reference.ids([turn], pictures)]), **reference.pixels_of(pictures)}


def forward(reference: Reference, inputs: dict[str, Any]) -> tuple[float, float, np.ndarray]:
    """Returns the seconds until the decoder begins, the seconds of the decoder, and its logits."""
    began: list[float] = []
    hook = reference.model.model.language_model.register_forward_pre_hook(lambda *_: began.append(time.perf_counter()))
    with torch.inference_mode():
        start = time.perf_counter()
        logits = reference.model(**inputs, use_cache=True, logits_to_keep=1).logits[0, -1]
        end = time.perf_counter()
    hook.remove()
    return began[0] - start, end - began[0], logits.float().numpy() / reference.logits_divisor


if __name__ == "__main__":
    main()
