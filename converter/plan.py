"""Plans what a conversion will write, as plain data: built from headers only, printed by --dry-run."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import metadata as packages
from typing import Any

import gguf

from granite4v import gguf_keys as keys
from granite4v.converter import policy
from granite4v.converter.adapter import Adapter, LoraPair
from granite4v.converter.checkpoint import Checkpoint
from granite4v.converter.match import Match
from granite4v.converter.policy import Choice
from granite4v.converter.safetensors_file import SourceTensor
from granite4v.converter.tensors.rules import Shape, TensorGroup, TensorRule, padded_config
from granite4v.converter.vocabulary import vocabulary_metadata
from granite4v.errors import CheckpointError
from granite4v.families.base import VisionConfig
from granite4v.families.hf_fields import Fields
from granite4v.families.registry import Family
from granite4v.families.text_config import TextArchitecture, TextConfig
from granite4v.families.vision_layout import row_padded
from granite4v.ggml.quantize import row_bytes

ALIGNMENT_BYTES = 32  # GGUF's default: every tensor starts at a multiple of it


def aligned(n_bytes: int) -> int:
    """Rounds up to a multiple of the alignment."""
    return -(-n_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor to write. `shape`: in NumPy's order. `rule`: how its rows are made from the rows of `source`.

    `source`: None for a tensor that is computed from the configuration (`rule.values`).
    `lora`: a delta that is added first. `factor`: the values are then multiplied by it.
    """

    name: str
    shape: tuple[int, ...]
    choice: Choice
    source: SourceTensor | None
    rule: TensorRule
    lora: LoraPair | None = None
    factor: float = 1.0

    @property
    def type_name(self) -> str:
        return self.choice.type_name

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape[:-1]) * row_bytes(self.type_name, self.shape[-1])


@dataclass(frozen=True)
class PlannedFile:
    """One GGUF file. Metadata values are str, bool, int, float or a list of one of them."""

    name: str
    arch: str
    metadata: Mapping[str, Any]
    tensors: tuple[PlannedTensor, ...]

    @property
    def offsets_bytes(self) -> list[int]:
        """The offset of each tensor from the start of the first one."""
        return [0, *itertools.accumulate(aligned(tensor.n_bytes) for tensor in self.tensors)][:-1]

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors, each padded to the alignment."""
        return sum(aligned(tensor.n_bytes) for tensor in self.tensors)


@dataclass(frozen=True)
class Plan:
    """Everything that one conversion writes and leaves out, and its warnings.

    `adapter_use`: 'merged', 'separate' or 'ignored'; 'none' without an adapter.
    """

    source: str
    files: tuple[PlannedFile, ...]
    dropped: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]
    adapter: str | None = None
    adapter_use: str = "none"

    @property
    def data_bytes(self) -> int:
        return sum(file.data_bytes for file in self.files)


@dataclass(frozen=True)
class Model:
    """A checkpoint with its family, its configuration, and the tables matched against its tensors.

    `text_config`: the section of config.json that `text` was read from.
    """

    checkpoint: Checkpoint
    family: Family
    vision: VisionConfig
    architecture: TextArchitecture
    text_config: Fields
    text: TextConfig
    tied: bool
    text_groups: tuple[TensorGroup, ...]
    vision_groups: tuple[TensorGroup, ...]
    match: Match
    warnings: tuple[str, ...] = ()


def make_plan(model: Model, text_type: str, vision_type: str, adapter: Adapter | None, lora: str) -> Plan:
    """Builds the plan for one checkpoint. `lora`: 'merge', 'separate' or 'ignore'. The types must be valid.

    Raises CheckpointError for a tokenizer that does not fit the model and for an adapter that GGUF cannot hold.
    """
    provenance = _provenance(model, adapter, lora)
    merged = adapter.pairs if adapter is not None and lora == "merge" else {}
    text, warnings = _text_file(model, text_type, merged, provenance)
    files = [text, _vision_file(model, text_type, vision_type, merged, provenance)]
    if adapter is not None and lora == "separate":
        files.append(_adapter_file(model, policy.adapter_type(text_type), adapter, provenance))
    return Plan(
        source=model.checkpoint.location.name,
        files=tuple(files),
        dropped=model.match.dropped,
        warnings=(*model.warnings, *warnings),
        adapter=adapter.name if adapter is not None else None,
        adapter_use=provenance[keys.PROVENANCE_ADAPTER],
    )


def _text_file(
    model: Model, type_policy: str, merged: Mapping[str, LoraPair], provenance: Mapping[str, Any]
) -> tuple[PlannedFile, list[str]]:
    arch, config, text = model.architecture.arch, model.checkpoint.config, model.text_config
    image_token, n_vocab = _image_token(model), model.text.vocab_size
    vocabulary, warnings = vocabulary_metadata(
        model.checkpoint.folder, config, text.values, n_vocab, image_token, model.text.embedding_rows
    )
    sizes = model.architecture.metadata(model.text, text)
    injection = model.family.text_metadata(model.vision, model.text.num_hidden_layers)
    metadata = {
        keys.GENERAL_TYPE: "model",
        **_general(model, type_policy),
        **{keys.text_key(key, arch): value for key, value in sizes.items()},
        **{keys.text_key(key, arch): value for key, value in injection.items()},
        **vocabulary,
        **provenance,
        keys.PROVENANCE_POLICY: type_policy,
    }
    if image_token < n_vocab:
        metadata[keys.IMAGE_TOKEN_ID] = image_token
    if model.vision.takes_video:
        metadata[keys.VIDEO_TOKEN_ID] = _token_id(config, "video", model.text.vocab_size)
    shape = policy.TextShape(model.text.num_hidden_layers, model.text.n_gqa, model.tied)
    tensors = _tensors(model, model.text_groups, merged, lambda n, s: policy.text_type(n, s, type_policy, shape))
    return PlannedFile(f"text-{type_policy}.gguf", arch, metadata, tensors), warnings


def _vision_file(
    model: Model, text_policy: str, type_policy: str, merged: Mapping[str, LoraPair], provenance: Mapping[str, Any]
) -> PlannedFile:
    """Plans the vision file. Cross-attention layers belong to the decoder, so they follow the text type policy."""
    metadata = {
        keys.GENERAL_TYPE: keys.TYPE_MMPROJ,
        **_general(model, type_policy),
        **model.family.vision_metadata(padded_config(model.vision, policy.vision_block(type_policy))),
        **provenance,
        keys.PROVENANCE_POLICY: type_policy,
    }
    image_token, cross = _image_token(model), model.vision.cross_attention
    if image_token >= model.text.vocab_size:  # llama.cpp never sees this token, so the text file does not have it
        metadata[keys.IMAGE_TOKEN_ID] = image_token
    n_layers = model.text.num_hidden_layers + (len(cross.layers) if cross is not None else 0)
    decoder = policy.TextShape(n_layers, model.text.n_gqa, model.tied)

    def choose(name: str, shape: Shape) -> Choice:
        if name.startswith(keys.CROSS_PREFIX):
            return policy.text_type(name.removeprefix(keys.CROSS_PREFIX), shape, text_policy, decoder)
        return policy.vision_type(name, shape, type_policy)

    exact = _tensors(model, model.vision_groups, merged, choose)
    tensors = tuple(replace(tensor, shape=row_padded(tensor.shape, tensor.type_name)) for tensor in exact)
    return PlannedFile(f"mmproj-{type_policy}.gguf", keys.ARCH_CLIP, metadata, tensors)


def _adapter_file(model: Model, type_name: str, adapter: Adapter, provenance: Mapping[str, Any]) -> PlannedFile:
    """Plans the adapter file.

    llama.cpp scales B @ A of each module by alpha / rank, with one alpha for the file. If a module has another scale,
    the ratio is multiplied into its B.
    """
    rules = [(group.prefixes[0] + rule.source, rule) for group in model.text_groups for rule in group.rules]
    foreign = sorted(set(adapter.pairs) - {own for own, _ in rules})
    if foreign:
        raise CheckpointError(
            f"the adapter '{adapter.name}' changes the image side or layers of cross-attention as well "
            f"({', '.join(foreign[:3])}, ...), which a separate GGUF adapter cannot hold; use --lora merge."
        )
    alpha = adapter.alpha or 1.0
    choice = Choice(type_name, "LoRA matrices are not quantized: their rows are as short as the rank")
    tensors = []
    for own, rule in rules:
        pair = adapter.pairs.get(own)
        if pair is None:
            continue
        tensors += [
            _plain(keys.LORA_A.format(name=rule.target), pair.a, choice),
            PlannedTensor(
                keys.LORA_B.format(name=rule.target),
                (rule.target_shape[0], pair.rank),
                choice,
                pair.b,
                TensorRule(pair.b.name, rule.target, pair.b.shape, rows=rule.rows, rope_heads=rule.rope_heads),
                factor=pair.scale * pair.rank / alpha,
            ),
        ]
    metadata = {
        keys.GENERAL_TYPE: keys.TYPE_ADAPTER,
        **_general(model, type_name),
        keys.ADAPTER_TYPE: "lora",
        keys.ADAPTER_LORA_ALPHA: float(alpha),
        **provenance,
        keys.PROVENANCE_POLICY: type_name,
    }
    return PlannedFile(f"lora-{type_name}.gguf", model.architecture.arch, metadata, tuple(tensors))


def _plain(name: str, source: SourceTensor, choice: Choice) -> PlannedTensor:
    rule = TensorRule(source.name, name, source.shape)
    return PlannedTensor(name, source.shape, choice, source, rule)


def _tensors(
    model: Model, groups: Iterable[TensorGroup], merged: Mapping[str, LoraPair], choose: Callable[[str, Shape], Choice]
) -> tuple[PlannedTensor, ...]:
    tensors = []
    for group in groups:
        for rule in group.rules:
            own = group.prefixes[0] + rule.source
            choice = choose(rule.target, rule.target_shape)
            source = model.match.tensors[own] if rule.values is None else None
            tensors.append(PlannedTensor(rule.target, rule.target_shape, choice, source, rule, merged.get(own)))
    return tuple(tensors)


def _general(model: Model, type_policy: str) -> dict[str, Any]:
    return {
        keys.GENERAL_NAME: model.checkpoint.location.short_name,
        keys.GENERAL_FILE_TYPE: policy.file_type(type_policy),
        keys.GENERAL_QUANTIZATION_VERSION: gguf.GGML_QUANT_VERSION,
    }


def _provenance(model: Model, adapter: Adapter | None, lora: str) -> dict[str, Any]:
    location = model.checkpoint.location
    states = {"merge": "merged", "separate": "separate", "ignore": "ignored"}
    provenance: dict[str, Any] = {
        keys.PROVENANCE_VERSION: packages.version("granite4v"),
        keys.PROVENANCE_SOURCE: location.name,
        keys.PROVENANCE_ADAPTER: "none" if adapter is None else states[lora],
        keys.PAIR_ID: model.checkpoint.fingerprint(),
    }
    if location.revision:
        provenance[keys.PROVENANCE_REVISION] = location.revision
    if adapter is not None:
        provenance[keys.PROVENANCE_ADAPTER_SOURCE] = adapter.name
    return provenance


def _image_token(model: Model) -> int:
    return _token_id(model.checkpoint.config, "image", model.text.vocab_size + model.text.embedding_rows)


def _token_id(config: Mapping[str, Any], kind: str, n_vocab: int) -> int:
    """The id of the placeholder token of a `kind`, 'image' or 'video'."""
    fields = Fields(config)
    old, new = f"{kind}_token_index", f"{kind}_token_id"
    names = [name for name in (old, new) if name in fields]
    ids = {fields.integer(name, 0, n_vocab - 1) for name in names or (old,)}
    if len(ids) > 1:
        raise fields.error(new, f"the same as '{old}', {fields.get(old)}")
    return ids.pop()


def describe(plan: Plan) -> str:
    """Formats the plan as text: one line per tensor, then the dropped tensors, then a summary."""
    lines = [f"source: {plan.source}"]
    if plan.adapter is not None:
        lines.append(f"adapter: {plan.adapter}, {plan.adapter_use}")
    for file in plan.files:
        lines += ["", f"{file.name}  ({file.arch}, {counted(len(file.tensors), 'tensor')}, {size(file.data_bytes)})"]
        lines += [f"  {key} = {_short(value)}" for key, value in file.metadata.items()]
        lines += [f"  {_line(tensor)}" for tensor in file.tensors]
        lines += [f"  {type_name}: {reason}" for type_name, reason in _reasons(file)]
    if plan.dropped:
        lines += ["", "left out:", *(f"  {name}: {reason}" for name, reason in plan.dropped)]
    return "\n".join([*lines, "", *_summary(plan)])


def _summary(plan: Plan) -> list[str]:
    """Lines with the size, tensors and types of each file, how many tensors are dropped and why, and warnings."""
    lines = ["summary:"]
    for file in plan.files:
        types = Counter(tensor.type_name for tensor in file.tensors)
        listed = ", ".join(f"{n} {type_name}" for type_name, n in types.most_common())
        lines.append(f"  {file.name}: {size(file.data_bytes)}, {counted(len(file.tensors), 'tensor')} ({listed})")
    lines.append(f"  {counted(len(plan.files), 'file')}, {size(plan.data_bytes)} in all")
    for reason, n in Counter(reason for _, reason in plan.dropped).items():
        lines.append(f"  left out: {counted(n, 'tensor')}, {reason}")
    lines += [f"  warning: {warning}" for warning in plan.warnings]
    return lines


def _line(tensor: PlannedTensor) -> str:
    steps = [
        f"rows {tensor.rule.rows[0]}-{tensor.rule.rows[1]}" if tensor.rule.rows else "",
        "merge LoRA" if tensor.lora else "",
        f"times {tensor.factor:g}" if tensor.factor != 1.0 else "",
        f"reorder {tensor.rule.rope_heads} heads" if tensor.rule.rope_heads else "",
        f"columns {tensor.rule.transposed[0]}-{tensor.rule.transposed[1]}, transposed"
        if tensor.rule.transposed
        else "",
        f"columns in order {list(tensor.rule.column_blocks)}" if tensor.rule.column_blocks else "",
        f"pad from {list(tensor.rule.shape)}" if tensor.rule.padded or tensor.shape != tensor.rule.target_shape else "",
    ]
    done = ", ".join(step for step in steps if step)
    shape = "x".join(map(str, tensor.shape))
    tail = f"  [{done}]" if done else ""
    source = tensor.source.name if tensor.source is not None else f"computed: {tensor.rule.source}"
    return f"{tensor.name:<40} {tensor.type_name:<7} {shape:<16} <- {source}{tail}"


def _reasons(file: PlannedFile) -> list[tuple[str, str]]:
    return list(dict.fromkeys((tensor.type_name, tensor.choice.reason) for tensor in file.tensors))


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > 64:
        return f"[{len(value)} values]"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{len(text)} characters"


def size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.2f} MB"


def counted(n: int, what: str) -> str:
    """Formats a count: '1 tensor', '2 tensors'."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"
