"""The tensors of LLaVA-NeXT's vision file: tower, two linear layers, newline.

Names: transformers 5.23 `models/llava_next`, and the mmproj names of llama.cpp's `tools/mtmd/clip-impl.h`.
"""

from __future__ import annotations

import dataclasses

from granite4v import gguf_keys as keys
from granite4v.converter.tensors.rules import TensorGroup, TensorRule, linear, zeros
from granite4v.converter.tensors.vit import tower_tensors
from granite4v.families.base import VisionConfig
from granite4v.families.hf_fields import Fields, Json
from granite4v.families.llava_next import taken_states
from granite4v.families.towers import tower_from_hf, tower_kind

PREFIXES = ("model.", "")


def llava_next_tensors(config: VisionConfig, hf_config: Json, block: int) -> tuple[TensorGroup, ...]:
    """All tensors of the mmproj file, for a checkpoint with this config.json."""
    vision = Fields(hf_config).section("vision_config")
    n_held = tower_from_hf(vision, tower_kind(vision)).num_hidden_layers
    newline = TensorRule("image_newline", keys.IMAGE_NEWLINE, (config.text_hidden_size,))
    return (
        tower_tensors(config.tower, block, n_held, post_norm=False),
        TensorGroup(prefixes=PREFIXES, rules=(newline, *_projector(config, hf_config, n_held))),
    )


def _projector(config: VisionConfig, hf_config: Json, n_held: int) -> tuple[TensorRule, ...]:
    out, states = config.text_hidden_size, taken_states(Fields(hf_config), n_held)
    first, second = (keys.MLP.replace("{layer}", str(layer)) for layer in (keys.MLP_FIRST, keys.MLP_SECOND))
    weight, bias = linear("multi_modal_projector.linear_1", first, out, config.tower.hidden_size * len(states))
    # the checkpoint concatenates the hidden states in the order of its configuration, the file in ascending order
    ascending = tuple(sorted(range(len(states)), key=states.__getitem__))
    if ascending != tuple(range(len(states))):
        weight = dataclasses.replace(weight, column_blocks=ascending)
    rules = (weight, bias, *linear("multi_modal_projector.linear_2", second, out, out))
    if Fields(hf_config).flag("multimodal_projector_bias", True):
        return rules
    return tuple(zeros(rule) if rule.source.endswith(".bias") else rule for rule in rules)  # libmtmd needs biases
