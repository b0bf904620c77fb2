"""Builds and runs one ggml graph. Model code writes tensor algebra; shapes are checked before ggml sees them.

Shapes in square brackets are in ggml order, fastest axis first: `[dim, tokens, tiles]`. ggml aborts the process on a
bad shape, so the methods check first and raise ShapeError with the shapes.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from granite4v.errors import DeviceError
from granite4v.ggml.backend import Arena, Backend, get_data, release_pages, set_data
from granite4v.ggml.compiled.between_layers import InPlace
from granite4v.ggml.declarations import ALL_THREADS, TensorP
from granite4v.ggml.graph_parts import MAX_PARTS, graph_parts
from granite4v.ggml.library import lib
from granite4v.ggml.types import TYPE_IDS, type_name

Progress = Callable[[int, int], None]


class ShapeError(ValueError):
    """Raised for tensors whose shapes do not fit an operation. Shapes come from files: a damaged one can cause it."""


class Tensor:
    """A graph or weight tensor: ggml's pointer, with its shape, strides and type."""

    __slots__ = ("ptr",)

    def __init__(self, ptr: Any) -> None:
        self.ptr = ptr

    @property
    def ne(self) -> tuple[int, int, int, int]:
        n = self.ptr.contents.ne
        return (n[0], n[1], n[2], n[3])

    @property
    def nb(self) -> tuple[int, int, int, int]:
        """Strides in bytes."""
        n = self.ptr.contents.nb
        return (n[0], n[1], n[2], n[3])

    @property
    def type_name(self) -> str:
        return type_name(self.ptr.contents.type)

    @property
    def is_contiguous(self) -> bool:
        ne, nb = self.ne, self.nb
        dense = lib().ggml_row_size(self.ptr.contents.type, ne[0])
        for d in (1, 2, 3):
            if ne[d] > 1 and nb[d] != dense:
                return False
            dense *= ne[d]
        return bool(nb[0] == lib().ggml_type_size(self.ptr.contents.type))

    def __repr__(self) -> str:
        return f"{self.type_name}{list(self.ne)}"


class Graph:
    """One ggml graph. Its methods add operations; `run` computes it and returns the outputs.

    A graph is built once for an input shape, then run for every batch of tiles of that shape. The first `run`
    allocates the memory for intermediate results.
    """

    def __init__(self, backend: Backend, max_nodes: int) -> None:
        self.backend = backend
        self._arena = Arena(max_nodes, graph_size=max_nodes)
        self._ctx = self._arena.context
        self._graph = lib().ggml_new_graph_custom(self._ctx, max_nodes, False)
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}
        self._allocator: Any = None
        self._padded: dict[tuple[int, ...], tuple[Arena, Tensor]] = {}
        self._arenas: list[Arena] = []
        self._steps: list[Callable[[], None]] = []
        self._external: dict[int, Callable[[], None]] = {}  # node address -> the call that computes it outside ggml
        self._packed: dict[tuple[Any, ...], Tensor] = {}

    # --- inputs and outputs ---

    def input(self, name: str, kind: str, *ne: int) -> Tensor:
        """Adds an input that `run` fills from the array of the same name."""
        tensor = Tensor(self._arena.tensor(kind, *ne, name=name))
        lib().ggml_set_input(tensor.ptr)
        self._inputs[name] = tensor
        return tensor

    def output(self, name: str, x: Tensor) -> Tensor:
        """Marks `x` (float32) as an output, which `run` returns under `name`."""
        lib().ggml_set_name(x.ptr, name.encode()[:63])
        lib().ggml_set_output(x.ptr)
        lib().ggml_build_forward_expand(self._graph, x.ptr)
        self._outputs[name] = x
        return x

    def expand(self, x: Tensor) -> Tensor:
        """Fixes the order of computation: `x` and what it needs are computed before nodes that are expanded later."""
        lib().ggml_build_forward_expand(self._graph, x.ptr)
        return x

    # --- shape ---

    def reshape(self, x: Tensor, *ne: int) -> Tensor:
        sizes = (*ne, *(1,) * (4 - len(ne)))
        if math.prod(sizes) != math.prod(x.ne) or not x.is_contiguous:
            raise ShapeError(f"cannot reshape {x!r} (contiguous: {x.is_contiguous}) to {list(ne)}")
        return Tensor(lib().ggml_reshape_4d(self._ctx, x.ptr, *sizes))

    def permute(self, x: Tensor, a0: int, a1: int, a2: int, a3: int) -> Tensor:
        """Axis i of `x` becomes axis a_i of the result (a view)."""
        if sorted((a0, a1, a2, a3)) != [0, 1, 2, 3]:
            raise ShapeError(f"permute needs each axis once, got {(a0, a1, a2, a3)}")
        return Tensor(lib().ggml_permute(self._ctx, x.ptr, a0, a1, a2, a3))

    def cont(self, x: Tensor) -> Tensor:
        return Tensor(lib().ggml_cont(self._ctx, x.ptr))

    def view(self, x: Tensor, ne: tuple[int, ...], nb: tuple[int, ...], offset: int) -> Tensor:
        """A view of `x`: sizes `ne`, byte strides `nb` of axes 1 to 3, and a byte offset. Missing strides are dense."""
        sizes = (*ne, *(1,) * (4 - len(ne)))
        strides = [*nb]
        while len(strides) < 3:
            strides.append((strides[-1] if strides else sizes[0] * x.nb[0]) * sizes[len(strides)])
        end = offset + x.nb[0] * sizes[0] + sum((n - 1) * s for n, s in zip(sizes[1:], strides, strict=True))
        if end > lib().ggml_nbytes(x.ptr):
            raise ShapeError(f"view {list(ne)} strides {strides} offset {offset} ends at byte {end}, outside {x!r}")
        return Tensor(lib().ggml_view_4d(self._ctx, x.ptr, *sizes, *strides, offset))

    def rows(self, x: Tensor, index: Tensor) -> Tensor:
        """Gathers rows of `x` `[dim, rows, b]` by I32 `index` `[n, b]`: `[dim, n, b]`."""
        if index.type_name != "I32" or index.ne[1] != x.ne[2] or index.ne[2] != x.ne[3]:
            raise ShapeError(f"cannot pick rows of {x!r} by {index!r}")
        return Tensor(lib().ggml_get_rows(self._ctx, x.ptr, index.ptr))

    def concat(self, a: Tensor, b: Tensor, axis: int) -> Tensor:
        fits = all(n == m for d, (n, m) in enumerate(zip(a.ne, b.ne, strict=True)) if d != axis)
        if not fits or a.type_name != b.type_name:
            raise ShapeError(f"cannot join {a!r} and {b!r} along axis {axis}")
        return Tensor(lib().ggml_concat(self._ctx, a.ptr, b.ptr, axis))

    def repeat(self, x: Tensor, *ne: int) -> Tensor:
        """Repeats `x` along each axis to sizes `ne`, which must be multiples of its own."""
        sizes = (*ne, *(1,) * (4 - len(ne)))
        if any(n % m for n, m in zip(sizes, x.ne, strict=True)):
            raise ShapeError(f"cannot repeat {x!r} to {list(ne)}")
        return Tensor(lib().ggml_repeat_4d(self._ctx, x.ptr, *sizes))

    def join(self, parts: list[Tensor], axis: int) -> Tensor:
        """Concatenates tensors along an axis; pairwise, so that each byte is copied log2(n) times instead of n."""
        while len(parts) > 1:
            pairs = [parts[i : i + 2] for i in range(0, len(parts), 2)]
            parts = [self.concat(pair[0], pair[1], axis) if len(pair) == 2 else pair[0] for pair in pairs]
        return parts[0]

    def pad(self, x: Tensor, n: int) -> Tensor:
        """Pads axis 0 of `x` with zeros at its end to size `n`; returns `x` itself if it has that size.

        Use the result for one product only: another `pad` to the same sizes overwrites it. ggml_pad tests every value
        and takes 25 times as long as this copy into a buffer that is already zero.
        """
        if n < x.ne[0] or x.type_name != "F32" or x.nb[0] != 4:
            raise ShapeError(f"cannot pad {x!r} to {n} values")
        if n == x.ne[0]:
            return x
        if not self.backend.is_cpu:  # a GPU may run operations concurrently, so they cannot share a buffer
            return Tensor(lib().ggml_pad(self._ctx, x.ptr, n - x.ne[0], 0, 0, 0))
        rows = self._zeros(n, *x.ne[1:])
        copied = lib().ggml_cpy(self._ctx, x.ptr, self.view(rows, x.ne, rows.nb[1:], 0).ptr)
        return Tensor(lib().ggml_view_4d(self._ctx, copied, *rows.ne, *rows.nb[1:], 0))  # `rows`, after the copy

    def _zeros(self, *ne: int) -> Tensor:
        """Returns a zero-initialized tensor with its own memory; one per shape, shared by all calls of that shape."""
        if ne not in self._padded:
            arena = Arena(1)
            tensor = arena.tensor("F32", *ne)
            arena.allocate(self.backend.buffer_type, weights=False)
            set_data(tensor, np.zeros(tuple(reversed(ne)), np.float32))
            self._padded[ne] = arena, Tensor(tensor)
        return self._padded[ne][1]

    def cast(self, x: Tensor, kind: str) -> Tensor:
        return Tensor(lib().ggml_cast(self._ctx, x.ptr, TYPE_IDS[kind]))

    def copy_(self, target: Tensor, x: Tensor) -> Tensor:
        """Overwrites `target`, such as a view of rows, with `x` of the same sizes. Expand the result before adding
        anything that reads the viewed tensor: the graph does not know of that dependency."""
        if target.ne != x.ne:
            raise ShapeError(f"cannot copy {x!r} to {target!r}")
        return Tensor(lib().ggml_cpy(self._ctx, x.ptr, target.ptr))

    # --- arithmetic; methods whose names end in _ overwrite their first argument ---

    def matmul(self, weight: Tensor, x: Tensor) -> Tensor:
        """`weight` `[k, m, ...]`, `x` `[k, n, ...]`: `[m, n, ...]` = x . weight^T, float32."""
        w, v = weight.ne, x.ne
        if w[0] != v[0] or v[2] % w[2] or v[3] % w[3] or weight.nb[0] > weight.nb[1]:
            raise ShapeError(f"cannot multiply {weight!r} with {x!r}")
        return Tensor(lib().ggml_mul_mat(self._ctx, weight.ptr, x.ptr))

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        self._check_broadcast(a, b)
        return Tensor(lib().ggml_add(self._ctx, a.ptr, b.ptr))

    def add_(self, a: Tensor, b: Tensor) -> Tensor:
        self._check_broadcast(a, b)
        return Tensor(lib().ggml_add_inplace(self._ctx, a.ptr, b.ptr))

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        self._check_broadcast(a, b)
        return Tensor(lib().ggml_mul(self._ctx, a.ptr, b.ptr))

    def mul_(self, a: Tensor, b: Tensor) -> Tensor:
        self._check_broadcast(a, b)
        return Tensor(lib().ggml_mul_inplace(self._ctx, a.ptr, b.ptr))

    def div_(self, a: Tensor, b: Tensor) -> Tensor:
        self._check_broadcast(a, b)
        return Tensor(lib().ggml_div_inplace(self._ctx, a.ptr, b.ptr))

    def square(self, x: Tensor) -> Tensor:
        return Tensor(lib().ggml_sqr(self._ctx, x.ptr))

    def scale_(self, x: Tensor, factor: float, bias: float = 0.0) -> Tensor:
        if bias == 0.0:
            return Tensor(lib().ggml_scale_inplace(self._ctx, x.ptr, factor))
        return Tensor(lib().ggml_scale_bias_inplace(self._ctx, x.ptr, factor, bias))

    def scale(self, x: Tensor, factor: float) -> Tensor:
        return Tensor(lib().ggml_scale(self._ctx, x.ptr, factor))

    def normalize(self, x: Tensor, eps: float) -> Tensor:
        """LayerNorm over axis 0, without weight and bias."""
        return Tensor(lib().ggml_norm(self._ctx, x.ptr, eps))

    def rms_normalize(self, x: Tensor, eps: float) -> Tensor:
        """RMSNorm over axis 0, without weight."""
        return Tensor(lib().ggml_rms_norm(self._ctx, x.ptr, eps))

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up, for two tensors of the same sizes."""
        if gate.ne != up.ne:
            raise ShapeError(f"cannot gate {up!r} with {gate!r}")
        return Tensor(lib().ggml_swiglu_split(self._ctx, gate.ptr, up.ptr))

    def softmax_(self, x: Tensor, mask: Tensor, scale: float) -> Tensor:
        """softmax(x * scale + mask) over axis 0. `mask` `[n, rows]`, contiguous, has at least as many rows as `x`."""
        if mask.ne[0] != x.ne[0] or mask.ne[1] < x.ne[1] or not (x.is_contiguous and mask.is_contiguous):
            raise ShapeError(f"cannot mask {x!r} by {mask!r}")
        return Tensor(lib().ggml_soft_max_ext_inplace(self._ctx, x.ptr, mask.ptr, scale, 0.0))

    def rotate_(self, x: Tensor, positions: Tensor, theta: float) -> Tensor:
        """RoPE: rotates pair (2j, 2j+1) of `x` `[dim, heads, n, b]` by positions `[n]` (I32) * theta^(-2j/dim)."""
        dim, places = x.ne[0], positions.ptr
        if dim % 2 or positions.type_name != "I32" or positions.ne != (x.ne[2], 1, 1, 1):
            raise ShapeError(f"cannot turn {x!r} by {positions!r}")
        return Tensor(lib().ggml_rope_ext_inplace(self._ctx, x.ptr, places, None, dim, 0, 0, theta, 1, 0, 1, 0, 0))

    def unary_(self, kind: str, x: Tensor) -> Tensor:
        """Applies the activation `kind`: 'gelu_erf' or 'silu'."""
        return Tensor(getattr(lib(), f"ggml_{kind}_inplace")(self._ctx, x.ptr))

    def flash_attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q `[head_dim, n, heads, b]`, k and v `[head_dim, m, heads, b]`: `[head_dim, heads, n, b]`."""
        if q.ne[0] != k.ne[0] or k.ne[1] != v.ne[1] or q.ne[2] % k.ne[2] or q.ne[3] != k.ne[3]:
            raise ShapeError(f"attention does not fit: q {q!r}, k {k!r}, v {v!r}")
        return Tensor(lib().ggml_flash_attn_ext(self._ctx, q.ptr, k.ptr, v.ptr, None, scale, 0.0, 0.0))

    @staticmethod
    def _check_broadcast(a: Tensor, b: Tensor) -> None:
        if any(n % m for n, m in zip(a.ne, b.ne, strict=True)):
            raise ShapeError(f"cannot broadcast {b!r} over {a!r}")

    # --- oneDNN operations, run between ggml's; CPU only ---

    def product(
        self,
        weight: Tensor,
        x: Tensor,
        bias: Tensor | None,
        *,
        arithmetic: str,
        activation: str | None = None,
        kind: str = "F32",
    ) -> Tensor:
        """activation(x . weight^T + bias) of `weight` `[k, m]` (F32 or BF16) and `x` `[k, n]`: `[m, n]` of type `kind`.

        If the rows of `weight` are longer than those of `x`, the excess values are ignored.

        `arithmetic`: 'F32' or 'BF16', the type that both factors are rounded to; sums are float32. `activation`: one of
        `onednn.ACTIVATIONS`.
        """
        n_in, n_out, rows = x.ne[0], weight.ne[1], x.ne[1] * x.ne[2] * x.ne[3]
        fits = n_in <= weight.ne[0] and (bias is None or bias.ne[0] == n_out)
        if not (fits and x.is_contiguous and weight.is_contiguous):
            raise ShapeError(f"cannot multiply {weight!r} with {x!r} and add {bias!r}")
        x = x if x.type_name == arithmetic else self.cast(x, arithmetic)
        made = self.backend.onednn.product(
            (rows, n_in, n_out), arithmetic, weight.type_name, weight.ne[0], kind, bias is not None, activation
        )
        key = (ctypes.addressof(weight.ptr.contents), rows, n_in, arithmetic)
        packed = self._packed.get(key)
        if packed is None:
            packed = self._external_node("I8", (made.packed_nbytes,), (weight,), made.pack)
            self._packed[key] = packed
        inputs = (x, packed) if bias is None else (x, packed, bias)
        return self._external_node(kind, (n_out, *x.ne[1:]), inputs, made.run)

    def product_attention(self, q: Tensor, k: Tensor, v: Tensor, n_heads: int, arithmetic: str) -> Tensor:
        """Attention of q `[dim, n]` over k and v `[dim, m]`, with product operands in F32 or BF16 (`arithmetic`):
        `[dim, n]` of that type.
        """
        dim, n, m = q.ne[0], q.ne[1], k.ne[1]
        if (
            k.ne != v.ne
            or k.ne[0] != dim
            or dim % n_heads
            or not all(x.is_contiguous and x.ne[2] * x.ne[3] == 1 for x in (q, k, v))
        ):
            raise ShapeError(f"attention does not fit: q {q!r}, k {k!r}, v {v!r}, {n_heads} heads")
        q, k, v = (x if x.type_name == arithmetic else self.cast(x, arithmetic) for x in (q, k, v))
        made = self.backend.onednn.attention(arithmetic, n_heads, dim // n_heads, n, m)
        scratch = self._external_node("I8", (made.scratch_nbytes,), (), lambda _: None)
        return self._external_node(arithmetic, (dim, n), (q, k, v, scratch), made.run)

    def _external_node(
        self, kind: str, ne: tuple[int, ...], inputs: tuple[Tensor, ...], call: Callable[..., None]
    ) -> Tensor:
        """Adds a tensor that `call(*input addresses, result address)` fills, on the thread that calls `run`.

        ggml sees a custom operation, so it plans the memory of the inputs and the result, but never computes it.
        """
        node = self._custom_node(kind, ne, inputs, None, 1, None)
        headers = [x.ptr.contents for x in (*inputs, node)]
        self._external[ctypes.addressof(node.ptr.contents)] = lambda: call(*(header.data for header in headers))
        return node

    def custom(self, function: int, data: int, ne: tuple[int, ...], *inputs: Tensor) -> Tensor:
        """Adds a float32 tensor `ne` that all threads compute with a `ggml_custom_op_t`; the addresses of it and of its
        user data are `function` and `data`."""
        return self._custom_node("F32", ne, inputs, function, ALL_THREADS, data)

    def _custom_node(
        self, kind: str, ne: tuple[int, ...], inputs: tuple[Tensor, ...], function: Any, n_tasks: int, data: Any
    ) -> Tensor:
        sizes = (*ne, *(1,) * (4 - len(ne)))
        sources = (TensorP * max(1, len(inputs)))(*(x.ptr for x in inputs))
        arguments = (TYPE_IDS[kind], *sizes, sources, len(inputs), function, n_tasks, data)
        return Tensor(lib().ggml_custom_4d(self._ctx, *arguments))

    # --- execution ---

    def run(self, progress: Progress | None = None, /, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        """Fills the inputs, computes, and returns each output as a new float32 array (slowest axis first).

        `progress` is called with (parts computed, parts in total). Raises ValueError when `arrays` are not the graph's
        inputs, DeviceError when memory runs out or the device fails, and Aborted.
        """
        if set(arrays) != set(self._inputs):
            raise ValueError(f"the graph takes inputs {sorted(self._inputs)}, got {sorted(arrays)}")
        if self._allocator is None:
            self._allocator = lib().ggml_gallocr_new(self.backend.buffer_type)
        if not lib().ggml_gallocr_alloc_graph(self._allocator, self._graph):
            raise DeviceError(
                f"device '{self.backend.name}' has not enough memory for the graph's intermediate results."
            )
        for name, array in arrays.items():
            set_data(self._inputs[name].ptr, array)
        steps = self._in_steps(small=progress is not None)
        if self._external:
            self.backend.onednn.use_threads()
        every = max(1, len(steps) // MAX_PARTS)
        for number, step in enumerate(steps, 1):
            step()
            if progress and (number % every == 0 or number == len(steps)):
                progress(number, len(steps))
        return {name: get_data(tensor.ptr) for name, tensor in self._outputs.items()}

    def in_place(self, given: str, found: str) -> InPlace | None:
        """Describes how to compute a float32 output from an input of the same size without `run`, while the graph
        exists. None if the graph is not on the CPU or has parts outside ggml, or if the sizes differ."""
        tensors = [named[name].ptr for named, name in ((self._inputs, given), (self._outputs, found))]
        n_bytes = {int(lib().ggml_nbytes(tensor)) for tensor in tensors}
        if not self.backend.is_cpu or self._external or len(n_bytes) != 1:
            return None
        source, target = (int(tensor.contents.data) for tensor in tensors)
        return InPlace(self.backend.open_handle, self._graph, source, target, n_bytes.pop() // 4)

    def _in_steps(self, small: bool) -> list[Callable[[], None]]:
        """Returns the calls that compute the graph: one if possible, several if oneDNN or a progress display comes in.

        The parts compute the same operations in the same order. A callback from ggml would cost more: it takes the GIL
        at every node, and a busy thread can hold that for milliseconds.
        """
        compute = self.backend.compute
        # a GPU is quick, and may fuse nodes that parts would separate
        if not self._external and not (small and self.backend.is_cpu):
            return [functools.partial(compute, self._graph)]
        if not self._steps:
            ggml, nodes = lib(), self.nodes
            for part in graph_parts(nodes, self._external):
                external = self._external.get(ctypes.addressof(part[0].contents))
                if external:
                    self._steps.append(external)
                    continue
                arena = Arena(0, graph_size=len(part))
                self._arenas.append(arena)
                subgraph = ggml.ggml_new_graph_custom(arena.context, len(part), False)
                for node in part:
                    ggml.ggml_graph_add_node(subgraph, node)
                self._steps.append(functools.partial(compute, subgraph))
        return self._steps

    @property
    def nodes(self) -> list[Any]:
        return [lib().ggml_graph_node(self._graph, i) for i in range(lib().ggml_graph_n_nodes(self._graph))]

    def release(self) -> None:
        """Returns the memory of intermediate results to the system; the next run uses it again."""
        tensors = (*self._inputs.values(), *self._outputs.values())
        for buffer in {x.ptr.contents.buffer.value: x.ptr.contents.buffer for x in tensors}.values():
            release_pages(buffer)

    @property
    def nbytes(self) -> int:
        """Size of the buffer for intermediate results in bytes; 0 before the first run."""
        return int(lib().ggml_gallocr_get_buffer_size(self._allocator, 0)) if self._allocator else 0

    def close(self) -> None:
        allocator, self._allocator = getattr(self, "_allocator", None), None
        if allocator:
            lib().ggml_gallocr_free(allocator)
        for arena, _ in getattr(self, "_padded", {}).values():
            arena.close()
        while getattr(self, "_arenas", None):
            self._arenas.pop().close()
        if hasattr(self, "_arena"):
            self._arena.close()
