"""The tensors of Granite 4 Vision's vision file: SigLIP2 tower, window Q-Formers, newline.

Names: transformers 5.23 `models/granite4_vision`, and the mmproj names of llama.cpp's `tools/mtmd/clip-impl.h`.
Projectors are numbered like the configuration's streams, in the order of their decoder layers.
"""

from __future__ import annotations

from granite4v import gguf_keys as keys
from granite4v.converter.tensors.rules import DropRule, TensorGroup, TensorRule, linear, norm
from granite4v.converter.tensors.vit import tower_tensors
from granite4v.families.base import Stream, VisionConfig, WindowQFormerConfig
from granite4v.families.granite4_vision import N_SPATIAL_PROJECTORS, layer_map, renamed
from granite4v.families.hf_fields import MAX_WIDTH, Fields, Json
from granite4v.families.vision_layout import padded_width

QFORMER_INTERMEDIATE_SIZE = 3072  # transformers' default for qformer_config
PREFIXES = ("model.", "")
UNUSED = (
    "a projector that no decoder layer takes: spatial sampling is off, its layer is outside the model, or a later one "
    "has it"
)


def granite4_vision_tensors(config: VisionConfig, hf_config: Json, block: int) -> tuple[TensorGroup, ...]:
    """All tensors of the mmproj file, for a checkpoint with this config.json."""
    fields = Fields(renamed(hf_config))
    qformer = fields.section("qformer_config", {})
    ffn = qformer.integer("intermediate_size", 1, MAX_WIDTH, QFORMER_INTERMEDIATE_SIZE)
    widths = (ffn, padded_width(ffn, block))
    drops = [DropRule(f"{name}.*", UNUSED) for name in _unused_projectors(config, fields)]
    if config.newline:
        newline: tuple[TensorRule, ...] = (TensorRule("image_newline", keys.IMAGE_NEWLINE, (config.text_hidden_size,)),)
    else:
        newline = ()
        drops.append(DropRule("image_newline", "'use_image_newline_parameter' is false"))
    return (
        tower_tensors(config.tower, block),
        TensorGroup(
            prefixes=PREFIXES,
            rules=(
                *newline,
                *(
                    rule
                    for p, stream in enumerate(config.streams)
                    for rule in _projector(stream, str(p), config, *widths)
                ),
            ),
            drops=tuple(drops),
        ),
    )


def _projector(stream: Stream, p: str, config: VisionConfig, ffn: int, wide: int) -> tuple[TensorRule, ...]:
    width, sides = config.tower.hidden_size, config.projector
    assert isinstance(sides, WindowQFormerConfig)
    here, layer = f"{stream.source}.", f"{stream.source}.qformer.encoder.layer.0."

    def key(part: str) -> str:
        return keys.PROJ.replace("{p}", p).replace("{part}", part)

    return (
        TensorRule(f"{here}query", keys.PROJ_QUERY.replace("{p}", p), (1, sides.query_side**2, width)),
        TensorRule(f"{here}image_positions", keys.PROJ_IMG_POS.replace("{p}", p), (1, sides.window_side**2, width)),
        *norm(f"{here}norm", key("norm"), width),
        *norm(f"{here}qformer.layernorm", key("post_norm"), width),
        *linear(f"{layer}attention.attention.query", key("self_attn_q"), width, width),
        *linear(f"{layer}attention.attention.key", key("self_attn_k"), width, width),
        *linear(f"{layer}attention.attention.value", key("self_attn_v"), width, width),
        *linear(f"{layer}attention.output.dense", key("self_attn_out"), width, width),
        *norm(f"{layer}attention.output.LayerNorm", key("self_attn_norm"), width),
        *linear(f"{layer}crossattention.attention.query", key("cross_attn_q"), width, width),
        *linear(f"{layer}crossattention.attention.key", key("cross_attn_k"), width, width),
        *linear(f"{layer}crossattention.attention.value", key("cross_attn_v"), width, width),
        *linear(f"{layer}crossattention.output.dense", key("cross_attn_out"), width, width),
        *norm(f"{layer}crossattention.output.LayerNorm", key("cross_attn_norm"), width),
        *linear(f"{layer}intermediate_query.dense", key("ffn_up"), ffn, width, padded_out=wide),
        *linear(f"{layer}output_query.dense", key("ffn_down"), width, ffn, padded_in=wide),
        *norm(f"{layer}output_query.LayerNorm", key("ffn_norm"), width),
        *linear(f"{here}out_linear", key("linear"), config.text_hidden_size, width),
    )


def _unused_projectors(config: VisionConfig, fields: Fields) -> list[str]:
    """The names of projectors in the checkpoint that no stream uses."""
    used = {stream.source for stream in config.streams}
    held = [f"layerwise_projectors.{i}" for i in range(len(layer_map(fields)))]
    held += [f"spatial_projectors.{i}" for i in range(N_SPATIAL_PROJECTORS)]
    return [name for name in held if name not in used]
