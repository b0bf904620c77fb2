"""Computes Llama 3.2 Vision with transformers 4.45, the first version that had it, in a process of its own.

    python -m tests.peers.mllama_4_45 CHECKPOINT JOB.json FOUND.npz

Its tower takes intermediate states before the named layers, as published weights were trained. But like in later
versions, rows before the first image attend to all images; if a case says so, these rows pass cross-attention layers
unchanged. Nothing else is changed here. The job: `pictures`, files; `cases`, each with `name`, `ids`, the numbers of
its `pictures`, `n` tokens to generate, and whether `early_rows_pass`. The result: for each image `states NUMBER`, for
each case `answer NAME` and `logits NAME`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

VERSION = "4.45."
N_TILES = 4


class Original:
    def __init__(self, checkpoint: str) -> None:
        kind: Any = transformers.MllamaForConditionalGeneration
        self.model, info = kind.from_pretrained(
            checkpoint, torch_dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        assert not any(info.values()), info
        self.model.eval()
        self.processor: Any = transformers.MllamaImageProcessor.from_pretrained(checkpoint)
        self.image_token = self.model.config.image_token_index
        self.early_rows_pass = False
        for i in self.model.config.text_config.cross_attention_layers:
            layer = self.model.language_model.model.layers[i]
            layer.forward = self._passing(layer.forward)

    def _passing(self, forward: Any) -> Any:
        def call(hidden_states: torch.Tensor, **arguments: Any) -> Any:
            found = forward(hidden_states, **arguments)
            sees = arguments["full_text_row_masked_out_mask"]
            if sees is None or not self.early_rows_pass:
                return found
            return (torch.where(sees[:, 0].bool(), found[0], hidden_states), *found[1:])

        return call

    def states(self, picture: Image.Image) -> np.ndarray:
        inputs = dict(self.processor([[picture]], return_tensors="pt"))
        inputs.pop("num_tiles")
        found: np.ndarray = self.model.multi_modal_projector(self.model.vision_model(**inputs)[0])[0, 0].numpy()
        return found

    def logits(self, ids: list[int], pictures: list[Image.Image]) -> np.ndarray:
        """Returns the logits of the last row."""
        inputs: dict[str, Any] = {}
        if pictures:
            inputs = dict(self.processor([pictures], return_tensors="pt"))
            n_tiles = inputs.pop("num_tiles")
            places = [get_cross_attention_token_mask(ids, self.image_token)]
            mask = convert_sparse_cross_attention_mask_to_dense(places, n_tiles, N_TILES, len(ids))
            inputs["cross_attention_mask"] = torch.tensor(mask)
        found: np.ndarray = self.model(input_ids=torch.tensor([ids]), use_cache=False, **inputs).logits[0, -1].numpy()
        return found


def main(checkpoint: str, job: str, out: str) -> None:
    if not transformers.__version__.startswith(VERSION):
        raise SystemExit(f"transformers is {transformers.__version__}, expected {VERSION}x")
    todo = json.loads(Path(job).read_text(encoding="utf-8"))
    original = Original(checkpoint)
    pictures = [Image.open(path).convert("RGB") for path in todo["pictures"]]
    found: dict[str, Any] = {}
    with torch.inference_mode():
        for i, picture in enumerate(pictures):
            found[f"states {i}"] = original.states(picture)
        for case in todo["cases"]:
            original.early_rows_pass = case["early_rows_pass"]
            ids, rows = list(case["ids"]), []
            for _ in range(case["n"]):
                rows.append(original.logits(ids, [pictures[i] for i in case["pictures"]]))
                ids.append(int(rows[-1].argmax()))
            found[f"answer {case['name']}"] = np.array(ids[len(case["ids"]) :])
            found[f"logits {case['name']}"] = np.stack(rows)
    np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
