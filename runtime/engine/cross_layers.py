"""Cross-attention layers of a decoder as ggml graphs: x + gate * attention(x, image), then x + gate * MLP(x).

Keys and values of the image are computed once, for all layers, and stay in a buffer of the device: in half precision,
in eight bits next to quantized weights, packed for the compiled kernel where there is one, or in float32 for comparing
values. Every row of a call sees all of them. There is one graph for each place between llama.cpp's layers and each
number of rows; graphs of a few rows, as in decode steps, are kept.

Arithmetic: transformers 5.24, the `...CrossAttentionDecoderLayer` of the family; RMSNorm of queries and keys per head,
no rotary embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from granite4v import gguf_keys as keys
from granite4v.clip_projector.blocks import linear
from granite4v.clip_projector.weights import FLOATS, Weights
from granite4v.errors import ModelFileError
from granite4v.families.base import CrossAttentionConfig
from granite4v.ggml import autotune
from granite4v.ggml.backend import Arena, Backend, buffer_type_name, set_data, use_large_pages
from granite4v.ggml.compiled import image_attention
from granite4v.ggml.compiled.between_layers import InPlace
from granite4v.ggml.compiled.nodes import NO_KERNELS, NodeKernels, replace
from granite4v.ggml.gguf_file import GgufFile, TensorInfo, n_weights
from granite4v.ggml.graph import Graph, ShapeError, Tensor
from granite4v.ggml.kernels import Kernel
from granite4v.ggml.metadata import AGAIN
from granite4v.ggml.quantize import block_size, quantize_rows
from granite4v.memory import available_bytes, has_large_pages
from granite4v.runtime.llama.library import capture_log
from granite4v.runtime.llama.placement import SPARE_BYTES
from granite4v.runtime.llama.weight_copies import MAX_FEW_ROWS

NODES_PER_LAYER, NODES_PER_PIECE = 48, 12
KEYS_AT_ONCE = 512  # rows of an image's keys and values per graph; bounds the memory of one graph
ROWS_AT_ONCE = 32  # rows whose scores are computed together
# The number of keys is padded to a multiple of this, and the padding is masked: ggml's matrix products with
# half-precision values are twice as fast with a multiple of 64, and compiled ones take eight-bit values by 128.
MULTIPLE = 128
# With thousands of keys, attention weights are about 1e-4. Half precision and the scales of eight-bit blocks represent
# such values inexactly, and a product with them takes up to ten times as long. So the weights are scaled up; a power of
# two changes no bit of a float32 mantissa.
SCALE_OF_WEIGHTS = 4096.0
HALF_MAX = float(np.finfo(np.float16).max)
Product = Callable[[Tensor], Tensor]
_Key = tuple[tuple[int, ...], int, bool]  # layers, number of rows, with or without the MLP
MOST_IN_DOT = 8192  # up to this many values, a sum of squares is computed by one thread
MAX_GRAPHS = 8  # graphs kept at each place, for different numbers of rows


class CrossLayers:
    """The weights of the layers, and the image that is attended to. Not thread-safe."""

    def __init__(
        self,
        file: GgufFile,
        config: CrossAttentionConfig,
        backend: Backend,
        *,
        exact: bool,
        announce: Callable[[], None] | None = None,
    ) -> None:
        """Maps the weights of a vision file, or copies them to buffer types that multiply them faster. `announce` is
        called before kernels are measured for the first time if that takes more than a second. Raises ModelFileError,
        DeviceError, Aborted."""
        self._config, self._backend, self._path = config, backend, file.path
        self._kv_type = kv_type(file, config, exact=exact)
        self._kernels = cross_node_kernels(file, config, backend, exact=exact)
        group = config.num_attention_heads // config.num_key_value_heads
        is_fast = self._kv_type == "Q8_0" and image_attention.is_available(config.head_dim, group)
        self._packs = bool(self._kernels) and is_fast
        self._n = 0  # number of image positions
        capture_log()  # repacking reports every tensor
        infos = _infos(file)
        many, few = ({}, {}) if exact else choose_copies(file, backend, announce)
        self._few = Weights(file, backend, few, infos=infos)
        self._shared = {info.name for info in infos if many.get(info.type_name) == few.get(info.type_name)}
        others = [info for info in infos if info.name not in self._shared]
        self._many = Weights(file, backend, many, infos=others) if others else self._few
        self._arena: Arena | None = None
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._mask: Tensor
        self._graphs: dict[_Key, Graph] = {}

    def look_at(self, states: np.ndarray) -> None:
        """Computes keys and values of an image's states, float32 `(n, hidden_size)`. Raises Aborted, ModelFileError."""
        self._look_away()
        self._finite(states)
        config, n = self._config, len(states)
        n_padded, dim, n_heads = -(-n // MULTIPLE) * MULTIPLE, config.head_dim, config.num_key_value_heads
        arena, self._n = Arena(2 * len(config.layers) + 1), n
        self._arena = arena
        for i in config.layers:
            if self._packs:
                self._keys[i] = Tensor(arena.tensor("I8", 17 * dim, n_padded // 16, n_heads))
                self._values[i] = Tensor(arena.tensor("I8", 34 * dim, n_padded // 32, n_heads))
            else:
                self._keys[i] = Tensor(arena.tensor(self._kv_type, dim, n_padded, n_heads))
                self._values[i] = Tensor(arena.tensor(self._kv_type, n_padded, dim, n_heads))
        group = config.num_attention_heads // n_heads
        self._mask = Tensor(arena.tensor("F32", n_padded, group * ROWS_AT_ONCE))
        arena.allocate(self._backend.buffer_type, weights=False)
        use_large_pages(arena.buffer)
        mask = np.zeros((group * ROWS_AT_ONCE, n_padded), np.float32)
        mask[:, n:] = -np.inf
        set_data(self._mask.ptr, mask)
        for i in config.layers:
            keys_of, values_of = (np.pad(x, ((0, n_padded - n), (0, 0), (0, 0))) for x in self._projected(i, states))
            keys_of, values_of = keys_of.transpose(1, 0, 2), values_of.transpose(1, 0, 2)
            self._check_kept(keys_of, values_of)
            if self._packs:
                set_data(self._keys[i].ptr, image_attention.packed_keys(keys_of))
                set_data(self._values[i].ptr, image_attention.packed_values(values_of))
            else:
                set_data(self._keys[i].ptr, self._stored(keys_of))
                set_data(self._values[i].ptr, self._stored(values_of.transpose(0, 2, 1)))
        self._release()

    def _projected(self, i: int, states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns a layer's keys and values, float32 `(n, heads, head_dim)`."""
        graphs: dict[int, Graph] = {}
        found = []
        try:
            for start in range(0, len(states), KEYS_AT_ONCE):
                part = np.ascontiguousarray(states[start : start + KEYS_AT_ONCE], dtype=np.float32)
                n = len(part)
                if n not in graphs:
                    graphs[n] = self._built(1, 1, lambda graph: self._fill_keys(graph, i, n))  # noqa: B023
                found.append(graphs[n].run(states=part))
        finally:
            for graph in graphs.values():
                graph.close()
        shape = (len(states), self._config.num_key_value_heads, self._config.head_dim)
        keys_of, values_of = (np.concatenate([part[name] for part in found]) for name in ("attn_k", "attn_v"))
        return keys_of.reshape(shape), values_of.reshape(shape)

    def _stored(self, values: np.ndarray) -> np.ndarray:
        """Converts float32 values to bytes of the type of keys and values."""
        rows = np.ascontiguousarray(values).reshape(-1, values.shape[-1])
        return quantize_rows(rows, self._kv_type, self._backend.n_threads)

    def run(self, layers: tuple[int, ...], rows: np.ndarray, n_threads: int, *, with_mlp: bool = True) -> np.ndarray:
        """Runs some consecutive layers for rows float32 `(n, hidden_size)`. Requires `look_at`."""
        self._backend.use_threads(n_threads)
        key = layers, len(rows), with_mlp
        graph = self._graphs.get(key) or self._kept(*key)
        try:
            found = self._finite(graph.run(rows=np.ascontiguousarray(rows, dtype=np.float32))["rows"])
        except BaseException:
            self._graphs.pop(key, None)
            graph.close()
            raise
        if key not in self._graphs:
            graph.close()
            self._release()
        return found.reshape(rows.shape)

    def in_place(self, layers: tuple[int, ...], n: int, n_threads: int, *, with_mlp: bool) -> InPlace | None:
        """Returns what computes `run` for `n` rows without Python, valid until the next call; None if `run` has not
        kept a graph for this number of rows."""
        self._backend.use_threads(n_threads)
        graph = self._graphs.get((layers, n, with_mlp))
        return None if graph is None else graph.in_place("rows", "rows")

    def _kept(self, layers: tuple[int, ...], n: int, with_mlp: bool) -> Graph:
        """Builds a new graph. One of many rows is not kept: its intermediate results take too much memory for each
        place."""
        graph = self._built(len(layers), n, lambda graph: self._fill(graph, layers, n, with_mlp))
        if n <= MAX_FEW_ROWS:
            others = [key for key in self._graphs if key[0] == layers]
            if len(others) == MAX_GRAPHS:
                self._graphs.pop(others[0]).close()
            self._graphs[layers, n, with_mlp] = graph
        return graph

    def _check_kept(self, *arrays: np.ndarray) -> None:
        """Raises ModelFileError for keys or values that their type cannot represent: among eight-bit ones, a NaN would
        become an ordinary number for every row that attends to it."""
        scaled = 127 * HALF_MAX  # eight-bit integers with scales in half precision
        most = {"F32": np.inf, "F16": HALF_MAX}.get(self._kv_type, scaled)
        if not all(np.abs(x).max() < most for x in arrays):
            raise self._damaged()

    def _finite(self, values: np.ndarray) -> np.ndarray:
        """Returns `values` if they are finite. Checked before they enter cells of the decoder, where they would stay,
        or are quantized."""
        flat = values.reshape(-1)
        if flat.size <= MOST_IN_DOT and math.isfinite(flat.dot(flat)):  # half the time of the exact check below
            return values
        if not np.isfinite(flat).all():
            raise self._damaged()
        return values

    def _damaged(self) -> ModelFileError:
        return ModelFileError(
            f"'{self._path}' has layers of cross-attention that give numbers which are not finite, so its weights "
            f"or those of the text file are damaged; {AGAIN}."
        )

    # --- graphs ---

    def _linear(self, graph: Graph, i: int, part: str, n_in: int, n_out: int, n_rows: int) -> Product:
        """Returns a product of a matrix with `n_rows` rows, by the weights that are fastest for this number of rows."""
        name = _name(i, part)
        weights = self._few if n_rows <= MAX_FEW_ROWS or f"{name}.weight" in self._shared else self._many
        return linear(graph, weights, name, n_in, n_out, has_bias=False)

    def _built(self, n_layers: int, n_rows: int, fill: Callable[[Graph], None]) -> Graph:
        n_pieces = -(-n_rows // ROWS_AT_ONCE)
        graph = Graph(self._backend, (NODES_PER_LAYER + NODES_PER_PIECE * n_pieces) * n_layers + 8)
        try:
            fill(graph)
        except BaseException as error:
            graph.close()
            if isinstance(error, ShapeError):
                raise ModelFileError(
                    f"'{self._path}' has tensors that do not fit together: {error}; {AGAIN}."
                ) from None
            raise
        if self._kernels:
            for node in graph.nodes:
                replace(node, self._kernels)
        return graph

    def _fill_keys(self, graph: Graph, i: int, n: int) -> None:
        """Adds a layer's keys and values of `n` states to a graph."""
        config = self._config
        dim, n_heads = config.head_dim, config.num_key_value_heads
        x = graph.input("states", "F32", config.hidden_size, n)
        for part in ("attn_k", "attn_v"):
            found = self._linear(graph, i, part, config.hidden_size, n_heads * dim, KEYS_AT_ONCE)(x)
            if part == "attn_k":
                found = self._normalized(graph, graph.reshape(found, dim, n_heads, n), i, "attn_k_norm")
            graph.output(part, found)

    def _fill(self, graph: Graph, layers: tuple[int, ...], n: int, with_mlp: bool) -> None:
        config = self._config
        width, dim, n_heads = config.hidden_size, config.head_dim, config.num_attention_heads
        x = graph.input("rows", "F32", width, n)
        for i in layers:
            ask = self._linear(graph, i, "attn_q", width, n_heads * dim, n)
            out = self._linear(graph, i, "attn_output", n_heads * dim, width, n)
            q = graph.reshape(ask(self._normalized(graph, x, i, "attn_norm")), dim, n_heads, n)
            mixed, scale = self._attended(graph, i, self._normalized(graph, q, i, "attn_q_norm"))
            gates = [math.tanh(float(self._few.array(_name(i, part), 1)[0])) for part in keys.GATES]
            x = graph.add(x, graph.scale(out(mixed), gates[0] / scale))
            if with_mlp:
                x = graph.add(x, graph.scale(self._mlp(graph, i, x), gates[1]))
        graph.output("rows", x)

    def _attended(self, graph: Graph, i: int, q: Tensor) -> tuple[Tensor, float]:
        """Computes attention of q `[head_dim, heads, n]` over all keys. Returns the result `[heads * head_dim, n]`
        times a scale, and that scale. Heads that share keys are rows of one product, which reads these keys once; flash
        attention would read them for each head."""
        dim, n_heads, n = q.ne[:3]
        n_kv = self._config.num_key_value_heads
        group, parts = n_heads // n_kv, []
        if self._packs:
            attend = image_attention.operation(dim, group)
            return graph.custom(attend, self._n, (dim * n_heads, n), q, self._keys[i], self._values[i]), 1.0
        for start in range(0, n, ROWS_AT_ONCE):
            m = min(ROWS_AT_ONCE, n - start)
            part = graph.view(q, (dim, group, n_kv, m), (q.nb[1], group * q.nb[1], q.nb[2]), start * q.nb[2])
            part = part if m == 1 else graph.cont(graph.permute(part, 0, 1, 3, 2))
            rows = graph.reshape(part, dim, group * m, n_kv)
            weights = graph.softmax_(graph.matmul(self._keys[i], rows), self._mask, 1 / math.sqrt(dim))
            weights = graph.scale_(weights, SCALE_OF_WEIGHTS)
            mixed = graph.reshape(graph.matmul(self._values[i], weights), dim, group, m, n_kv)
            mixed = mixed if m == 1 else graph.cont(graph.permute(mixed, 0, 1, 3, 2))
            parts.append(graph.reshape(mixed, dim * n_heads, m))
        return graph.join(parts, axis=1), SCALE_OF_WEIGHTS

    def _mlp(self, graph: Graph, i: int, x: Tensor) -> Tensor:
        width, wide, n = self._config.hidden_size, self._config.intermediate_size, x.ne[1]
        gate, up = (self._linear(graph, i, part, width, wide, n) for part in ("ffn_gate", "ffn_up"))
        down = self._linear(graph, i, "ffn_down", wide, width, n)
        x = self._normalized(graph, x, i, "ffn_norm")
        return down(graph.swiglu(gate(x), up(x)))

    def _normalized(self, graph: Graph, x: Tensor, i: int, part: str) -> Tensor:
        weight = self._few.vector(f"{_name(i, part)}.weight", x.ne[0])
        return graph.mul(graph.rms_normalize(x, self._config.rms_norm_eps), weight)

    def _release(self) -> None:
        """Releases mapped weights that have a copy for fewer rows; they are read again from the system's file cache."""
        if self._many is not self._few:
            self._many.release()

    # --- closing ---

    def _look_away(self) -> None:
        while self._graphs:
            self._graphs.popitem()[1].close()
        arena, self._arena = self._arena, None
        if arena is not None:
            arena.close()

    def close(self) -> None:
        self._look_away()
        self._few.close()
        self._many.close()


def cross_kernels(
    file: GgufFile, backend: Backend, announce: Callable[[], None] | None = None
) -> dict[str, tuple[Kernel, Kernel]]:
    """Returns the kernels for a vision file's cross-attention layers: see `text_kernels`."""
    return autotune.text_kernels(backend, n_weights(_matrices(file)), announce, compiled=True)


def choose_copies(
    file: GgufFile, backend: Backend, announce: Callable[[], None] | None = None
) -> tuple[dict[str, Kernel], dict[str, Kernel]]:
    """Chooses which weight types are copied out of the mapped file, as for a text model (`choose_placement`). Returns
    the kernels for products of many rows and of a few; both are one copy, except for types of which many rows gain by
    another form."""
    infos = _matrices(file)
    types = n_weights(infos)
    if not backend.is_cpu or sum(types.values()) < autotune.SMALL:
        return {}, {}
    pairs = cross_kernels(file, backend, announce)
    many = {kind: pair[0] for kind, pair in pairs.items() if pair[0].buffer_type}
    few = {kind: pair[1] for kind, pair in pairs.items() if pair[1].buffer_type}
    plain = Kernel(buffer_type_name(backend.buffer_type), buffer_type=backend.buffer_type)
    copied = dict.fromkeys(types, plain) if has_large_pages() else {}
    available = available_bytes()
    for more in (copied, {kind: plain for kind in copied if kind not in many}, {}):
        for_few = {**more, **few}
        # the copy for few rows exists anyway
        for_many = {kind: for_few[kind] for kind in more if kind not in few} | many
        names = [{each[kind].name for each in (for_many, for_few) if kind in each} for kind in types]
        n_copies = dict(zip(types, map(len, names), strict=True))
        needed = sum(n_copies[info.type_name] * info.nbytes for info in infos)
        if available is None or needed + SPARE_BYTES <= available:
            return for_many, for_few
    return {}, {}


def cross_node_kernels(file: GgufFile, config: CrossAttentionConfig, backend: Backend, *, exact: bool) -> NodeKernels:
    """Returns the compiled kernels: products with weights, and with keys and values."""
    if exact or not backend.is_cpu:
        return NO_KERNELS
    kinds = {info.type_name for info in _matrices(file)}
    return NodeKernels.available(kinds={*kinds, kv_type(file, config, exact=exact)})


def kv_type(file: GgufFile, config: CrossAttentionConfig, *, exact: bool) -> str:
    """The type of an image's keys and values. With quantized weights it is eight bits: in half precision, the keys and
    values of four tiles of 560 px would be a fifth of the bytes that a four-bit layer reads for a row. Attention of one
    row over them takes 1.1 ms in eight bits, 2.7 in half precision, 2.9 in bfloat16 (two cores with AVX-512 BF16)."""
    if exact:
        return "F32"
    is_quantized = all(info.type_name not in FLOATS for info in _matrices(file))
    return "Q8_0" if is_quantized and config.head_dim % block_size("Q8_0") == 0 else "F16"


def _matrices(file: GgufFile) -> list[TensorInfo]:
    return [info for info in _infos(file) if len(info.shape) > 1]


def _infos(file: GgufFile) -> list[TensorInfo]:
    return [info for name, info in file.tensors.items() if name.startswith(keys.CROSS_PREFIX)]


def _name(i: int, part: str) -> str:
    return keys.CROSS_BLOCK.format(i=i, part=part)
