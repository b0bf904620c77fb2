"""A PEFT LoRA adapter: which matrices it changes, by how much, and whether we can do what it asks.

Scales follow peft 0.18 (`tuners/lora/layer.py`): alpha/r, or alpha/sqrt(r) with rslora, each module with the
rank and alpha that the patterns give it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from granite4v.converter.checkpoint import read_json
from granite4v.converter.match import Names, raise_problems
from granite4v.converter.safetensors_file import SourceTensor, read_header
from granite4v.errors import CheckpointError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
WRAPPER = "base_model.model."
# a.b.lora_A.weight; some versions of peft kept the adapter's name: a.b.lora_A.default.weight
LORA_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.\w+)?\.weight")

# Features that change what the adapter computes and that neither merging nor GGUF's format covers.
UNSUPPORTED = {
    "use_dora": "DoRA (a magnitude for every row)",
    "lora_bias": "a bias of its own ('lora_bias')",
    "modules_to_save": "whole modules trained beside the LoRA matrices ('modules_to_save')",
    "trainable_token_indices": "trained token embeddings ('trainable_token_indices')",
    "layer_replication": "replicated layers ('layer_replication')",
    "target_parameters": "LoRA on bare parameters ('target_parameters')",
    "alora_invocation_tokens": "activated LoRA, on from an invocation sequence only ('alora_invocation_tokens')",
    "use_qalora": "QA-LoRA (pooled inputs)",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing between adapters",
    "kasa_config": "KaSA (singular values of its own)",
}
# Starting values that alter the base weights when peft loads the adapter.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq")


@dataclass(frozen=True)
class LoraPair:
    """W + scale * B @ A for one matrix. `a`: (rank, n_in), `b`: (n_out, rank)."""

    a: SourceTensor
    b: SourceTensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class Adapter:
    """`pairs` by the table's spelling of the matrix they change. `alpha`: the one most modules have."""

    folder: Path
    name: str
    alpha: float
    pairs: Mapping[str, LoraPair]


def has_adapter(folder: Path) -> bool:
    return (folder / CONFIG).exists()


def base_model_of(folder: Path) -> str:
    """The base model that the adapter in this directory names; raises CheckpointError when it names none."""
    base = read_json(folder / CONFIG).get("base_model_name_or_path")
    if not base:
        raise CheckpointError(
            f"'{folder}' holds an adapter but no model, and its '{CONFIG}' has no 'base_model_name_or_path'. Give the "
            f"base model as SRC and the adapter with --adapter '{folder}'."
        )
    return str(base)


def open_adapter(folder: Path, name: str, names: Names, shapes: Mapping[str, tuple[int, ...]], where: str) -> Adapter:
    """The adapter in a directory, matched against the base model's tables.

    `shapes`: the base's matrices under the tables' spelling. Raises CheckpointError that lists everything
    unsupported, unknown, incomplete or mis-shaped.
    """
    config = read_json(folder / CONFIG)
    problems = _unsupported(config)
    if not (folder / WEIGHTS).exists():
        raise CheckpointError(f"'{folder}' has '{CONFIG}' but no '{WEIGHTS}'; only safetensors adapters convert.")
    tensors, wrong = read_header(folder / WEIGHTS)
    problems += wrong
    sides: dict[str, dict[str, SourceTensor]] = {}
    modules: dict[str, str] = {}
    strangers: list[str] = []
    for tensor in tensors:
        match = LORA_KEY.fullmatch(tensor.name.removeprefix(WRAPPER))
        own = names.spellings.get(f"{match['module']}.weight") if match else None
        if match is None:
            problems.append(f"unknown tensor '{tensor.name}': neither lora_A nor lora_B of a linear layer")
        elif own is None or own not in shapes or len(shapes[own]) != 2:
            strangers.append(f"it changes '{match['module']}', a linear layer that the model does not have")
        elif match["side"] in sides.setdefault(own, {}):
            problems.append(f"doubled tensor: '{sides[own][match['side']].name}' and '{tensor.name}' are the same")
        else:
            sides[own][match["side"]] = tensor
            modules[own] = match["module"]
    pairs: dict[str, LoraPair] = {}
    for own, found in sides.items():
        problems += _check_pair(own, found, shapes[own], rank := _by_pattern(config, "rank", modules[own]))
        if len(found) == 2:
            pairs[own] = LoraPair(found["A"], found["B"], _scale(config, modules[own], rank))
    problems += strangers
    if not pairs and not problems:
        problems.append(f"'{WEIGHTS}' holds no tensors")
    raise_problems(
        problems,
        f"the adapter '{name}' cannot be applied to '{where}'",
        "Give the base model that the adapter was trained on, or convert the base alone with --lora ignore.",
    )
    return Adapter(folder, name, float(config.get("lora_alpha", 8)), pairs)


def _check_pair(own: str, found: Mapping[str, SourceTensor], shape: tuple[int, ...], rank: float) -> list[str]:
    if len(found) != 2:
        missing = "B" if "A" in found else "A"
        return [f"'{own}' has no lora_{missing}"]
    n_out, n_in = shape
    a, b, r = found["A"], found["B"], int(rank)
    problems = []
    if a.shape != (r, n_in):
        problems.append(f"mis-shaped '{a.name}': found {list(a.shape)}, expected {[r, n_in]} for '{own}'")
    if b.shape != (n_out, r):
        problems.append(f"mis-shaped '{b.name}': found {list(b.shape)}, expected {[n_out, r]} for '{own}'")
    return problems


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    problems = [f"it uses {what}, which does not convert" for key, what in UNSUPPORTED.items() if config.get(key)]
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        problems.append(f"it is of type {kind!r}; only LORA converts")
    if config.get("bias", "none") != "none":
        problems.append(f"it trains biases (bias = {config['bias']!r}), which do not convert")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS):
        problems.append(
            f"it starts from {init!r}, which alters the base weights when peft loads it; save it again with "
            "'path_initial_model_for_weight_conversion'"
        )
    return problems


def _scale(config: Mapping[str, Any], module: str, rank: float) -> float:
    alpha = _by_pattern(config, "alpha", module)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(config: Mapping[str, Any], which: str, module: str) -> float:
    """The module's rank or alpha: of the first pattern that matches the end of its name, or the general one."""
    for pattern, value in (config.get(f"{which}_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(value)
    return float(config.get("r" if which == "rank" else "lora_alpha", 8))
