"""Reads a PEFT LoRA adapter: which matrices it changes, by how much, and whether its features are supported.

Scales follow peft 0.18 (`tuners/lora/layer.py`): alpha/r, or alpha/sqrt(r) with rslora. Patterns determine the rank and
alpha of each module.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from granite4v.converter.files import exists, read_json
from granite4v.converter.match import Names, raise_problems, type_problem
from granite4v.converter.safetensors_file import SourceTensor, read_header
from granite4v.errors import CheckpointError
from granite4v.families.hf_fields import MAX_FACTOR, MAX_WIDTH, Fields, shown

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
WRAPPER = "base_model.model."
# a.b.lora_A.weight; some versions of peft kept the adapter's name: a.b.lora_A.default.weight
LORA_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.[\w-]+)?\.weight")
DEFAULT_RANK = DEFAULT_ALPHA = 8  # peft's
# A pattern is a regular expression from a file: nested or very many repetitions could take forever to match.
MAX_PATTERNS = 10_000
MAX_PATTERN_LENGTH = 500
MAX_REPETITIONS = 4
REPETITION = re.compile(r"(?<!\()[*+?{]")
REPEATED_GROUP = re.compile(r"\)[*+{]")

# Features that change what the adapter computes, and that are supported neither by merging nor by the GGUF format.
UNSUPPORTED = {
    "use_dora": "DoRA (a magnitude for every row)",
    "lora_bias": "LoRA biases ('lora_bias')",
    "modules_to_save": "modules trained in full beside the LoRA matrices ('modules_to_save')",
    "trainable_token_indices": "trained token embeddings ('trainable_token_indices')",
    "layer_replication": "replicated layers ('layer_replication')",
    "target_parameters": "LoRA on bare parameters ('target_parameters')",
    "alora_invocation_tokens": "activated LoRA, on from an invocation sequence only ('alora_invocation_tokens')",
    "use_qalora": "QA-LoRA (pooled inputs)",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing between adapters",
    "kasa_config": "KaSA (its own singular values)",
}
# Initializations that make peft change the base weights when it loads the adapter.
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
    """`pairs`: by the name of the changed matrix, in the tables' spelling. `alpha`: that of modules without a pattern
    of their own."""

    folder: Path
    name: str
    alpha: float
    pairs: Mapping[str, LoraPair]


def has_adapter(folder: Path) -> bool:
    return exists(folder / CONFIG)


def base_model_of(folder: Path) -> str:
    """Returns the base model that the adapter in a directory names; raises CheckpointError when it names none."""
    config = Fields(read_json(folder / CONFIG), str(folder / CONFIG))
    if not config.get("base_model_name_or_path"):
        raise CheckpointError(
            f"'{folder}' holds an adapter but no model, and its '{CONFIG}' has no 'base_model_name_or_path'. Give the "
            f"base model as SRC and the adapter with --adapter '{folder}'."
        )
    return config.text("base_model_name_or_path")


def open_adapter(folder: Path, name: str, names: Names, shapes: Mapping[str, tuple[int, ...]], where: str) -> Adapter:
    """Opens the adapter in a directory and matches it against the base model's tables.

    `shapes`: shapes of the base model's tensors, in the tables' spelling. `where`: the base model's name. Raises
    CheckpointError with a list of everything that is unsupported, unknown, incomplete or has the wrong shape.
    """
    config = Fields(read_json(folder / CONFIG), CONFIG)
    problems = _unsupported(config.values)
    settings = _Settings.read(config)
    if not exists(folder / WEIGHTS):
        raise CheckpointError(f"'{folder}' has '{CONFIG}' but no '{WEIGHTS}'; only safetensors adapters convert.")
    tensors, wrong = read_header(folder / WEIGHTS)
    problems += wrong
    sides: dict[str, dict[str, SourceTensor]] = {}
    modules: dict[str, str] = {}
    foreign: list[str] = []
    for tensor in tensors:
        match = LORA_KEY.fullmatch(tensor.name.removeprefix(WRAPPER))
        own = names.spellings.get(f"{match['module']}.weight") if match else None
        if match is None:
            problems.append(f"unknown tensor {tensor.name!r}: neither lora_A nor lora_B of a linear layer")
        elif (problem := type_problem(tensor)) is not None:
            problems.append(problem)
        elif own is None or own not in shapes or len(shapes[own]) != 2:
            foreign.append(f"it changes '{match['module']}', a linear layer that the model does not have")
        elif match["side"] in sides.setdefault(own, {}):
            problems.append(f"doubled tensor: '{sides[own][match['side']].name}' and '{tensor.name}' are the same")
        else:
            sides[own][match["side"]] = tensor
            modules[own] = match["module"]
    pairs: dict[str, LoraPair] = {}
    for own, found in sides.items():
        problems += _check_pair(own, found, shapes[own], settings.rank(modules[own]))
        if len(found) == 2:
            pairs[own] = LoraPair(found["A"], found["B"], settings.scale(modules[own]))
    problems += foreign
    if not pairs and not problems:
        problems.append(f"'{WEIGHTS}' holds no tensors")
    raise_problems(
        problems,
        f"the adapter '{name}' cannot be applied to '{where}'",
        "Give the base model that the adapter was trained on, or convert the base alone with --lora ignore.",
    )
    return Adapter(folder, name, settings.general_alpha, pairs)


def _check_pair(own: str, found: Mapping[str, SourceTensor], shape: tuple[int, ...], r: int) -> list[str]:
    if len(found) != 2:
        missing = "B" if "A" in found else "A"
        return [f"'{own}' has no lora_{missing}"]
    n_out, n_in = shape
    a, b = found["A"], found["B"]
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


@dataclass(frozen=True)
class _Settings:
    """Rank and alpha of every module. Patterns are in the order of the file; the first match decides, as in peft."""

    general_rank: int
    general_alpha: float
    ranks: tuple[tuple[re.Pattern[str], int], ...]
    alphas: tuple[tuple[re.Pattern[str], float], ...]
    use_rslora: bool

    @classmethod
    def read(cls, config: Fields) -> _Settings:
        """Raises CheckpointError for numbers that are out of range and patterns that cannot be used."""
        ranks, alphas = (config.section(key, {}) for key in ("rank_pattern", "alpha_pattern"))
        return cls(
            general_rank=config.integer("r", 1, MAX_WIDTH, DEFAULT_RANK),
            general_alpha=_alpha(config, "lora_alpha", DEFAULT_ALPHA),
            ranks=tuple((_pattern(ranks, key), ranks.integer(key, 1, MAX_WIDTH)) for key in ranks.values),
            alphas=tuple((_pattern(alphas, key), _alpha(alphas, key)) for key in alphas.values),
            use_rslora=config.flag("use_rslora", False),
        )

    def rank(self, module: str) -> int:
        return next((rank for pattern, rank in self.ranks if pattern.match(module)), self.general_rank)

    def scale(self, module: str) -> float:
        alpha = next((alpha for pattern, alpha in self.alphas if pattern.match(module)), self.general_alpha)
        rank = self.rank(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _alpha(values: Fields, key: str, *default: float) -> float:
    return values.number(key, -MAX_FACTOR, MAX_FACTOR, *default)


def _pattern(patterns: Fields, key: str) -> re.Pattern[str]:
    """Compiles an expression that matches module names whose end matches `key`, as in peft."""
    if len(patterns.values) > MAX_PATTERNS:
        raise CheckpointError(
            f"'{patterns.file}': '{patterns.path}' has {len(patterns.values):,} entries; expected at most "
            f"{MAX_PATTERNS:,}."
        )
    if len(key) > MAX_PATTERN_LENGTH or len(REPETITION.findall(key)) > MAX_REPETITIONS or REPEATED_GROUP.search(key):
        raise CheckpointError(
            f"'{patterns.file}': '{patterns.path}' has the pattern {shown(key)}; expected the end of a module's name, "
            f"or a regular expression with at most {MAX_REPETITIONS} repetitions and no repeated groups."
        )
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"'{patterns.file}': '{patterns.path}' has the pattern {shown(key)}, which is not a regular expression "
            f"({error})."
        ) from None
