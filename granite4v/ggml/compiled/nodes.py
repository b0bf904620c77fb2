"""Replaces nodes of llama.cpp's graphs with compiled operations, without changes to llama.cpp.

llama.cpp asks an evaluation callback about every node of a graph before it computes the node. `callback` is one, also
compiled. It turns each node that a compiled operation can compute into ggml's custom operation, in place: it changes
the node's operation number and parameters, and keeps its sources. ggml's threads then call the compiled function.

Parameters that ggml's custom operation would overwrite, such as the scale of attention scores, move behind it. A
replaced node's 64 bytes of parameters (`op_params`), by byte offset:

    0 function, 8 number of threads, 16 user data   struct ggml_custom_op_params
    32 the node's first parameter                   `SCALE_PLACE`
    44 to 63                                        parameters of `rotary`, or shared state of threads (`meeting`)
"""

from __future__ import annotations

import ctypes
import functools
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from granite4v.errors import SpeedWarning
from granite4v.ggml.compiled import attention, products
from granite4v.ggml.compiled import rotary as rotary_embedding
from granite4v.ggml.compiled.attention import CELLS, FEW, FewRowsAttention
from granite4v.ggml.compiled.float_products import FloatProducts
from granite4v.ggml.compiled.meeting import STATE
from granite4v.ggml.compiled.products import KINDS, MOST_FLOAT_ROWS
from granite4v.ggml.compiled.prompt_attention import PromptAttention
from granite4v.ggml.compiled.quantized_products import LEAST_OUTPUTS, QuantizedProducts
from granite4v.ggml.compiled.rotary import Rotary
from granite4v.ggml.compiled.writer import SCALE_PLACE, Writer, compiled, llvm, version
from granite4v.ggml.declarations import ALL_THREADS, TensorStruct
from granite4v.ggml.types import TYPE_IDS, TYPES

# enum ggml_op, include/ggml.h of ggml 0.25.3; a test compares them with the library
OP_MUL_MAT, OP_ROPE, OP_FLASH_ATTN_EXT, OP_CUSTOM = 29, 48, 74, 95
REVISION = 4  # of the kernels' results; increase it with every change that alters a bit of them
BETWEEN_LAYERS = (b"embd", b"l_ou")  # first four bytes of the names of nodes between decoder layers


@dataclass(frozen=True)
class NodeKernels:
    """Which nodes compiled operations compute.

    `attention`: (head size, query heads per KV head), None for no attention. `products`: the types of weights whose
    products are compiled; F16 with a few rows only. `rotary`: RoPE with transformers' angles, for comparing values with
    it.
    """

    attention: tuple[int, int] | None = None
    products: tuple[str, ...] = ()
    rotary: bool = False

    @classmethod
    def available(
        cls, heads: tuple[int, int] | None = None, kinds: Iterable[str] = (), *, rotary: bool = False
    ) -> NodeKernels:
        """Selects the kernels that this machine can compile for a model. `heads`: its head size and query heads per KV
        head, or None to leave attention to ggml. `kinds`: the types of its weights; types without a kernel are ignored.
        `rotary`: whether RoPE is wanted. Warns once if LLVM fails, and then returns no kernels."""
        if llvm() is None:
            return NO_KERNELS
        found = heads if heads is not None and attention.is_available(*heads) else None
        fitting = tuple(sorted({*kinds} & {*KINDS})) if products.is_available() else ()
        kernels = cls(found, fitting, rotary and rotary_embedding.is_available())
        return kernels if not kernels or _is_compiled(kernels) else NO_KERNELS

    def __bool__(self) -> bool:
        return self.is_for_speed or self.rotary

    @property
    def is_for_speed(self) -> bool:
        """Whether any kernel is there for speed, in place of a slower one of ggml: attention or products."""
        return self.attention is not None or bool(self.products)

    @property
    def most_rows(self) -> int | None:
        """The most rows of a decode step that the kernels for a few rows compute, all with the same values as alone;
        None: no limit."""
        return min(FEW - 1, MOST_FLOAT_ROWS) if self.is_for_speed else None

    @property
    def description(self) -> str:
        """What computed values depend on: 'attention, products by LLVM 20.1.8, revision 3'; empty without kernels."""
        has = {"attention": self.attention, "products": self.products, "rotary embedding": self.rotary}
        parts = [name for name, kernel in has.items() if kernel]
        return f"{', '.join(parts)} by LLVM {version()}, revision {REVISION}" if parts else ""

    def to_json(self) -> str:
        return json.dumps([self.attention, self.products, self.rotary])

    @classmethod
    def from_json(cls, text: str) -> NodeKernels:
        heads, kinds, rotary = json.loads(text)
        return cls(heads and (int(heads[0]), int(heads[1])), tuple(map(str, kinds)), bool(rotary))


NO_KERNELS = NodeKernels()


@functools.cache
def callback(kernels: NodeKernels) -> int:
    """Returns the address of the compiled `ggml_backend_sched_eval_callback`, valid until the process ends. Its data is
    NULL, or the data of another callback, which begins with that callback's address (`between_layers.State`) and is
    asked about the nodes `BETWEEN_LAYERS`. The first call on a machine takes some tenths of a second."""
    return int(_compiled(kernels).get_function_address("see"))


def replace(node: Any, kernels: NodeKernels) -> bool:
    """Replaces one node of a graph of our own, as the callback does in llama.cpp's graphs. Returns whether a compiled
    operation computes it now."""
    see = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)(callback(kernels))
    see(ctypes.addressof(node.contents), True, None)
    return bool(node.contents.op == OP_CUSTOM)


@functools.cache
def _is_compiled(kernels: NodeKernels) -> bool:
    try:
        callback(kernels)
    except RuntimeError as error:  # from LLVM: its version has another IR syntax or does not know this CPU
        reason = str(error).strip().splitlines()[0]
        lost, category = "far positions differ more from transformers'", UserWarning
        if kernels.is_for_speed:
            lost, category = "decoding is slower than it could be", SpeedWarning
        message = f"LLVM {version()} cannot compile kernels ({reason:.200}), so {lost}; "
        warnings.warn(f"{message}install another version of llvmlite.", category, stacklevel=2)
        return False
    return True


@functools.cache
def _compiled(kernels: NodeKernels) -> Any:
    # RoPE calls C functions at addresses that are only valid in this process, so its code is not cached
    what = None if kernels.rotary else f"nodes {kernels.to_json()}"
    return compiled(lambda: _Callback(Writer(), kernels).text(), what)


class _Case(NamedTuple):
    """A kind of node that a compiled operation replaces.

    `op`: the node's operation number in ggml. `require`: called with the node and a function; it calls the function
    with each condition that the node must meet. `moved`: byte offset that each parameter the operation reads moves to,
    by its index in ggml's operation (four bytes each). `cleared`: byte offsets of four-byte words to set to zero.
    """

    op: int
    require: Callable[[Any, Callable[[Any], None]], None]
    operation: Any
    moved: Mapping[int, int] = MappingProxyType({0: SCALE_PLACE})
    cleared: Sequence[int] = ()


class _Callback:
    """Writes the callback and the operations that it puts into nodes."""

    def __init__(self, writer: Writer, kernels: NodeKernels) -> None:
        self.w, self.kernels = writer, kernels

    def text(self) -> str:
        """Writes a ggml_backend_sched_eval_callback: bool (struct ggml_tensor * t, bool ask, void * user_data).

        When asked about a node, it restores a product that an earlier call replaced, then applies the first case whose
        conditions the node meets. A node between layers is passed on to the hook, if there is one; any other node is
        not wanted.
        """
        w, cases = self.w, self._cases()
        function = w.begin("see", w.i8, w.bytes, w.i8, w.bytes)
        node, asks, hook = function.args
        b = w.b
        leave, begin = function.append_basic_block(), function.append_basic_block()
        is_asked = b.icmp_unsigned("!=", asks, w.integer(0, w.i8))
        b.cbranch(is_asked, begin, leave)
        b.position_at_end(begin)
        self._restore(node, [case.operation for case in cases if case.op == OP_MUL_MAT])
        for case in cases:
            other = function.append_basic_block()

            def needed(condition: Any, other: Any = other) -> None:
                more = function.append_basic_block()
                b.cbranch(condition, more, other)
                b.position_at_end(more)

            needed(self._equal(w.field(node, "op", kind=w.i32), case.op))
            case.require(node, needed)
            self._replace(node, case)
            b.branch(leave)
            b.position_at_end(other)
        b.branch(leave)
        b.position_at_end(leave)
        alone, chained = function.append_basic_block(), function.append_basic_block()
        is_between, name = w.integer(0, w.i1), w.field(node, "name", kind=w.i32)
        for start in BETWEEN_LAYERS:
            is_between = b.or_(is_between, self._equal(name, int.from_bytes(start, sys.byteorder)))
        has_hook = b.icmp_unsigned("!=", hook, w.ir.Constant(w.bytes, None))
        b.cbranch(b.and_(has_hook, is_between), chained, alone)
        b.position_at_end(alone)
        b.ret(b.zext(b.not_(is_asked), w.i8))  # asked: not wanted; computed: go on
        b.position_at_end(chained)
        other_callback = b.bitcast(w.load(hook, w.integer(0), w.bytes, 8), function.function_type.as_pointer())
        b.ret(b.call(other_callback, [node, asks, hook]))
        return str(w.module)

    def _cases(self) -> list[_Case]:
        w, cases = self.w, []
        if self.kernels.attention is not None:
            for is_prompt, writer in ((False, FewRowsAttention), (True, PromptAttention)):
                require = functools.partial(self._require_attention, is_prompt)
                cases.append(_Case(OP_FLASH_ATTN_EXT, require, writer(w, *self.kernels.attention).write()))
        for kind in self.kernels.products:
            require = functools.partial(self._require_product, kind)
            if kind in products.QUANTIZED:
                cases.append(_Case(OP_MUL_MAT, require, QuantizedProducts(w).write(kind), cleared=STATE))
            else:
                cases.append(_Case(OP_MUL_MAT, require, FloatProducts(w).write()))
        if self.kernels.rotary:
            cases.append(_Case(OP_ROPE, self._require_rotary, Rotary(w).write(), rotary_embedding.MOVED))
        return cases

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
        for i in (1, 2):  # no ALiBi (max_bias), no softcap of the logits
            require(b.fcmp_ordered("==", w.field(node, "op_params", i, w.f32), w.number(0.0)))

    def _require_product(self, kind: str, node: Any, require: Callable[[Any], None]) -> None:
        w, b, equal = self.w, self.w.b, self._equal
        weights, x = (w.field(node, "src", i, w.bytes) for i in range(2))
        require(equal(w.field(weights, "type", kind=w.i32), TYPE_IDS[kind]))
        require(equal(w.field(x, "type", kind=w.i32), TYPE_IDS["F32"]))
        require(equal(w.field(weights, "extra"), 0))  # otherwise a buffer type has repacked them
        require(equal(w.field(node, "op_params", kind=w.i32), 0))  # GGML_PREC_DEFAULT
        require(equal(w.field(weights, "ne", 2), w.field(x, "ne", 2)))
        for tensor in (weights, x):
            require(equal(w.field(tensor, "ne", 3), 1))
        block, n_bytes = TYPES[kind].block, TYPES[kind].nbytes
        n_in = w.field(weights, "ne", 0)
        require(equal(b.srem(n_in, w.integer(products.step(kind))), 0))
        require(equal(w.field(weights, "nb", 0), n_bytes))
        require(equal(w.field(weights, "nb", 1), b.mul(b.sdiv(n_in, w.integer(block)), w.integer(n_bytes))))
        require(equal(w.field(x, "nb", 0), 4))
        require(equal(w.field(node, "nb", 0), 4))
        if kind in products.QUANTIZED:
            require(equal(w.field(x, "ne", 2), 1))
            require(b.icmp_signed(">=", w.field(weights, "ne", 1), w.integer(LEAST_OUTPUTS)))
        else:
            require(b.icmp_signed("<=", w.field(x, "ne", 1), w.integer(MOST_FLOAT_ROWS)))

    def _require_rotary(self, node: Any, require: Callable[[Any], None]) -> None:
        """Requires plain RoPE on float32. ggml has already checked that positions are int32, frequency factors float32
        and the number of rotated dimensions even."""
        w, b, equal = self.w, self.w.b, self._equal

        def parameter(slot: int, kind: Any) -> Any:
            return w.field(node, "op_params", slot, kind)

        for tensor in (node, w.field(node, "src", 0, w.bytes)):
            require(equal(w.field(tensor, "type", kind=w.i32), TYPE_IDS["F32"]))
            require(equal(w.field(tensor, "nb", 0), 4))
        mode = parameter(rotary_embedding.MODE, w.i32)
        require(b.or_(equal(mode, rotary_embedding.NEIGHBOURS), equal(mode, rotary_embedding.HALVES)))
        n_dims = parameter(rotary_embedding.N_DIMS, w.i32)
        require(b.icmp_signed("<=", n_dims, w.integer(rotary_embedding.MAX_NUMBERS, w.i32)))
        for slot, plain in ((rotary_embedding.EXTENSION, 0.0), (rotary_embedding.MAGNITUDE, 1.0)):  # YaRN's
            require(b.fcmp_ordered("==", parameter(slot, w.f32), w.number(plain)))

    def _restore(self, node: Any, operations: Sequence[Any]) -> None:
        """Turns a product that an earlier call replaced back into ggml's matrix product. llama.cpp reuses graphs, and
        its weights may be in another form by now."""
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

    def _replace(self, node: Any, case: _Case) -> None:
        w = self.w
        parameters = TensorStruct.op_params.offset
        for slot, place in case.moved.items():
            w.store(w.field(node, "op_params", slot, w.i32), node, w.integer(parameters + place))
        for place in case.cleared:
            w.store(w.integer(0, w.i32), node, w.integer(parameters + place))
        w.store(w.b.ptrtoint(case.operation, w.i64), node, w.integer(parameters))
        w.store(w.integer(ALL_THREADS, w.i32), node, w.integer(parameters + 8))
        w.store(w.integer(0), node, w.integer(parameters + 16))
        w.store(w.integer(OP_CUSTOM, w.i32), node, w.integer(TensorStruct.op.offset))
