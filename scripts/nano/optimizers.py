"""The optimizers of a stage."""

from __future__ import annotations

from typing import Any

import torch

from scripts.nano.losses import HEADS

Tensors = dict[str, torch.Tensor]


def optimizers_for(trained: Tensors, rate: float, adapter_rate: float) -> list[Any]:
    """Returns AdamW for everything but matrices, and Muon for those.

    With AdamW, the adapter's product would end up using a quarter of its rank. `adapter_rate`: the adapter's learning
    rate, as a multiple of `rate`.
    """

    def is_matrix(name: str, value: torch.Tensor) -> bool:
        return value.dim() == 2 and "embed" not in name and not name.startswith(HEADS)

    others = {name: value for name, value in trained.items() if not is_matrix(name, value)}
    adam = [
        {"params": [value for name, value in others.items() if name.startswith(HEADS) == is_head], "lr": rate * share}
        for is_head, share in ((False, 0.1), (True, 1.0))
    ]
    adam = [group for group in adam if group["params"]]
    out: list[Any] = [torch.optim.AdamW(adam, betas=(0.9, 0.98), weight_decay=0.0, fused=True)]
    matrices = {name: value for name, value in trained.items() if is_matrix(name, value)}
    groups = [
        {"params": [value for name, value in matrices.items() if ("lora" in name) == is_lora], "lr": rate * share}
        for is_lora, share in ((False, 1.0), (True, adapter_rate))
    ]
    out.append(torch.optim.Muon([group for group in groups if group["params"]], weight_decay=0.01, momentum=0.95))
    for group in (group for optimizer in out for group in optimizer.param_groups):
        group["peak"] = group["lr"]
    return out
