"""The reference for Mllama: transformers in float32, by its own rules or by those that published weights were trained
with.

By the original rules (Meta's `llama-models`, `models/llama3/multimodal/model.py`) intermediate states are taken before
the named layers of the tower, and rows before the first image pass cross-attention layers unchanged. Both are patched
into transformers' modules here; everything else is transformers' own.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)


class MllamaReference:
    """One checkpoint. Prompts are token ids with one image token for each image."""

    def __init__(self, directory: Path, rule: str) -> None:
        """`rule`: 'original' or 'transformers'."""
        config = AutoConfig.from_pretrained(directory)
        self.model, info = AutoModelForImageTextToText.from_pretrained(
            directory, config=config, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        assert not any(info.values()), info
        self.model.eval()
        self.processor = AutoImageProcessor.from_pretrained(directory, backend="pil")
        self.image_token = config.image_token_index
        if rule == "original":
            tower = self.model.model.vision_model.transformer
            tower.forward = types.MethodType(_states_before, tower)
            for i in config.text_config.cross_attention_layers:
                layer = self.model.model.language_model.layers[i]
                layer.forward = _leaving_rows_alone(layer.forward)

    def pixels(self, pictures: Sequence[Image]) -> dict[str, Any]:
        return dict(self.processor([list(pictures)], return_tensors="pt"))

    def states(self, picture: Image) -> np.ndarray:
        """Returns float32 (tiles, positions, text width), including absent tiles."""
        inputs = self.pixels([picture])
        inputs.pop("num_tiles")
        with torch.inference_mode():
            found = self.model.model.vision_model(**inputs).last_hidden_state
            states: np.ndarray = self.model.model.multi_modal_projector(found)[0, 0].numpy()
        return states

    def logits(self, ids: Sequence[int], pictures: Sequence[Image] = ()) -> np.ndarray:
        """Returns the logits of every position, float32 (n, n_vocab)."""
        inputs: dict[str, Any] = {}
        if pictures:
            inputs = self.pixels(pictures)
            n_tiles = inputs.pop("num_tiles")
            places = [get_cross_attention_token_mask(list(ids), self.image_token)]
            mask = convert_sparse_cross_attention_mask_to_dense(places, n_tiles, 4, len(ids))
            inputs["cross_attention_mask"] = torch.tensor(mask)
        with torch.inference_mode():
            out = self.model(input_ids=torch.tensor([list(ids)]), use_cache=False, **inputs)
        logits: np.ndarray = out.logits[0].numpy()
        return logits

    def greedy(self, ids: Sequence[int], pictures: Sequence[Image], n: int) -> tuple[list[int], np.ndarray]:
        """Returns the first `n` tokens of an answer, and the logits before each. Does not use transformers' cache,
        which does not support a cross-attention layer first."""
        answer: list[int] = []
        rows = []
        for _ in range(n):
            rows.append(self.logits([*ids, *answer], pictures)[-1])
            answer.append(int(rows[-1].argmax()))
        return answer, np.stack(rows)


def _states_before(tower: Any, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
    states = []
    for layer in tower.layers:
        states.append(hidden_states)
        hidden_states = layer(hidden_states=hidden_states, attention_mask=attention_mask)
    return BaseModelOutput(last_hidden_state=hidden_states, hidden_states=tuple(states))


def _leaving_rows_alone(forward: Any) -> Any:
    def call(hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        found = forward(hidden_states, **arguments)
        sees = arguments["full_text_row_masked_out_mask"]
        return found if sees is None else torch.where(sees[:, 0].bool(), found, hidden_states)

    return call
