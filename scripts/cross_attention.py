"""Measures what cross-attention layers between llama.cpp's layers cost in decoding, as ratios within one run.

    python -m scripts.cross_attention --work build/cross

Creates a text file and a vision file with random weights (1.4 GB with the sizes of Llama 3.2 Vision 11B, 8
self-attention and 2 cross-attention layers) if they are missing. Then decodes tokens with the same weights in four
ways, in turn, each after 64 tokens of context:

    plain      no hook
    asked      a hook that wants nothing, as for texts without an image
    hooked     rows are read and written back at both places, unchanged
    attending  the cross-attention layers are computed

Prints milliseconds, the medians of the ratios to 'plain' of the same turn (a shared machine's memory is faster in one
second than in the next), and the cost of a cross-attention layer in self-attention layers. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from granite4v import gguf_keys as keys
from granite4v.families.base import CrossAttentionConfig
from granite4v.ggml.backend import Backend
from granite4v.ggml.compiled.between_layers import InPlace
from granite4v.ggml.compiled.nodes import NodeKernels
from granite4v.ggml.gguf_file import GgufFile
from granite4v.ggml.graph import Graph
from granite4v.ggml.types import block_size, row_bytes
from granite4v.runtime.engine.cross_attention import layers_by_place
from granite4v.runtime.engine.cross_layers import CrossLayers
from granite4v.runtime.llama.context import BatchRows, LlamaContext, node_callback
from granite4v.runtime.llama.layer_hook import LayerHook
from granite4v.runtime.llama.placement import choose_placement
from granite4v.runtime.llama.weight_copies import open_model

N_VOCAB, N_BEFORE = 512, 64
BLOCK = {"Q4_0": 2, "Q8_0": 2}  # bytes of a block's scale, which comes first


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where the files are, or are made")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--ffn", type=int, default=14336)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--self-layers", type=int, default=8)
    parser.add_argument("--cross-layers", type=int, nargs="+", default=[3, 8], help="among all decoder layers")
    parser.add_argument("--keys", type=int, default=6404, help="positions of the image: four tiles of 560 px")
    parser.add_argument("--type", default="Q4_0", choices=sorted(BLOCK))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=8, help="decoded in each way and round")
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    name = f"{options.type}-{options.width}-{options.self_layers}-{'-'.join(map(str, options.cross_layers))}"
    text, vision = options.work / f"text-{name}.gguf", options.work / f"cross-{name}.gguf"
    if not (text.exists() and vision.exists()):
        write_files(text, vision, options)
    report(measure(text, vision, options), options)
    return 0


# --- files ---


def config_of(options: argparse.Namespace) -> CrossAttentionConfig:
    return CrossAttentionConfig(
        layers=tuple(options.cross_layers),
        hidden_size=options.width,
        intermediate_size=options.ffn,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        head_dim=options.width // options.heads,
        rms_norm_eps=1e-5,
    )


def write_files(text: Path, vision: Path, options: argparse.Namespace) -> None:
    """Writes a llama without a tokenizer, and cross-attention layers, both with small random weights."""
    width, kv = options.width, options.kv_heads * options.width // options.heads
    shapes = {
        "attn_q.weight": (width, width),
        "attn_k.weight": (kv, width),
        "attn_v.weight": (kv, width),
        "attn_output.weight": (width, width),
        "ffn_gate.weight": (options.ffn, width),
        "ffn_up.weight": (options.ffn, width),
        "ffn_down.weight": (width, options.ffn),
    }
    norms = ("attn_norm.weight", "ffn_norm.weight")
    matrices = Matrices(options.type, max(n_out * n_in for n_out, n_in in shapes.values()))
    writer = gguf.GGUFWriter(text, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(width)
    writer.add_block_count(options.self_layers)
    writer.add_feed_forward_length(options.ffn)
    writer.add_head_count(options.heads)
    writer.add_head_count_kv(options.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(N_VOCAB)
    writer.add_tokenizer_model("none")
    for name in (keys.TOKEN_EMBD, keys.OUTPUT):
        matrices.add(writer, name, (N_VOCAB, width))
    writer.add_tensor(keys.OUTPUT_NORM, np.ones(width, np.float32))
    for i in range(options.self_layers):
        for part, shape in shapes.items():
            matrices.add(writer, f"blk.{i}.{part}", shape)
        for part in norms:
            writer.add_tensor(f"blk.{i}.{part}", np.ones(width, np.float32))
    finish(writer)
    writer = gguf.GGUFWriter(vision, keys.ARCH_CLIP)
    for i in options.cross_layers:
        for part, shape in shapes.items():
            matrices.add(writer, keys.CROSS_BLOCK.format(i=i, part=part), shape)
        ones = dict.fromkeys(norms, width) | dict.fromkeys(
            ("attn_q_norm.weight", "attn_k_norm.weight"), width // options.heads
        )
        for part, n in {**ones, **dict.fromkeys(keys.GATES, 1)}.items():
            writer.add_tensor(keys.CROSS_BLOCK.format(i=i, part=part), np.ones(n, np.float32))
    finish(writer)


class Matrices:
    """Random weights of one type. Every matrix is a prefix of the same random blocks."""

    def __init__(self, kind: str, n_weights: int) -> None:
        self._kind = gguf.GGMLQuantizationType[kind]
        self._name, n_blocks = kind, n_weights // block_size(kind)
        self._blocks = np.random.default_rng(1).integers(
            0, 256, (n_blocks, row_bytes(kind, block_size(kind))), np.uint8
        )
        self._blocks[:, : BLOCK[kind]] = np.array([0.004 if kind == "Q4_0" else 2e-4], np.float16).view(np.uint8)

    def add(self, writer: gguf.GGUFWriter, name: str, shape: tuple[int, int]) -> None:
        n_out, n_in = shape
        data = self._blocks[: n_out * n_in // block_size(self._name)].reshape(n_out, row_bytes(self._name, n_in))
        writer.add_tensor(name, data, raw_dtype=self._kind)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- measuring ---


def measure(text: Path, vision: Path, options: argparse.Namespace) -> dict[str, list[float]]:
    """Returns the seconds of every token in each way; the ways take turns."""
    config, backend = config_of(options), Backend("cpu", options.threads)
    kernels = NodeKernels.available((config.head_dim, options.heads // options.kv_heads), [options.type])
    with GgufFile.open(text) as file:
        placement = choose_placement(file.tensors, backend, compiled=bool(kernels.products))
    with GgufFile.open(vision) as file:
        layers = CrossLayers(file, config, backend, exact=False)
    states = np.random.default_rng(2).standard_normal((options.keys, options.width), np.float32)
    start = time.perf_counter()
    layers.look_at(states)
    print(f"keys and values of {options.keys:,} positions: {time.perf_counter() - start:.2f} s", flush=True)
    places = layers_by_place(config)

    def attend(place: int) -> Callable[[np.ndarray, int], np.ndarray]:
        return lambda rows, n_threads: layers.run(places[place], rows, n_threads)

    same = same_rows(backend, options.width)
    unchanged = LayerHook(
        options.self_layers, {place: lambda rows, _: rows for place in places}, lambda *_: same.in_place("rows", "rows")
    )

    def find_graph(place: int, n_rows: int, n_threads: int) -> InPlace | None:
        return layers.in_place(places[place], n_rows, n_threads, with_mlp=True)

    attending = LayerHook(options.self_layers, {place: attend(place) for place in places}, find_graph)
    idle = LayerHook(options.self_layers, {place: attend(place) for place in places})
    unchanged.is_wanted = attending.is_wanted = True
    ways = {"plain": None, "asked": idle, "hooked": unchanged, "attending": attending}
    model = open_model(text, placement, n_threads=options.threads)
    shared: dict[str, Any] = {"node_callback": node_callback(kernels)}
    contexts = {name: LlamaContext(model, 512, 64, options.threads, hook=hook, **shared) for name, hook in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(options.rounds + 1):  # the first warms up
        order = list(ways)[:: 1 if number % 2 else -1]
        for context in contexts.values():
            context.truncate(0, 0)
            context.decode(BatchRows.of(np.arange(N_BEFORE, dtype=np.int32), 0, 0, output=False))
        for i in range(options.tokens):
            for name in order:
                found = decode(contexts[name], i)
                if number:
                    seconds[name].append(found)
    for context in contexts.values():
        context.close()
    same.close()
    layers.close()
    model.close()
    backend.close()
    return seconds


def same_rows(backend: Backend, width: int) -> Graph:
    """Builds a graph that returns its input row."""
    graph = Graph(backend, 4)
    graph.output("rows", graph.scale(graph.input("rows", "F32", width, 1), 1.0))
    graph.run(rows=np.zeros((1, width), np.float32))
    return graph


def decode(context: LlamaContext, i: int) -> float:
    """Decodes the token after `i` others and returns the seconds it took."""
    start = time.perf_counter()
    context.decode(BatchRows.of(np.array([i], np.int32), N_BEFORE + i, 0, output=True))
    return time.perf_counter() - start


def ratio(values: list[float], to: list[float]) -> float:
    """Returns the median of the ratios of each turn."""
    return statistics.median(a / b for a, b in zip(values, to, strict=True))


def report(seconds: dict[str, list[float]], options: argparse.Namespace) -> None:
    ratios = {name: ratio(values, seconds["plain"]) for name, values in seconds.items()}
    added = [attending - hooked for attending, hooked in zip(seconds["attending"], seconds["hooked"], strict=True)]
    layers = ratio(added, seconds["plain"]) / len(options.cross_layers) * options.self_layers
    found: dict[str, Any] = {
        "ms": {name: round(1e3 * statistics.median(values), 2) for name, values in seconds.items()},
        "ratio": {name: round(value, 3) for name, value in ratios.items()},
        "self_layers_of_a_cross_layer": round(layers, 3),
    }
    for name, value in found["ratio"].items():
        print(f"{name:10} {found['ms'][name]:8.2f} ms a token  {value:.3f}")
    print(json.dumps({"sizes": {key: value for key, value in vars(options).items() if key != "work"}, **found}))


if __name__ == "__main__":
    raise SystemExit(main())
