"""The nano model for training: Granite 4 Vision's arithmetic over tensors named as in its checkpoint.

transformers' own module (`models/granite4_vision`, 5.23) computes the same, which a test holds; this one does it in
bfloat16 with whole batches of pictures packed by index, several times faster on a CPU. Training knows no dropout.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import TYPE_CHECKING, Any

from tests.toy.spec import AdapterSpec, CheckpointSpec

if TYPE_CHECKING:
    import numpy as np
    import torch

    from scripts.nano.samples import Batch

    Tensors = dict[str, torch.Tensor]

TEXT, VISION = "model.language_model.", "model.vision_tower."
LORA_TARGETS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


NANO = CheckpointSpec(
    text_hidden=256,
    text_layers=7,
    text_ffn=256,
    text_heads=4,
    text_kv_heads=4,
    context=4096,
    rope_theta=500000.0,
    embedding_multiplier=12.0,
    attention_multiplier=0.125,
    residual_multiplier=0.3,
    logits_scaling=2.0,
    vision_hidden=192,
    vision_layers=4,
    vision_heads=6,
    vision_ffn=512,
    tile_px=160,
    patch_px=10,
    vision_head=False,
    max_tiles=8,
    qformer_ffn=192,
    downsample_rate="2/4",
    deepstack_layer_map=((-2, 5), (-1, 0)),
    spatial_target_layers=(1, 2, 3, 4),
    dtype="float16",
)
# Decoder layers and heads that are taught what to attend to, by lesson (`reading.Lessons`).
TAUGHT_HEADS = {"places": (1, 0), "lines": (2, 0), "far_lines": (2, 1), "find": (3, 0), "carry": (4, 0)}
HISTORY = 3  # heads of the first layer that attend to the token before, the one before that, and so on
LOOKING = 5  # the layer whose four heads look at the next glyph, one head a slot, and at position 0 elsewhere
SHOWN, SOUGHT = 3, 5  # layers before which image tokens tell their address, and an answer's positions the next one's
NANO_ADAPTER = AdapterSpec(rank=96, alpha=192.0, dtype="float16")


def grid_side(spec: CheckpointSpec) -> int:
    """Patches along a tile's side."""
    return spec.tile_px // spec.patch_px


def tokens_side(spec: CheckpointSpec) -> int:
    """Image tokens along a tile's side; every token stands for 2x2 patches."""
    return grid_side(spec) // 2


def projectors(spec: CheckpointSpec) -> list[tuple[str, int, int]]:
    """(name, vision hidden state from the end, decoder layer) of every stream."""
    out = [
        (f"model.layerwise_projectors.{i}.", state, layer) for i, (state, layer) in enumerate(spec.deepstack_layer_map)
    ]
    return out + [
        (f"model.spatial_projectors.{i}.", spec.spatial_vision_layer, layer)
        for i, layer in enumerate(spec.spatial_target_layers)
    ]


def initial(spec: CheckpointSpec, n_vocab: int, seed: int) -> tuple[Tensors, Tensors, Tensors]:
    """(text, vision, adapter) as float32 tensors. Matrices have variance 1/fan-in; the adapter's B is zero."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def matrix(n_out: int, n_in: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(n_out, n_in, generator=generator) * (gain / math.sqrt(n_in))

    text: Tensors = {}
    width, kv = spec.text_hidden, spec.text_hidden // spec.text_heads * spec.text_kv_heads
    text[TEXT + "embed_tokens.weight"] = torch.randn(n_vocab, width, generator=generator) / spec.embedding_multiplier
    adapter: Tensors = {}
    shapes = dict(zip(LORA_TARGETS, ((width, width), (kv, width), (kv, width), (width, width)), strict=False))
    shapes |= {"mlp.gate_proj": (spec.text_ffn, width), "mlp.up_proj": (spec.text_ffn, width)}
    shapes |= {"mlp.down_proj": (width, spec.text_ffn)}
    for i in range(spec.text_layers):
        at = f"{TEXT}layers.{i}."
        text[at + "input_layernorm.weight"] = torch.ones(width)
        text[at + "post_attention_layernorm.weight"] = torch.ones(width)
        for name, (n_out, n_in) in shapes.items():
            text[f"{at}{name}.weight"] = matrix(n_out, n_in)
            adapter[f"{at}{name}.lora_A.weight"] = matrix(NANO_ADAPTER.rank, n_in)
            adapter[f"{at}{name}.lora_B.weight"] = torch.zeros(n_out, NANO_ADAPTER.rank)
    text[TEXT + "norm.weight"] = torch.ones(width)

    vision: Tensors = {}
    width = spec.vision_hidden

    def linear(name: str, n_out: int, n_in: int, gain: float = 1.0) -> None:
        vision[name + ".weight"] = matrix(n_out, n_in, gain)
        vision[name + ".bias"] = torch.zeros(n_out)

    def norm(name: str) -> None:
        vision[name + ".weight"] = torch.ones(width)
        vision[name + ".bias"] = torch.zeros(width)

    vision["model.image_newline"] = torch.randn(spec.text_hidden, generator=generator)
    at = VISION + "embeddings."
    n_pixels = 3 * spec.patch_px**2
    vision[at + "patch_embedding.weight"] = matrix(width, n_pixels).view(width, 3, spec.patch_px, spec.patch_px)
    vision[at + "patch_embedding.bias"] = torch.zeros(width)
    vision[at + "position_embedding.weight"] = torch.randn(grid_side(spec) ** 2, width, generator=generator) * 0.3
    deep = 1 / math.sqrt(2 * spec.vision_layers)
    for i in range(spec.vision_layers):
        at = f"{VISION}encoder.layers.{i}."
        norm(at + "layer_norm1")
        for name in ("q_proj", "k_proj", "v_proj"):
            linear(f"{at}self_attn.{name}", width, width)
        linear(at + "self_attn.out_proj", width, width, deep)
        norm(at + "layer_norm2")
        linear(at + "mlp.fc1", spec.vision_ffn, width)
        linear(at + "mlp.fc2", width, spec.vision_ffn, deep)
    _look_at_neighbours(vision, spec)
    norm(VISION + "post_layernorm")
    query, window = (int(part) for part in spec.downsample_rate.split("/"))
    for at, _, layer in projectors(spec):
        norm(at + "norm")
        vision[at + "query"] = torch.randn(1, query**2, width, generator=generator) * 0.3
        vision[at + "image_positions"] = torch.randn(1, window**2, width, generator=generator) * 0.3
        norm(at + "qformer.layernorm")
        block = at + "qformer.encoder.layer.0."
        for attention in ("attention", "crossattention"):
            for name in ("query", "key", "value"):
                linear(f"{block}{attention}.attention.{name}", width, width)
            linear(f"{block}{attention}.output.dense", width, width, 0.5)
            norm(f"{block}{attention}.output.LayerNorm")
        linear(block + "intermediate_query.dense", spec.qformer_ffn, width)
        linear(block + "output_query.dense", width, spec.qformer_ffn, 0.5)
        norm(block + "output_query.LayerNorm")
        linear(at + "out_linear", spec.text_hidden, width, 1.0 if layer == 0 else 0.5)
    return text, vision, adapter


# Where the heads of the first layers look at the start, (rows down, columns to the right).
NEIGHBOURS = (
    ((0, -1), (0, 1), (-1, 0), (1, 0), (-1, -1), (1, 1)),
    ((0, -1), (0, 1), (-1, 0), (1, 0), (-1, 1), (1, -1)),
)
SHARPNESS = 2.6


def _look_at_neighbours(vision: Tensors, spec: CheckpointSpec) -> None:
    """Starts the first layers as something like convolutions: each head attends to one neighbour of a patch.

    A letter lies on several patches, so without this the tower first has to find out what is beside what. The first
    dimensions of a patch tell its row and column as sines and cosines; of two such vectors the product is largest
    where they are as far apart as the head's queries are turned.
    """
    import torch

    side, size = grid_side(spec), spec.vision_hidden // spec.vision_heads
    n = size // 4  # frequencies of each axis
    angle = torch.outer(torch.arange(side).float(), torch.arange(1, n + 1) * (math.pi / side))
    waves = torch.stack((angle.cos(), angle.sin()), dim=-1).flatten(1)  # (side, 2n)
    place = torch.cat((waves[:, None].expand(side, side, -1), waves[None].expand(side, side, -1)), dim=-1)
    at = VISION + "embeddings."
    vision[at + "patch_embedding.weight"][:size] = 0
    vision[at + "position_embedding.weight"][:, :size] = place.reshape(side * side, size)
    for i, offsets in enumerate(NEIGHBOURS):
        q = vision[f"{VISION}encoder.layers.{i}.self_attn.q_proj.weight"].view(spec.vision_heads, size, -1)
        k = vision[f"{VISION}encoder.layers.{i}.self_attn.k_proj.weight"].view(spec.vision_heads, size, -1)
        for head, (down, right) in enumerate(offsets):
            q[head] *= 0.1
            k[head] *= 0.1
            k[head, :, :size] = torch.eye(size) * SHARPNESS
            turns = [step * (math.pi / side) * f for step in (down, right) for f in range(1, n + 1)]
            blocks = [torch.tensor([[math.cos(t), -math.sin(t)], [math.sin(t), math.cos(t)]]) for t in turns]
            q[head, :, :size] = torch.block_diag(*blocks) * SHARPNESS


# Dimensions that a code may take, by number of classes.
CODE_DIMS = {2: 1, 3: 2, 4: 3, 5: 4, 9: 8, 96: 24}


@functools.cache
def codes(spec: CheckpointSpec) -> list[list[torch.Tensor]]:
    """For every stream but the deepest, the vector of every class of every mark: what a stream that knows says.

    In the order of `projectors(spec)`; class 0, nothing, is zero. A stream is the sum of its marks' vectors.
    """
    import torch

    from scripts.nano.samples import PLACE_CLASSES, SLOT_CLASSES

    generator = torch.Generator().manual_seed(1)
    *shared, cell = SLOT_CLASSES

    def vectors(n_classes: int, n_marks: int) -> torch.Tensor:
        n = CODE_DIMS[n_classes]
        plane = torch.linalg.qr(torch.randn(spec.text_hidden, n, generator=generator)).Q
        points = torch.randn(n_classes, n, generator=generator)
        if n == n_classes - 1:
            points[1:] = torch.eye(n)  # as far apart as can be
        points = points @ plane.t()
        points = points / points.norm(dim=1, keepdim=True) * math.sqrt(spec.text_hidden / n_marks)
        return points.index_fill(0, torch.tensor([0]), 0.0)

    n_slots = len(spec.spatial_target_layers)
    place = [vectors(n, len(PLACE_CLASSES)) for n in PLACE_CLASSES]
    slots = [[vectors(n, len(shared)) for n in shared] for _ in range(n_slots)]
    # drawn last: with a mark more, the vectors of all others are still those that checkpoints learned
    return [place, *([*slot, vectors(cell, len(shared))] for slot in slots)]


def ideal_streams(marks: torch.Tensor, spec: CheckpointSpec) -> list[torch.Tensor]:
    """What the streams of `projectors(spec)` would be, each (..., text_hidden), if they told `marks` and no more.

    NaN where marks are OPEN.
    """
    import torch

    from scripts.nano.reading import N_SLOTS
    from scripts.nano.samples import OPEN, PLACE_CLASSES, SLOT_CLASSES

    split = torch.split(marks.long(), [*[len(SLOT_CLASSES)] * N_SLOTS, len(PLACE_CLASSES)], dim=-1)
    known = []
    for tables, part in zip(codes(spec), [split[-1], *split[:-1]], strict=True):
        is_open = part[..., :1] == OPEN
        told = part.masked_fill(is_open, 0).unbind(-1)
        stream = torch.stack([table[mark] for table, mark in zip(tables, told, strict=True)]).sum(0)
        known.append(stream.masked_fill(is_open, torch.nan))
    return [torch.zeros_like(known[0]), *known]


def merged(text: Tensors, adapter: Tensors, spec: CheckpointSpec) -> Tensors:
    """Text weights with the adapter added: W + alpha/rank * B A."""
    out = dict(text)
    for name, a in adapter.items():
        if name.endswith(".lora_A.weight"):
            stem = name.removesuffix(".lora_A.weight")
            b = adapter[stem + ".lora_B.weight"]
            out[stem + ".weight"] = text[stem + ".weight"] + (b @ a) * (NANO_ADAPTER.alpha / NANO_ADAPTER.rank)
    return out


class Kernels:
    """The element-wise parts, fused by torch.compile when `fuse` is on."""

    def __init__(self, fuse: bool) -> None:
        import torch

        def wrap(function: Any) -> Any:
            return torch.compile(function, dynamic=True) if fuse else function

        self.rms_norm = wrap(_rms_norm)
        self.layer_norm = wrap(_layer_norm)
        self.silu_mul = wrap(_silu_mul)
        self.gelu = wrap(_gelu)
        self.gelu_tanh = wrap(_gelu_tanh)
        self.rope = wrap(_rope)
        self.scaled_add = wrap(_scaled_add)
        self.small_attention = wrap(_small_attention)
        self.attention = _attention_on_cpu()


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    import torch

    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def _layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    import torch

    wide = x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    return (centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight + bias).to(x.dtype)


def _silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    import torch

    return (torch.nn.functional.silu(gate.float()) * up.float()).to(gate.dtype)


def _gelu(x: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.nn.functional.gelu(x.float()).to(x.dtype)


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.nn.functional.gelu(x.float(), approximate="tanh").to(x.dtype)


def _rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (batch, positions, heads, head_dim); cos, sin (positions, 1, head_dim / 2)."""
    import torch

    half = x.shape[-1] // 2
    first, second = x[..., :half].float(), x[..., half:].float()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _scaled_add(x: torch.Tensor, y: torch.Tensor, scale: float) -> torch.Tensor:
    return (x.float() + y.float() * scale).to(x.dtype)


def _small_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """q (n, queries, heads, size), k and v (n, keys, heads, size): few of each, many n."""
    import torch

    scores = (q.float().unsqueeze(2) * k.float().unsqueeze(1)).sum(-1) * scale
    weights = torch.softmax(scores, dim=2)
    return (weights.unsqueeze(-1) * v.float().unsqueeze(1)).sum(2).to(q.dtype)


# Heads, and queries of each, whose gradient is taken at a time: what stands between stays in the processor's cache.
BLOCK_HEADS, BLOCK_ROWS = 12, 256


def _attention_on_cpu() -> Any:
    """Softmax attention (q, k, v, causal, scale), each (n, heads, positions, size).

    On a CPU the gradient is taken from the attention weights again, a few heads and queries at a time, which is
    about half as long as the backward pass of torch's flash kernel in bfloat16; elsewhere torch's own is used.
    """
    import torch

    class Attention(torch.autograd.Function):  # type: ignore[misc]
        @staticmethod
        def forward(ctx: Any, q: Any, k: Any, v: Any, causal: bool, scale: float) -> Any:
            out, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
            ctx.save_for_backward(q, k, v)
            ctx.causal, ctx.scale = causal, scale
            return out

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            shape = ctx.saved_tensors[0].shape
            q, k, v, grad = (t.flatten(0, 1) for t in (*ctx.saved_tensors, grads[0]))
            q = q * ctx.scale
            d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
            for head, row in itertools.product(range(0, len(q), BLOCK_HEADS), range(0, shape[2], BLOCK_ROWS)):
                heads, rows = slice(head, head + BLOCK_HEADS), slice(row, min(row + BLOCK_ROWS, shape[2]))
                asked, seen = (heads, rows), (heads, slice(rows.stop if ctx.causal else None))
                scores = q[asked] @ k[seen].mT
                if ctx.causal:
                    n = rows.stop - row
                    scores[:, :, row:] += torch.full((n, n), -torch.inf, dtype=q.dtype).triu(1)
                # The weights must be those of the rounded scores, and sum to one: with the sums of the forward pass,
                # a head that looks at one place only would get a gradient, and run away with it.
                weights = torch.softmax(scores, dim=-1)
                d_scores = torch._softmax_backward_data(grad[asked] @ v[seen].mT, weights, -1, q.dtype)
                d_q[asked] = d_scores @ k[seen]
                d_k[seen] += d_scores.mT @ q[asked]
                d_v[seen] += weights.mT @ grad[asked]
            return *(t.view(shape) for t in (d_q * ctx.scale, d_k, d_v)), None, None

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float) -> torch.Tensor:
        if q.device.type == "cpu":
            return Attention.apply(q, k, v, causal, scale)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)

    return attention


def patches(tiles: torch.Tensor, spec: CheckpointSpec, dtype: torch.dtype) -> torch.Tensor:
    """uint8 tiles (n, px, px, 3) as rows of the patch convolution, (n, patches, 3 * patch_px**2), within -1..1."""
    n, side, px = tiles.shape[0], grid_side(spec), spec.patch_px
    cut = tiles.view(n, side, px, side, px, 3).permute(0, 1, 3, 5, 2, 4).reshape(n, side * side, 3 * px * px)
    return (cut.float() / 127.5 - 1).to(dtype)


def tower(weights: Tensors, tiles: torch.Tensor, spec: CheckpointSpec, kernels: Kernels) -> list[torch.Tensor]:
    """Hidden states of the vision tower, each (n_tiles, patches, width): embeddings, then every layer."""
    from torch.nn.functional import linear

    at = VISION + "embeddings."
    kernel = weights[at + "patch_embedding.weight"].flatten(1)
    x = linear(patches(tiles, spec, kernel.dtype), kernel, weights[at + "patch_embedding.bias"])
    x = x + weights[at + "position_embedding.weight"]
    states = [x]
    n, n_patches, width = x.shape
    for i in range(spec.vision_layers):
        at = f"{VISION}encoder.layers.{i}."
        y = kernels.layer_norm(x, weights[at + "layer_norm1.weight"], weights[at + "layer_norm1.bias"], 1e-6)
        q, k, v = (
            linear(y, weights[f"{at}self_attn.{name}.weight"], weights[f"{at}self_attn.{name}.bias"])
            .view(n, n_patches, spec.vision_heads, -1)
            .transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        y = kernels.attention(q, k, v, False, (width // spec.vision_heads) ** -0.5)
        y = y.transpose(1, 2).reshape(n, n_patches, width)
        x = x + linear(y, weights[at + "self_attn.out_proj.weight"], weights[at + "self_attn.out_proj.bias"])
        y = kernels.layer_norm(x, weights[at + "layer_norm2.weight"], weights[at + "layer_norm2.bias"], 1e-6)
        y = kernels.gelu_tanh(linear(y, weights[at + "mlp.fc1.weight"], weights[at + "mlp.fc1.bias"]))
        x = x + linear(y, weights[at + "mlp.fc2.weight"], weights[at + "mlp.fc2.bias"])
        states.append(x)
    return states


def project(weights: Tensors, states: list[torch.Tensor], spec: CheckpointSpec, kernels: Kernels) -> list[torch.Tensor]:
    """Token embeddings of every stream, in the order of `projectors(spec)`, each (n_tiles, tokens, text_hidden)."""
    corner = 0
    streams = []
    for name, state, _ in projectors(spec):
        spatial = "spatial" in name
        streams.append(_window_qformer(weights, name, states[state], corner if spatial else None, spec, kernels))
        corner += spatial
    return streams


def _window_qformer(
    weights: Tensors, at: str, x: torch.Tensor, corner: int | None, spec: CheckpointSpec, kernels: Kernels
) -> torch.Tensor:
    from torch.nn.functional import linear

    n, _, width = x.shape
    query, window = (int(part) for part in spec.downsample_rate.split("/"))
    side = grid_side(spec)
    n_windows, heads = side // window, width // 64

    def windows(grid: torch.Tensor, size: int) -> torch.Tensor:
        grid = grid.view(n, n_windows, size, n_windows, size, width).transpose(2, 3)
        return grid.reshape(n * n_windows**2, size * size, width)

    def norm(x: torch.Tensor, name: str, eps: float) -> torch.Tensor:
        return kernels.layer_norm(x, weights[at + name + ".weight"], weights[at + name + ".bias"], eps)

    def dense(x: torch.Tensor, name: str) -> torch.Tensor:
        return linear(x, weights[at + name + ".weight"], weights[at + name + ".bias"])

    def attend(x: torch.Tensor, source: torch.Tensor, name: str) -> torch.Tensor:
        q, k, v = (
            dense(y, f"{name}.attention.{part}").view(y.shape[0], y.shape[1], heads, 64)
            for y, part in ((x, "query"), (source, "key"), (source, "value"))
        )
        y = kernels.small_attention(q, k, v, 0.125).flatten(2)
        return norm(x + dense(y, f"{name}.output.dense"), f"{name}.output.LayerNorm", 1e-12)

    x = norm(x, "norm", 1e-6)
    blocks = x.view(n, side // 2, 2, side // 2, 2, width)
    small = blocks.mean((2, 4)) if corner is None else blocks[:, :, corner // 2, :, corner % 2]
    queries = weights[at + "query"] + windows(small, query)
    keys = windows(x, window) + weights[at + "image_positions"]
    y = norm(queries, "qformer.layernorm", 1e-12)
    y = attend(y, y, "qformer.encoder.layer.0.attention")
    y = attend(y, keys, "qformer.encoder.layer.0.crossattention")
    block = "qformer.encoder.layer.0."
    z = dense(kernels.gelu(dense(y, block + "intermediate_query.dense")), block + "output_query.dense")
    y = norm(z + y, block + "output_query.LayerNorm", 1e-12)
    y = y.view(n, n_windows, n_windows, query, query, width).transpose(2, 3)
    return dense(y.reshape(n, tokens_side(spec) ** 2, width), "out_linear")


def token_index(size: tuple[int, int], first_tile: int, spec: CheckpointSpec) -> np.ndarray:
    """Which row of the flattened tokens of all tiles is each image token of a picture of `size` (width, height).

    -1 stands for the newline. Rows of tile t are t * tokens .. (t + 1) * tokens.
    """
    import numpy as np

    from granite4v.clip_projector.grid_anyres import layout
    from granite4v.clip_projector.tiles_anyres import pack

    where = layout(size, tiling(spec), tokens_side(spec))
    per_tile = tokens_side(spec) ** 2
    rows = np.arange(where.n_tiles * per_tile).reshape(where.n_tiles, per_tile, 1) + first_tile * per_tile
    out = np.empty((where.n_tokens, 1), dtype=np.int64)
    pack(list(rows), np.array([-1]), where, out)
    return out[:, 0]


def tiling(spec: CheckpointSpec) -> Any:
    """How pictures are cut: the runtime's own configuration for this checkpoint."""
    from granite4v.families.base import TilingConfig

    return TilingConfig(
        tile_px=spec.tile_px,
        image_grid_pinpoints=tuple((height, width) for height, width in spec.grid_pinpoints),
        resample=3,
        rescale_factor=1 / 255,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
    )


def decode(
    weights: Tensors,
    tokens: torch.Tensor,
    images: tuple[torch.Tensor, list[torch.Tensor]] | None,
    spec: CheckpointSpec,
    kernels: Kernels,
    lessons: Batch | None = None,
    taught: Tensors | None = None,
) -> torch.Tensor:
    """Hidden states (n, positions, text_hidden) after the final norm; `tokens` (n, positions) are padded on the right.

    `images`: positions of the image tokens in the flattened (n * positions), and each stream's embeddings there,
    in the order of `projectors(spec)`. With `lessons`, `taught` gets what the heads made of them. For each of
    TAUGHT_HEADS: how surprised it is by its targets, in nats (queries,); 'history' (n, HISTORY): by the tokens before;
    'looks' (n, heads): by the next glyph or, where a head should look nowhere, by position 0; 'others' (n,): by where
    the glyph may be seen as well; 'nowhere': as 'looks', of answers' other positions. And the hidden states 'shown'
    and 'sought' (n, text_hidden).
    """
    import torch
    from torch.nn.functional import embedding, linear

    n, length = tokens.shape
    width, heads, kv_heads = spec.text_hidden, spec.text_heads, spec.text_kv_heads
    size = width // heads
    x = embedding(tokens, weights[TEXT + "embed_tokens.weight"]) * spec.embedding_multiplier
    at_layer = {layer: i for i, (_, _, layer) in enumerate(projectors(spec))}
    if images is not None:
        text_only = torch.ones(n * length, 1, dtype=x.dtype).index_fill(0, images[0], 0)
        x = x * text_only.view(n, length, 1)
    angle = torch.outer(torch.arange(length).float(), spec.rope_theta ** (-torch.arange(0, size, 2).float() / size))
    cos, sin = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
    for i in range(spec.text_layers):
        if images is not None and i in at_layer:
            x = x.view(n * length, width).index_add(0, images[0], images[1][at_layer[i]]).view(n, length, width)
        at = f"{TEXT}layers.{i}."
        y = kernels.rms_norm(x, weights[at + "input_layernorm.weight"], spec.rms_norm_eps)
        q = linear(y, weights[at + "self_attn.q_proj.weight"]).view(n, length, heads, size)
        k = linear(y, weights[at + "self_attn.k_proj.weight"]).view(n, length, kv_heads, size)
        v = linear(y, weights[at + "self_attn.v_proj.weight"]).view(n, length, kv_heads, size)
        q, k = kernels.rope(q, cos, sin), kernels.rope(k, cos, sin)
        k, v = (
            t.unsqueeze(3).expand(n, length, kv_heads, heads // kv_heads, size).flatten(2, 3).transpose(1, 2)
            for t in (k, v)
        )
        if lessons is not None and taught is not None:
            _teach(lessons, taught, i, y, q.transpose(1, 2), k, spec.attention_multiplier)
        y = kernels.attention(q.transpose(1, 2), k, v, True, spec.attention_multiplier)
        y = linear(y.transpose(1, 2).reshape(n, length, width), weights[at + "self_attn.o_proj.weight"])
        x = kernels.scaled_add(x, y, spec.residual_multiplier)
        y = kernels.rms_norm(x, weights[at + "post_attention_layernorm.weight"], spec.rms_norm_eps)
        gate, up = linear(y, weights[at + "mlp.gate_proj.weight"]), linear(y, weights[at + "mlp.up_proj.weight"])
        y = linear(kernels.silu_mul(gate, up), weights[at + "mlp.down_proj.weight"])
        x = kernels.scaled_add(x, y, spec.residual_multiplier)
    return kernels.rms_norm(x, weights[TEXT + "norm.weight"], spec.rms_norm_eps)


def _teach(
    lessons: Batch, taught: Tensors, layer: int, hidden: torch.Tensor, q: torch.Tensor, k: torch.Tensor, scale: float
) -> None:
    """What a layer made of its lessons; `hidden` is its normed input."""
    import torch

    if layer == 0:
        asked = torch.cat((lessons.looks[:, :2], lessons.lessons["find"].queries))
        asked = asked[asked[:, 0].argsort(stable=True)]
        if len(asked):
            shares = log_shares(q[:, :HISTORY], k[:, :HISTORY], asked, scale)
            before = asked[:, 1:] - torch.arange(1, HISTORY + 1)
            taught["history"] = -shares.gather(2, before[:, :, None])[..., 0]
    for name, (at, head) in TAUGHT_HEADS.items():
        lesson = lessons.lessons[name]
        if at == layer and len(lesson.queries):
            one = slice(head, head + 1)
            shares = log_shares(q[:, one], k[:, one], lesson.queries, scale)[:, 0]
            of_pairs = -shares[lesson.pairs[:, 0], lesson.pairs[:, 1]] * lesson.shares
            taught[name] = of_pairs.new_zeros(len(lesson.queries)).index_add(0, lesson.pairs[:, 0], of_pairs)
    if layer == LOOKING and len(lessons.looks):
        row, position, target, slot, other, other_slot = lessons.looks.unbind(1)
        wanted = torch.where(slot[:, None] == torch.arange(q.shape[1]), target[:, None], 0)
        shares = log_shares(q, k, lessons.looks[:, :2], scale)
        taught["looks"] = -shares.gather(2, wanted[:, :, None])[..., 0]
        taught["others"] = -shares[torch.arange(len(row)), other_slot, other]
        looks = torch.zeros_like(lessons.labels, dtype=torch.bool)
        looks[row, position] = True
        others = ((lessons.labels >= 0) & ~looks).nonzero()
        if len(others):
            taught["nowhere"] = -log_shares(q, k, others, scale)[..., 0]
    for name, at in (("shown", SHOWN), ("sought", SOUGHT)):
        where = getattr(lessons, name)
        if at == layer and len(where):
            taught[name] = hidden[where[:, 0], where[:, 1]]


def log_shares(q: torch.Tensor, k: torch.Tensor, queries: torch.Tensor, scale: float) -> torch.Tensor:
    """Logarithms of causal attention, (queries, heads, positions); q, k (n, heads, positions, size).

    `queries` are (row, position); those of a row stand together.
    """
    import torch

    row, position = queries.unbind(1)
    n, heads, length, size = q.shape
    counts = torch.bincount(row, minlength=n)
    place = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]  # among its row's own
    asked = q.new_zeros(n, int(counts.max()), heads, size).index_put((row, place), q[row, :, position])
    scores = (asked.transpose(1, 2) @ k.mT)[row, :, place].float() * scale
    later = torch.arange(length) > position[:, None]
    return torch.log_softmax(scores.masked_fill(later[:, None], -torch.inf), dim=-1)


def logits(weights: Tensors, hidden: torch.Tensor, spec: CheckpointSpec) -> torch.Tensor:
    """Float32 logits (..., n_vocab) of the tied head."""
    from torch.nn.functional import linear

    return linear(hidden, weights[TEXT + "embed_tokens.weight"]).float() / spec.logits_scaling
