"""The nano model for training: the forward pass of Granite 4 Vision, over tensors named as in its checkpoint.

A test checks that it computes the same as transformers' module (`models/granite4_vision`, 5.23). This one works in
bfloat16 on complete batches whose images are packed by index, and is several times faster on a CPU. No dropout.
"""

from __future__ import annotations

import torch
from torch.nn.functional import embedding, linear

from scripts.nano.batches import Batch
from scripts.nano.kernels import Kernels
from scripts.nano.spec import (
    HISTORY,
    LOOKING,
    NANO_ADAPTER,
    SHOWN,
    SOUGHT,
    TAUGHT_HEADS,
    TEXT,
    VISION,
    grid_side,
    projectors,
    tokens_side,
)
from tests.toy.spec import CheckpointSpec

Tensors = dict[str, torch.Tensor]


def merged(text: Tensors, adapter: Tensors, spec: CheckpointSpec) -> Tensors:
    """Returns the text weights with the adapter merged: W + alpha/rank * B A."""
    out = dict(text)
    for name, a in adapter.items():
        if name.endswith(".lora_A.weight"):
            stem = name.removesuffix(".lora_A.weight")
            b = adapter[stem + ".lora_B.weight"]
            out[stem + ".weight"] = text[stem + ".weight"] + (b @ a) * (NANO_ADAPTER.alpha / NANO_ADAPTER.rank)
    return out


def patches(tiles: torch.Tensor, spec: CheckpointSpec, dtype: torch.dtype) -> torch.Tensor:
    """Unfolds uint8 tiles (n, px, px, 3) into rows of the patch convolution (n, patches, 3 * patch_px**2), -1..1."""
    n, side, px = tiles.shape[0], grid_side(spec), spec.patch_px
    cut = tiles.view(n, side, px, side, px, 3).permute(0, 1, 3, 5, 2, 4).reshape(n, side * side, 3 * px * px)
    return (cut.float() / 127.5 - 1).to(dtype)


def tower(weights: Tensors, tiles: torch.Tensor, spec: CheckpointSpec, kernels: Kernels) -> list[torch.Tensor]:
    """Returns the vision tower's hidden states, each (n_tiles, patches, width): embeddings, then every layer."""
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
    """Returns every stream's token embeddings, in the order of `projectors(spec)`: (n_tiles, tokens, text_hidden)."""
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


def decode(
    weights: Tensors,
    tokens: torch.Tensor,
    images: tuple[torch.Tensor, list[torch.Tensor]] | None,
    spec: CheckpointSpec,
    kernels: Kernels,
    lessons: Batch | None = None,
    taught: Tensors | None = None,
) -> torch.Tensor:
    """Returns hidden states (n, positions, text_hidden) after the final norm, for right-padded `tokens` (n, positions).

    `images`: positions of the image tokens in the flattened (n * positions), and each stream's embeddings there,
    in the order of `projectors(spec)`. With `lessons`, the results of the taught heads are added to `taught`. All but
    the last are surprises (negative log attention), in nats:

    - each of TAUGHT_HEADS (queries,): of its targets
    - 'history' (queries, HISTORY): of the tokens before
    - 'looks' (looks, heads): of the next glyph for the head of its slot, of position 0 for heads that should look
      nowhere
    - 'others' (looks,): of the other place where the glyph may be seen
    - 'nowhere' (others, heads): of position 0, at the other positions of answers
    - 'shown' and 'sought' (queries, text_hidden): hidden states
    """
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
    """Adds one layer's results of its lessons to `taught`. `hidden`: the layer's normed input."""
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
    """Returns the logarithm of causal attention weights, (queries, heads, positions).

    q, k: (n, heads, positions, size). `queries`: (row, position); those of one row must be adjacent.
    """
    row, position = queries.unbind(1)
    n, heads, length, size = q.shape
    counts = torch.bincount(row, minlength=n)
    place = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]  # index among the queries of its row
    asked = q.new_zeros(n, int(counts.max()), heads, size).index_put((row, place), q[row, :, position])
    scores = (asked.transpose(1, 2) @ k.mT)[row, :, place].float() * scale
    later = torch.arange(length) > position[:, None]
    return torch.log_softmax(scores.masked_fill(later[:, None], -torch.inf), dim=-1)


def logits(weights: Tensors, hidden: torch.Tensor, spec: CheckpointSpec) -> torch.Tensor:
    """Returns float32 logits (..., n_vocab) of the tied output head."""
    return linear(hidden, weights[TEXT + "embed_tokens.weight"]).float() / spec.logits_scaling
