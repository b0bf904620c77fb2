"""Puts compiled operations in the place of nodes of llama.cpp's graphs.

llama.cpp knows nothing of it. `callback` is what it asks about every node of a graph before it computes any; that is
compiled, too, and turns each node that a compiled operation can compute into ggml's custom operation, in place: the
operation's number and its parameters change, its sources stay. The scale of attention's scores, which stands where ggml
now keeps the custom operation's function, moves behind it. ggml's threads call the operation themselves.
"""

from __future__ import annotations

import ctypes
import functools
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from granite4v.errors import SpeedWarning
from granite4v.ggml.compiled import attention, products
from granite4v.ggml.compiled.attention import CELLS, FEW, FewRowsAttention
from granite4v.ggml.compiled.products import KINDS, MOST_ROWS, Products
from granite4v.ggml.compiled.prompt_attention import PromptAttention
from granite4v.ggml.compiled.prompt_products import KIND, PACKED_MARK, PromptProducts
from granite4v.ggml.compiled.writer import SCALE_PLACE, Writer, compiled, llvm, version
from granite4v.ggml.declarations import ALL_THREADS, TensorStruct
from granite4v.ggml.types import TYPE_IDS, TYPES

OP_MUL_MAT, OP_FLASH_ATTN_EXT, OP_CUSTOM = 29, 74, 95  # enum ggml_op, include/ggml.h of ggml 0.25.3; a test asks
REVISION = 2  # of what the kernels compute: whoever changes a bit of it counts on
BETWEEN_LAYERS = (b"embd", b"l_ou")  # how names of nodes begin that stand between decoder layers


@dataclass(frozen=True)
class NodeKernels:
    """What is computed by compiled operations. `attention`: the numbers of a head and the heads that share keys, None:
    none is; `products`: the types of weights that are multiplied with a few rows."""

    attention: tuple[int, int] | None = None
    products: tuple[str, ...] = ()

    @classmethod
    def available(cls, heads: tuple[int, int] | None = None, kinds: Iterable[str] = ()) -> NodeKernels:
        """On this machine, for a model with such heads, or None where attention is to be left alone, and with weights
        of these types, others among them. Gives a SpeedWarning, once, where LLVM fails."""
        if llvm() is None:
            return NO_KERNELS
        found = heads if heads is not None and attention.is_available(*heads) else None
        kernels = cls(found, tuple(sorted({*kinds} & {*KINDS})) if products.is_available() else ())
        return kernels if not kernels or _is_compiled(kernels) else NO_KERNELS

    def __bool__(self) -> bool:
        return self.attention is not None or bool(self.products)

    @property
    def most_rows(self) -> int | None:
        """Of a step whose rows all have the values of these kernels; None: of any."""
        return min(FEW - 1, MOST_ROWS) if self else None

    @property
    def description(self) -> str:
        """What decides values: 'attention, products by LLVM 20.1.8, revision 2'; empty where nothing is compiled."""
        parts = [*(["attention"] if self.attention else []), *(["products"] if self.products else [])]
        return f"{', '.join(parts)} by LLVM {version()}, revision {REVISION}" if parts else ""

    def to_json(self) -> str:
        return json.dumps([self.attention, self.products])

    @classmethod
    def from_json(cls, text: str) -> NodeKernels:
        heads, kinds = json.loads(text)
        return cls(heads and (int(heads[0]), int(heads[1])), tuple(map(str, kinds)))


NO_KERNELS = NodeKernels()


@functools.cache
def callback(kernels: NodeKernels) -> int:
    """The address of the compiled `ggml_backend_sched_eval_callback`. Its data: nothing, or that of another such
    callback, which begins with its address and is asked about nodes `BETWEEN_LAYERS` (`between_layers.State`). It lives
    as long as the process. Takes some tenths of a second the first time."""
    return int(_compiled(kernels).get_function_address("see"))


def replace(node: Any, kernels: NodeKernels) -> bool:
    """Does with one node of a graph what llama.cpp's are done with. Whether a compiled operation computes it now."""
    see = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)(callback(kernels))
    see(ctypes.addressof(node.contents), True, None)
    return bool(node.contents.op == OP_CUSTOM)


@functools.cache
def _is_compiled(kernels: NodeKernels) -> bool:
    try:
        callback(kernels)
    except RuntimeError as error:  # LLVM's, of a version with another language, or without this CPU
        reason = str(error).strip().splitlines()[0]
        message = f"LLVM {version()} cannot compile kernels ({reason:.200}), so decoding is slower than it could be; "
        warnings.warn(f"{message}install another version of llvmlite.", SpeedWarning, stacklevel=2)
        return False
    return True


@functools.cache
def _compiled(kernels: NodeKernels) -> Any:
    return compiled(_Callback(Writer(), kernels).text())


class _Callback:
    """Writes it, and the operations."""

    def __init__(self, writer: Writer, kernels: NodeKernels) -> None:
        self.w, self.kernels = writer, kernels

    def text(self) -> str:
        """bool (*ggml_backend_sched_eval_callback)(struct ggml_tensor * t, bool ask, void * user_data)"""
        w = self.w
        cases: list[tuple[int, Callable[..., None], Any]] = []
        if self.kernels.attention is not None:
            for is_prompt, writer in ((False, FewRowsAttention), (True, PromptAttention)):
                require = functools.partial(self._require_attention, is_prompt)
                cases.append((OP_FLASH_ATTN_EXT, require, writer(w, *self.kernels.attention).write()))
        if KIND in self.kernels.products:
            operation = PromptProducts(w).write()
            cases.append((OP_MUL_MAT, self._require_packed, operation))
        if self.kernels.products:
            products_writer = Products(w)
            for kind in self.kernels.products:
                cases.append((OP_MUL_MAT, functools.partial(self._require_product, kind), products_writer.write(kind)))
        function = w.begin("see", w.i8, w.bytes, w.i8, w.bytes)
        node, asks, data = function.args
        b = w.b
        leave, begin = function.append_basic_block(), function.append_basic_block()
        is_asked = b.icmp_unsigned("!=", asks, w.integer(0, w.i8))
        b.cbranch(is_asked, begin, leave)
        b.position_at_end(begin)
        self._restore(node, [operation for number, _, operation in cases if number == OP_MUL_MAT])
        for number, require_all, operation in cases:
            other = function.append_basic_block()

            def needed(condition: Any, other: Any = other) -> None:
                more = function.append_basic_block()
                b.cbranch(condition, more, other)
                b.position_at_end(more)

            needed(self._equal(w.field(node, "op", kind=w.i32), number))
            require_all(node, needed)
            self._replace(node, operation)
            b.branch(leave)
            b.position_at_end(other)
        b.branch(leave)
        b.position_at_end(leave)
        alone, chained = function.append_basic_block(), function.append_basic_block()
        is_between, name = w.integer(0, w.i1), w.field(node, "name", kind=w.i32)
        for start in BETWEEN_LAYERS:
            is_between = b.or_(is_between, self._equal(name, int.from_bytes(start, sys.byteorder)))
        has_other = b.icmp_unsigned("!=", data, w.ir.Constant(w.bytes, None))
        b.cbranch(b.and_(has_other, is_between), chained, alone)
        b.position_at_end(alone)
        b.ret(b.zext(b.not_(is_asked), w.i8))  # a node that is asked about is not wanted
        b.position_at_end(chained)
        other_callback = b.bitcast(w.load(data, w.integer(0), w.bytes, 8), function.function_type.as_pointer())
        b.ret(b.call(other_callback, [node, asks, data]))
        return str(w.module)

    def _equal(self, value: Any, expected: int | Any) -> Any:
        expected = self.w.integer(expected, value.type) if isinstance(expected, int) else expected
        return self.w.b.icmp_signed("==", value, expected)

    def _require_attention(self, is_prompt: bool, node: Any, require: Callable[[Any], None]) -> None:
        assert self.kernels.attention is not None
        w, b, equal = self.w, self.w.b, self._equal
        head, group = self.kernels.attention
        sources = [w.field(node, "src", i, w.bytes) for i in range(5)]
        none = w.ir.Constant(w.bytes, None)
        require(b.icmp_unsigned("!=", sources[3], none))  # a mask
        require(b.icmp_unsigned("==", sources[4], none))  # and no sinks
        q, k, v, mask = sources[:4]
        for tensor, kind, size in ((q, "F32", 4), (k, "F16", 2), (v, "F16", 2), (mask, "F16", 2)):
            require(equal(w.field(tensor, "type", kind=w.i32), TYPE_IDS[kind]))
            require(equal(w.field(tensor, "nb", 0), size))
        for tensor in (q, k, v):
            require(equal(w.field(tensor, "ne", 0), head))
        require(equal(w.field(q, "ne", 2), b.mul(w.field(k, "ne", 2), w.integer(group))))
        require(equal(w.field(v, "ne", 2), w.field(k, "ne", 2)))
        require(equal(w.field(mask, "ne", 2), 1))
        require(b.icmp_signed(">=" if is_prompt else "<", w.field(q, "ne", 1), w.integer(FEW)))
        require(equal(b.srem(w.field(k, "ne", 1), w.integer(CELLS)), 0))
        for i in (1, 2):  # biases by distance, and a cap of scores
            require(b.fcmp_ordered("==", w.field(node, "op_params", i, w.f32), w.number(0.0)))

    def _require_product(self, kind: str, node: Any, require: Callable[[Any], None]) -> None:
        w, b, equal = self.w, self.w.b, self._equal
        weights, x = (w.field(node, "src", i, w.bytes) for i in range(2))
        require(equal(w.field(weights, "type", kind=w.i32), TYPE_IDS[kind]))
        require(equal(w.field(x, "type", kind=w.i32), TYPE_IDS["F32"]))
        require(equal(w.field(weights, "extra"), 0))  # else a buffer type has rearranged them
        require(equal(w.field(node, "op_params", kind=w.i32), 0))  # GGML_PREC_DEFAULT
        require(equal(w.field(weights, "ne", 2), w.field(x, "ne", 2)))
        for tensor in (weights, x):
            require(equal(w.field(tensor, "ne", 3), 1))
        block, n_bytes = TYPES[kind].block, TYPES[kind].nbytes
        n_in, n_rows = w.field(weights, "ne", 0), w.field(x, "ne", 1)
        require(equal(b.srem(n_in, w.integer(products.step(kind))), 0))
        require(equal(w.field(weights, "nb", 0), n_bytes))
        require(equal(w.field(weights, "nb", 1), b.mul(b.sdiv(n_in, w.integer(block)), w.integer(n_bytes))))
        require(equal(w.field(x, "nb", 0), 4))
        require(equal(w.field(node, "nb", 0), 4))
        require(b.icmp_signed("<=", n_rows, w.integer(MOST_ROWS)))

    def _require_packed(self, node: Any, require: Callable[[Any], None]) -> None:
        """Nothing else: whoever packs weights, sees to it that their products fit."""
        weights = self.w.field(node, "src", 0, self.w.bytes)
        require(self._equal(self.w.field(weights, "extra"), PACKED_MARK))

    def _restore(self, node: Any, operations: Sequence[Any]) -> None:
        """A product of a graph that is used again is what llama.cpp has made it: its weights may be in another form."""
        w, b = self.w, self.w.b
        other = b.function.append_basic_block()
        is_custom = self._equal(w.field(node, "op", kind=w.i32), OP_CUSTOM)
        function = w.field(node, "op_params", kind=w.i64)
        is_ours = w.integer(0, w.i1)
        for operation in operations:
            is_ours = b.or_(is_ours, b.icmp_unsigned("==", function, b.ptrtoint(operation, w.i64)))
        restored = b.function.append_basic_block()
        b.cbranch(b.and_(is_custom, is_ours), restored, other)
        b.position_at_end(restored)
        w.store(w.integer(0), node, w.integer(TensorStruct.op_params.offset))
        w.store(w.integer(OP_MUL_MAT, w.i32), node, w.integer(TensorStruct.op.offset))
        b.branch(other)
        b.position_at_end(other)

    def _replace(self, node: Any, operation: Any) -> None:
        w = self.w
        parameters = TensorStruct.op_params.offset
        w.store(w.field(node, "op_params", 0, w.f32), node, w.integer(parameters + SCALE_PLACE))
        w.store(w.b.ptrtoint(operation, w.i64), node, w.integer(parameters))
        w.store(w.integer(ALL_THREADS, w.i32), node, w.integer(parameters + 8))
        w.store(w.integer(0), node, w.integer(parameters + 16))
        w.store(w.integer(OP_CUSTOM, w.i32), node, w.integer(TensorStruct.op.offset))
