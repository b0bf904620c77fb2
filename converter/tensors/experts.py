"""The feed-forward networks of a decoder that has experts in some of its layers.

Names: transformers 5.23 `models/llama4`, and llama.cpp's `src/llama-arch.cpp`. The checkpoint's expert tensors are
`(experts, n_in, n_out)`, with gate before up along n_out; llama.cpp has three tensors `(experts, n_out, n_in)`.
"""

from __future__ import annotations

from granite4v import gguf_keys as keys
from granite4v.converter.tensors.rules import TensorRule
from granite4v.families.text_config import ExpertsConfig

NETWORK = "layers.{i}.feed_forward."


def dense(hidden: int, ffn: int) -> list[TensorRule]:
    """The network of a layer without experts, with `{i}` for its number."""
    return _network(NETWORK, "ffn_{part}.weight", hidden, ffn)


def routed(experts: ExpertsConfig, hidden: int) -> list[TensorRule]:
    """The router, the experts that it selects from, and the shared expert."""
    n, ffn = experts.count, experts.intermediate_size
    both, down = f"{NETWORK}experts.gate_up_proj", f"{NETWORK}experts.down_proj"
    return [
        TensorRule(f"{NETWORK}router.weight", _block(keys.ROUTER), (n, hidden)),
        TensorRule(both, _experts("gate"), (n, hidden, 2 * ffn), transposed=(0, ffn)),
        TensorRule(both, _experts("up"), (n, hidden, 2 * ffn), transposed=(ffn, 2 * ffn)),
        TensorRule(down, _experts("down"), (n, ffn, hidden), transposed=(0, hidden)),
        *_network(f"{NETWORK}shared_expert.", keys.SHARED_EXPERT, hidden, ffn),
    ]


def _network(source: str, target: str, hidden: int, ffn: int) -> list[TensorRule]:
    shapes = {"gate": (ffn, hidden), "up": (ffn, hidden), "down": (hidden, ffn)}
    return [
        TensorRule(f"{source}{part}_proj.weight", _block(target.replace("{part}", part)), shape)
        for part, shape in shapes.items()
    ]


def _experts(part: str) -> str:
    return _block(keys.EXPERTS.replace("{part}", part))


def _block(part: str) -> str:
    return keys.TEXT_BLOCK.replace("{part}", part)
