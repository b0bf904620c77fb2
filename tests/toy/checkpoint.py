"""Makes Hugging Face checkpoints with random weights, of any size, of every family.

    python -m tests.toy.checkpoint OUT --preset tiny
    python -m tests.toy.checkpoint OUT --preset full-4.1      # 4.0 billion parameters, 8 GB, about a minute

Needs NumPy and ml_dtypes, not torch: tensors are drawn, rounded and appended one by one, so memory stays small at any
size. The same seed gives the same values whatever the file layout: two checkpoints that differ only in spelling,
sharding or the fused MLP contain the same model. Norm weights are far from 1 and biases far from 0, so that a mistake
anywhere changes the result.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tests.toy.language import ToyTokenizer, build_tokenizer, write_language_files
from tests.toy.llama4 import TEMPLATE as LLAMA4_TEMPLATE
from tests.toy.llama4 import llama4_tensors, llama4_tokenizer
from tests.toy.llava_next import TEMPLATES
from tests.toy.llava_onevision import TEMPLATE, VIDEO
from tests.toy.mllama import TEMPLATE as MLLAMA_TEMPLATE
from tests.toy.mllama import mllama_tensors, mllama_tokenizer
from tests.toy.spec import (
    MAPPING_CASES,
    PRESETS,
    AdapterSpec,
    CheckpointSpec,
    Json,
    adapter_config,
    model_config,
    preprocessor_config,
    processor_config,
)

__all__ = [
    "MAPPING_CASES",
    "PRESETS",
    "AdapterSpec",
    "CheckpointSpec",
    "Tensor",
    "model_tensors",
    "stored_tensors",
    "write_adapter",
    "write_checkpoint",
    "write_configuration",
]

CHUNK = 1 << 22  # values drawn at once


@dataclass(frozen=True)
class Tensor:
    """A tensor of the model under its transformers 5 name. `draw` is 'normal' (with deviation `std`), 'norm', 'rms' or
    'gate'."""

    name: str
    shape: tuple[int, ...]
    std: float = 0.0
    draw: str = "normal"
    quiet_rows: range = range(0)  # drawn with a quarter of the deviation


def write_checkpoint(directory: Path | str, spec: CheckpointSpec) -> Path:
    """Writes a complete checkpoint directory and returns it. Sizes and spellings come from `spec`."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = write_configuration(directory, spec)
    _write_shards(directory, stored_tensors(spec, tokenizer.n_vocab + spec.unused_rows), spec)
    return directory


def write_configuration(directory: Path, spec: CheckpointSpec) -> ToyTokenizer:
    """Writes all files of a checkpoint except its weights; returns the tokenizer."""
    video = VIDEO if spec.family == "llava_onevision" else None
    tokenizer = build_tokenizer(spec.n_bpe, spec.image_id, spec.vocabulary, video)
    template = {"llava_next": TEMPLATES.get(spec.text_type), "llava_onevision": TEMPLATE}.get(spec.family)
    if spec.family == "mllama":
        tokenizer, template = mllama_tokenizer(tokenizer), MLLAMA_TEMPLATE
    if spec.family == "llama4":
        tokenizer, template = llama4_tokenizer(tokenizer), LLAMA4_TEMPLATE
    write_language_files(directory, tokenizer, spec.template_in_config, template, spec.template_file)
    _write_json(directory / "config.json", model_config(spec, tokenizer))
    _write_json(directory / "preprocessor_config.json", preprocessor_config(spec))
    _write_json(directory / "processor_config.json", processor_config(spec))
    _write_json(directory / "generation_config.json", {"do_sample": False, "eos_token_id": tokenizer.end_of_text_id})
    return tokenizer


def write_adapter(directory: Path | str, spec: CheckpointSpec, adapter: AdapterSpec) -> Path:
    """Writes adapter_config.json and adapter_model.safetensors for the model of `spec`; returns the directory.

    `directory` may be the checkpoint's own (base and adapter in one repository) or another.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    entries = list(_adapter_tensors(spec, adapter))
    modules = sorted({name.split(".lora_")[0].rsplit(".", 1)[1] for name, _ in entries})
    _write_json(directory / "adapter_config.json", adapter_config(adapter, modules))
    _write_safetensors(directory / "adapter_model.safetensors", entries, adapter.dtype, adapter.seed)
    return directory


# --- tensors ---


def model_tensors(spec: CheckpointSpec, n_vocab: int) -> Iterator[Tensor]:
    """Yields every tensor of the model in file order, with a dense MLP and transformers 5 names."""
    drawn = {"mllama": mllama_tensors, "llama4": llama4_tensors}.get(spec.family)
    if drawn is not None:
        yield from (Tensor(name, shape, std, draw) for name, shape, std, draw in drawn(spec, n_vocab))
        return
    yield from _text_tensors(spec, n_vocab)
    yield from _tower_tensors(spec)
    if spec.family in ("llava_next", "llava_onevision"):
        n_in, width = spec.vision_hidden * len(spec.feature_layers), spec.text_hidden
        yield from _linear("model.multi_modal_projector.linear_1", width, n_in, bias=spec.projector_bias)
        yield from _linear("model.multi_modal_projector.linear_2", width, width, bias=spec.projector_bias)
        yield Tensor("model.image_newline", (width,), 1.0)
        return
    for i in range(len(spec.deepstack_layer_map)):
        yield from _projector_tensors(f"model.layerwise_projectors.{i}.", spec)
    for i in range(4):
        yield from _projector_tensors(f"model.spatial_projectors.{i}.", spec)
    yield Tensor("model.image_newline", (spec.text_hidden,), 1.0)


def _linear(name: str, n_out: int, n_in: int, bias: bool = True) -> Iterator[Tensor]:
    yield Tensor(f"{name}.weight", (n_out, n_in), 1.2 / math.sqrt(n_in))
    if bias:
        yield Tensor(f"{name}.bias", (n_out,), 0.3)


def _layer_norm(name: str, width: int) -> Iterator[Tensor]:
    yield Tensor(f"{name}.weight", (width,), draw="norm")
    yield Tensor(f"{name}.bias", (width,), 0.3)


def _text_tensors(spec: CheckpointSpec, n_vocab: int) -> Iterator[Tensor]:
    width, kv_width = spec.text_hidden, spec.text_kv_heads * spec.head_dim
    special = range(spec.n_bpe, n_vocab)  # with smaller values, so that greedy answers do not end at once
    yield Tensor("model.language_model.embed_tokens.weight", (n_vocab, width), spec.embedding_std, quiet_rows=special)
    for i in range(spec.text_layers):
        layer = f"model.language_model.layers.{i}."
        yield Tensor(f"{layer}input_layernorm.weight", (width,), draw="rms")
        for part, n_out, n_in in (
            ("q", width, width),
            ("k", kv_width, width),
            ("v", kv_width, width),
            ("o", width, width),
        ):
            with_bias = spec.text_type == "qwen2" and part != "o"
            yield from _linear(f"{layer}self_attn.{part}_proj", n_out, n_in, bias=with_bias)
        yield Tensor(f"{layer}post_attention_layernorm.weight", (width,), draw="rms")
        yield from _linear(f"{layer}mlp.gate_proj", spec.text_ffn, width, bias=False)
        yield from _linear(f"{layer}mlp.up_proj", spec.text_ffn, width, bias=False)
        yield from _linear(f"{layer}mlp.down_proj", width, spec.text_ffn, bias=False)
    yield Tensor("model.language_model.norm.weight", (width,), draw="rms")
    if not spec.tied:
        yield Tensor("lm_head.weight", (n_vocab, width), spec.embedding_std, quiet_rows=special)


def _tower_tensors(spec: CheckpointSpec) -> Iterator[Tensor]:
    width, ffn, px = spec.vision_hidden, spec.vision_ffn, spec.patch_px
    tower = "model.vision_tower."
    yield Tensor(f"{tower}embeddings.patch_embedding.weight", (width, 3, px, px), 1.2 / math.sqrt(3 * px * px))
    n_positions = (spec.tile_px // px) ** 2
    if spec.tower == "clip":
        n_positions += 1
        yield Tensor(f"{tower}embeddings.class_embedding", (width,), 1.0)
        yield from _layer_norm(f"{tower}pre_layrnorm", width)
    else:
        yield Tensor(f"{tower}embeddings.patch_embedding.bias", (width,), 0.3)
    yield Tensor(f"{tower}embeddings.position_embedding.weight", (n_positions, width), 0.5)
    for i in range(spec.vision_layers):
        layer = f"{tower}encoder.layers.{i}."
        yield from _layer_norm(f"{layer}layer_norm1", width)
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from _linear(f"{layer}self_attn.{part}", width, width)
        yield from _layer_norm(f"{layer}layer_norm2", width)
        yield from _linear(f"{layer}mlp.fc1", ffn, width)
        yield from _linear(f"{layer}mlp.fc2", width, ffn)
    yield from _layer_norm(f"{tower}post_layernorm", width)
    if not spec.vision_head or spec.tower == "clip" or spec.family == "llava_onevision":
        return
    head = f"{tower}head."
    yield Tensor(f"{head}probe", (1, 1, width), 1.0)
    yield Tensor(f"{head}attention.in_proj_weight", (3 * width, width), 1 / math.sqrt(width))
    yield Tensor(f"{head}attention.in_proj_bias", (3 * width,), 0.3)
    yield from _linear(f"{head}attention.out_proj", width, width)
    yield from _layer_norm(f"{head}layernorm", width)
    yield from _linear(f"{head}mlp.fc1", ffn, width)
    yield from _linear(f"{head}mlp.fc2", width, ffn)


def _projector_tensors(prefix: str, spec: CheckpointSpec) -> Iterator[Tensor]:
    width = spec.vision_hidden
    query_side, window_side = (int(side) for side in spec.downsample_rate.split("/"))
    layer = f"{prefix}qformer.encoder.layer.0."
    yield Tensor(f"{prefix}query", (1, query_side**2, width), 0.7)
    yield Tensor(f"{prefix}image_positions", (1, window_side**2, width), 0.7)
    yield from _layer_norm(f"{prefix}norm", width)
    yield from _layer_norm(f"{prefix}qformer.layernorm", width)
    for attention in ("attention", "crossattention"):
        for part in ("query", "key", "value"):
            yield from _linear(f"{layer}{attention}.attention.{part}", width, width)
        yield from _linear(f"{layer}{attention}.output.dense", width, width)
        yield from _layer_norm(f"{layer}{attention}.output.LayerNorm", width)
    yield from _linear(f"{layer}intermediate_query.dense", spec.qformer_ffn, width)
    yield from _linear(f"{layer}output_query.dense", width, spec.qformer_ffn)
    yield from _layer_norm(f"{layer}output_query.LayerNorm", width)
    yield from _linear(f"{prefix}out_linear", spec.text_hidden, width)


# --- file spellings: a stored tensor is one drawn tensor, or several concatenated along the first axis ---

Stored = tuple[str, tuple[Tensor, ...]]


def stored_tensors(spec: CheckpointSpec, n_vocab: int) -> Iterator[Stored]:
    """Yields (name in the file, the tensors it is drawn from) for the spelling and MLP layout of `spec`."""
    gate: Tensor | None = None
    for tensor in model_tensors(spec, n_vocab):
        name = tensor.name
        parts: tuple[Tensor, ...] = (tensor,)
        if spec.text_type == "granitemoehybrid":
            if ".mlp.gate_proj." in name and "language_model" in name:
                gate = tensor
                continue
            if ".mlp.up_proj." in name and gate is not None:
                name, parts, gate = name.replace("mlp.up_proj", "shared_mlp.input_linear"), (gate, tensor), None
            elif ".mlp.down_proj." in name:
                name = name.replace("mlp.down_proj", "shared_mlp.output_linear")
        yield _spelled(name, spec.naming), parts


def _spelled(name: str, naming: str) -> str:
    if naming == "v5":
        return name
    name = name.replace("model.vision_tower.", "model.vision_tower.vision_model.")
    if naming == "v4":
        return name
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    return name.replace("model.language_model.", "model.language_model.model.").removeprefix("model.")


def _adapter_tensors(spec: CheckpointSpec, adapter: AdapterSpec) -> Iterator[Stored]:
    """Yields LoRA pairs for every matrix of every decoder layer, with B large enough for the change to matter."""
    for name, parts in stored_tensors(spec, n_vocab=1):
        if ".layers." not in name or "vision_" in name or ".router." in name or len(parts[0].shape) != 2:
            continue
        module = name.removesuffix(".weight")
        rank = _by_pattern(module, adapter.rank_pattern, adapter.rank)
        alpha = _by_pattern(module, adapter.alpha_pattern, adapter.alpha)
        scale = alpha / (math.sqrt(rank) if adapter.use_rslora else rank)
        n_in = parts[0].shape[1]
        source = parts[0].name
        if adapter.share_gate_up:
            source = source.replace("up_proj", "gate_proj")
        a_std, b_std = 1 / math.sqrt(n_in), 0.7 / (scale * math.sqrt(rank))
        yield f"base_model.model.{module}.lora_A.weight", (Tensor(f"{source}.A", (rank, n_in), a_std),)
        yield (
            f"base_model.model.{module}.lora_B.weight",
            tuple(Tensor(f"{part.name}.B", (part.shape[0], rank), b_std) for part in parts),
        )


def _by_pattern(module: str, pattern: tuple[tuple[str, Any], ...], default: Any) -> Any:
    """Applies PEFT's rule: a key names the end of the module's path."""
    return next((value for key, value in pattern if module == key or module.endswith(f".{key}")), default)


# --- drawing and writing ---


def _draw_chunk(tensor: Tensor, seed: int, i_chunk: int, count: int) -> np.ndarray:
    """Draws `count` float32 values, flat. They depend on the seed and the tensor's name, not on the file layout."""
    rng = np.random.Generator(np.random.SFC64([seed, zlib.crc32(tensor.name.encode()), i_chunk]))
    if tensor.draw == "normal":
        values = rng.standard_normal(count, dtype=np.float32)
        values *= np.float32(tensor.std)
        if tensor.quiet_rows:
            start, cols = i_chunk * CHUNK, tensor.shape[-1]
            first, end = (max(0, row * cols - start) for row in (tensor.quiet_rows.start, tensor.quiet_rows.stop))
            values[first:end] *= np.float32(0.25)
        return values
    if tensor.draw == "gate":  # open gates: a closed gate would hide errors in what passes through it
        return (0.8 + 0.3 * rng.standard_normal(count)).astype(np.float32)
    values = rng.uniform(0.4, 1.6, count).astype(np.float32)
    if tensor.draw == "rms":  # negative signs keep a tied head from repeating the last token
        values *= np.where(rng.random(count) < 1 / 3, -1, 1).astype(np.float32)
    return values


def _write_shards(directory: Path, entries: Iterator[Stored], spec: CheckpointSpec) -> None:
    shards: list[list[Stored]] = [[]]
    size, total = 0, 0
    for name, parts in entries:
        n_bytes = sum(math.prod(part.shape) for part in parts) * _numpy_dtype(spec.dtype).itemsize
        if spec.max_shard_bytes and shards[-1] and size + n_bytes > spec.max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, parts))
        size += n_bytes
        total += n_bytes
    if len(shards) == 1:
        _write_safetensors(directory / "model.safetensors", shards[0], spec.dtype, spec.seed, holes=spec.holes)
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        file_name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        _write_safetensors(directory / file_name, shard, spec.dtype, spec.seed, holes=spec.holes)
        weight_map |= {name: file_name for name, _ in shard}
    _write_json(
        directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )


def _write_safetensors(path: Path, entries: list[Stored], dtype: str, seed: int, *, holes: bool = False) -> None:
    code = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
    np_dtype = _numpy_dtype(dtype)
    header: Json = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, parts in entries:
        shape = parts[0].shape if len(parts) == 1 else (sum(p.shape[0] for p in parts), *parts[0].shape[1:])
        end = offset + math.prod(shape) * np_dtype.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file, ThreadPoolExecutor(os.cpu_count()) as pool:
        file.write(len(text).to_bytes(8, "little") + text)
        if holes:
            file.truncate(file.tell() + offset)
            return
        for chunk in _in_order(pool, _chunk_jobs(entries, np_dtype, seed), ahead=2 * (os.cpu_count() or 1)):
            file.write(chunk.view(np.uint8).data)


def _chunk_jobs(entries: list[Stored], np_dtype: np.dtype, seed: int) -> Iterator[Callable[[], np.ndarray]]:
    def job(tensor: Tensor, i: int, count: int) -> Callable[[], np.ndarray]:
        return lambda: _draw_chunk(tensor, seed, i, count).astype(np_dtype)

    for _, parts in entries:
        for tensor in parts:
            count = math.prod(tensor.shape)
            for i, start in enumerate(range(0, count, CHUNK)):
                yield job(tensor, i, min(CHUNK, count - start))


def _in_order(pool: ThreadPoolExecutor, jobs: Iterator[Callable[[], np.ndarray]], ahead: int) -> Iterator[np.ndarray]:
    """Yields results in the order of the jobs, with at most `ahead` of them in memory."""
    waiting: list[Any] = []
    for job in jobs:
        waiting.append(pool.submit(job))
        if len(waiting) >= ahead:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()


def _numpy_dtype(name: str) -> np.dtype:
    if name == "bfloat16":
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def _write_json(path: Path, content: Json) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="directory to write; made if missing")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text-type", choices=("granite", "granitemoehybrid"), help="text backbone (4.1's or 4.0's)")
    parser.add_argument("--naming", choices=("v5", "v4", "old"), help="how tensors and config fields are spelled")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--holes", action="store_true", help="zeros that take no room on disk instead of weights")
    parser.add_argument("--untied", action="store_true", help="a head of its own instead of the embeddings")
    parser.add_argument("--shard-bytes", type=int, help="largest shard; one file if it all fits")
    parser.add_argument("--adapter-rank", type=int, help="also write a LoRA adapter of this rank into the directory")
    args = parser.parse_args()
    given = {
        "text_type": args.text_type,
        "naming": args.naming,
        "dtype": args.dtype,
        "tied": False if args.untied else None,
        "max_shard_bytes": args.shard_bytes,
        "holes": args.holes or None,
    }
    changes = {field: value for field, value in given.items() if value is not None}
    spec = replace(PRESETS[args.preset], seed=args.seed, **changes)
    write_checkpoint(args.out, spec)
    if args.adapter_rank:
        write_adapter(
            args.out, spec, AdapterSpec(rank=args.adapter_rank, alpha=float(args.adapter_rank), dtype=spec.dtype)
        )
    n_bytes = sum(path.stat().st_size for path in args.out.glob("*.safetensors"))
    print(f"{args.out}: {args.preset}, {n_bytes / 1e9:.3f} GB of random weights, seed {args.seed}")


if __name__ == "__main__":
    main()
