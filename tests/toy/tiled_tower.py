"""Towers over all tiles with random weights and every gate open: transformers' module, and a file that we can read.

The file has only the tower and its projector, in the layout of a vision file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

from granite4v import gguf_keys as keys
from granite4v.families.base import CanvasConfig, TiledTowerConfig
from granite4v.ggml.quantize import quantize_rows

if TYPE_CHECKING:
    import torch

RATIOS = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LAYER = {  # the reference's name: ours
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_out",
    "input_layernorm": "ln1",
    "post_attention_layernorm": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
OTHERS = {
    "patch_embedding.weight": keys.PATCH_EMBD_WEIGHT,
    "class_embedding": keys.CLASS_EMBD,
    "gated_positional_embedding.embedding": keys.POSITION_EMBD,
    "gated_positional_embedding.tile_embedding.weight": keys.TILE_POSITION_EMBD,
    "gated_positional_embedding.gate": keys.TILE_GATE.format(name=keys.TILE_POSITION_EMBD),
    "pre_tile_positional_embedding.embedding.weight": keys.PRE_TILE_EMBD,
    "pre_tile_positional_embedding.gate": keys.TILE_GATE.format(name=keys.PRE_TILE_EMBD),
    "post_tile_positional_embedding.embedding.weight": keys.POST_TILE_EMBD,
    "post_tile_positional_embedding.gate": keys.TILE_GATE.format(name=keys.POST_TILE_EMBD),
    **{f"layernorm_{which}.{part}": f"v.{which}_ln.{part}" for which in ("pre", "post") for part in ("weight", "bias")},
}


@dataclass(frozen=True)
class TowerSpec:
    """Sizes of a tower; the projector's output is as wide as `text_hidden`. `taken`: the layers AFTER which hidden
    states are taken, as transformers 5.24 counts them."""

    hidden: int = 32
    ffn: int = 64
    layers: int = 4
    global_layers: int = 2
    heads: int = 4
    image_px: int = 56
    patch_px: int = 14
    taken: tuple[int, ...] = (0, 1, 3)
    text_hidden: int = 48

    def config(self) -> TiledTowerConfig:
        return TiledTowerConfig(
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_global_layers=self.global_layers,
            num_attention_heads=self.heads,
            image_size=self.image_px,
            patch_size=self.patch_px,
            hidden_act="gelu",
            layer_norm_eps=1e-5,
            max_num_tiles=4,
            supported_aspect_ratios=RATIOS,
            intermediate_states=tuple(i + 1 for i in self.taken),
        )

    def canvas(self) -> CanvasConfig:
        return CanvasConfig(self.image_px, RATIOS, IMAGENET_MEAN, IMAGENET_STD)


def reference_tower(spec: TowerSpec, dtype: Any = None) -> tuple[Any, torch.nn.Linear]:
    """Returns transformers' tower and a projector with random weights."""
    import torch
    from transformers.models.mllama.configuration_mllama import MllamaVisionConfig
    from transformers.models.mllama.modeling_mllama import MllamaVisionModel

    config = MllamaVisionConfig(
        hidden_size=spec.hidden,
        num_hidden_layers=spec.layers,
        num_global_layers=spec.global_layers,
        attention_heads=spec.heads,
        intermediate_size=spec.ffn,
        vision_output_dim=spec.hidden * (1 + len(spec.taken)),
        image_size=spec.image_px,
        patch_size=spec.patch_px,
        intermediate_layers_indices=list(spec.taken),
    )
    config._attn_implementation = "sdpa"
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        tower = MllamaVisionModel(config).eval()
        projector = torch.nn.Linear(config.vision_output_dim, spec.text_hidden)
        for module in (tower, projector):
            for name, parameter in module.named_parameters():
                random = torch.randn(parameter.shape, generator=generator)
                if "gate" in name.split(".")[-1]:
                    parameter.copy_(0.8 + 0.3 * random)
                elif "norm" in name and name.endswith("weight"):
                    parameter.copy_(1 + 0.3 * random)
                elif name.endswith("bias"):
                    parameter.copy_(0.3 * random)
                elif "embedding" in name and "patch" not in name:
                    parameter.copy_(0.7 * random)
                else:
                    parameter.copy_(1.2 * random / parameter[0].numel() ** 0.5)
    return tower.to(dtype or torch.float32), projector.to(dtype or torch.float32)


def our_name(name: str) -> str:
    """Returns our tensor name for one of the reference tower's."""
    if name in OTHERS:
        return OTHERS[name]
    room, _, number, rest = name.split(".", 3)
    block = keys.BLOCK if room == "transformer" else keys.GLOBAL_BLOCK
    if rest in ("gate_attn", "gate_ffn"):
        return block.format(i=number, part=keys.GATES[("gate_attn", "gate_ffn").index(rest)])
    module, _, kind = rest.rpartition(".")
    return f"{block.format(i=number, part=LAYER[module])}.{kind}"


def write_tower(path: Path, tower: Any, projector: torch.nn.Linear, kind: str = "F32") -> Path:
    """Writes a file with tower and projector, its matrices quantized as `kind`."""
    named = {our_name(name): tensor for name, tensor in tower.state_dict().items()}
    first = keys.MLP.format(layer=keys.MLP_FIRST)
    named |= {f"{first}.{name}": tensor for name, tensor in projector.state_dict().items()}
    writer = gguf.GGUFWriter(path, keys.ARCH_CLIP)
    for name, tensor in named.items():
        values = np.ascontiguousarray(tensor.detach().float().numpy())
        if kind != "F32" and values.ndim == 2 and name.endswith(".weight") and name != keys.POSITION_EMBD:
            data = quantize_rows(values, kind, 2).reshape(len(values), -1)
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
