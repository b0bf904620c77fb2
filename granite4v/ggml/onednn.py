"""Matrix products and attention by oneDNN, run between the operations of a ggml graph.

ggml has no fast product in bfloat16 or float32 on CPUs with AVX-512 or AMX, and its attention is slower than its
products; oneDNN is fast at both. It is an optional extra (`pip install 'granite4v[onednn]'`, the package
onednn-cpu-gomp), used where measurements show that it is faster. That build shares the OpenMP threads of ggml (GNU
libgomp), so that waiting threads of one do not occupy cores that the other needs.

The C API is that of oneDNN 3 (`oneapi/dnnl/dnnl.h` and `dnnl_types.h`, v3.2).
"""

from __future__ import annotations

import ctypes as c
import functools
import importlib.metadata
import sys
from collections.abc import Callable
from typing import Any

from granite4v.errors import DeviceError

PACKAGE = "onednn-cpu-gomp"
MAJOR_VERSION = 3

_BF16, _F32 = 2, 3  # dnnl_data_type_t
TYPES = {"BF16": _BF16, "F32": _F32}  # by ggml's names
_ISA_BF16 = 0x80  # the bit of dnnl_cpu_isa_t that AVX-512 BF16 adds; AMX includes it
_CPU_ENGINE, _IN_ORDER = 1, 1  # dnnl_engine_kind_t, dnnl_stream_flags_t
_ANY_LAYOUT = 1  # dnnl_format_tag_t: oneDNN chooses
_WEIGHTS_LAYOUT = 131  # dnnl_query_t
_INFERENCE = 96  # dnnl_prop_kind_t
_SOFTMAX = 0x30000  # dnnl_alg_kind_t
_LINEAR = 0x26  # dnnl_alg_kind_t: alpha * x
# By Hugging Face's names: dnnl_alg_kind_t and its alpha. 'quick_gelu' is oneDNN's swish, x * sigmoid(alpha * x).
ACTIVATIONS = {"gelu_pytorch_tanh": (0x2B, 0.0), "gelu": (0x31, 0.0), "quick_gelu": (0x2C, 1.702)}
_SRC, _DST, _WEIGHTS, _BIAS = 1, 17, 33, 41  # DNNL_ARG_*
SCORES_NBYTES = 6 << 20  # of attention scores computed at a time; 2 to 8 MB measured fastest
_MAX_DIMS = 12  # DNNL_MAX_NDIMS

_Dims = c.c_int64 * _MAX_DIMS


class _Version(c.Structure):
    """dnnl_version_t"""

    _fields_ = (
        ("major", c.c_int),
        ("minor", c.c_int),
        ("patch", c.c_int),
        ("hash", c.c_char_p),
        ("cpu_runtime", c.c_uint),
        ("gpu_runtime", c.c_uint),
    )


class _Argument(c.Structure):
    """dnnl_exec_arg_t"""

    _fields_ = (("arg", c.c_int), ("memory", c.c_void_p))


def find_library() -> str | None:
    """Finds the path of the extra's libdnnl; None if it is not installed, and on systems other than Linux."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = [file.locate() for file in files if file.name == f"libdnnl.so.{MAJOR_VERSION}"]
    return str(paths[0]) if paths else None


@functools.cache
def library() -> Any:
    """Loads libdnnl; None if it is not installed, cannot be loaded, or has another major version."""
    path = find_library()
    if path is None:
        return None
    try:
        # PyDLL keeps the GIL during a call. Most calls take a few milliseconds, and releasing the GIL can cost as much:
        # another thread that waits for it takes it and keeps it that long.
        dnnl = c.PyDLL(path)
        dnnl.dnnl_version.restype = c.POINTER(_Version)
    except (OSError, AttributeError):  # damaged, another library, or a dependency is missing
        return None
    if dnnl.dnnl_version().contents.major != MAJOR_VERSION:
        return None
    dnnl.dnnl_primitive_desc_query_md.restype = c.c_void_p
    dnnl.dnnl_primitive_desc_query_md.argtypes = (c.c_void_p, c.c_int, c.c_int)
    dnnl.dnnl_memory_desc_get_size.restype = c.c_size_t
    dnnl.dnnl_memory_set_data_handle.argtypes = (c.c_void_p, c.c_void_p)
    dnnl.dnnl_primitive_execute.argtypes = (c.c_void_p, c.c_void_p, c.c_int, c.c_void_p)
    return dnnl


def is_installed() -> bool:
    """Whether oneDNN is installed and can be loaded."""
    return library() is not None


def multiplies_bfloat16() -> bool:
    """Whether oneDNN is installed and this CPU has instructions for bfloat16 products (AVX-512 BF16 or AMX)."""
    dnnl = library()
    return dnnl is not None and bool(dnnl.dnnl_get_effective_cpu_isa() & _ISA_BF16)


@functools.cache
def version() -> str:
    """Returns oneDNN's version, such as '3.2.0'; empty if it is not installed."""
    dnnl = library()
    if dnnl is None:
        return ""
    found = dnnl.dnnl_version().contents
    return f"{found.major}.{found.minor}.{found.patch}"


class OneDnn:
    """A oneDNN engine and stream; owns every object that is created with it, until `close`."""

    def __init__(self, n_threads: int) -> None:
        """Raises DeviceError when the extra is not installed."""
        dnnl = library()
        if dnnl is None:
            raise DeviceError("oneDNN is not installed; install it with: pip install 'granite4v[onednn]'")
        self._library = dnnl
        self._n_threads = n_threads
        # looked up through libdnnl, so that it belongs to the OpenMP that libdnnl is linked to
        self._set_threads: Callable[[int], None] = dnnl.omp_set_num_threads
        self._owned: list[tuple[str, Any]] = []
        self._products: dict[tuple[Any, ...], Product] = {}
        self._attentions: dict[tuple[Any, ...], Attention] = {}
        self.use_threads()
        self.engine = self.create("dnnl_engine", _CPU_ENGINE, c.c_size_t(0))
        self.stream = self.create("dnnl_stream", self.engine, _IN_ORDER)

    def use_threads(self) -> None:
        """Sets the number of OpenMP threads. The setting applies to the calling thread only."""
        self._set_threads(self._n_threads)

    def create(self, kind: str, *arguments: Any, by: str = "") -> c.c_void_p:
        """Creates an object of this kind with the function `by` (default `<kind>_create`); it lives until `close`.
        Raises DeviceError when the function fails."""
        handle, function = c.c_void_p(), by or f"{kind}_create"
        self.check(function, getattr(self._library, function)(c.byref(handle), *arguments))
        self._owned.append((f"{kind}_destroy", handle))
        return handle

    @staticmethod
    def check(function: str, status: int) -> None:
        if status:
            raise DeviceError(f"oneDNN's {function} failed with status {status} (dnnl_status_t).")

    def layout(self, type_name: str, shape: tuple[int, ...], strides: tuple[int, ...] | None = None) -> c.c_void_p:
        """Creates a memory descriptor. `strides` are in elements; None lets oneDNN choose the layout."""
        dims, kind = _Dims(*shape), TYPES[type_name]
        if strides is None:
            by = "dnnl_memory_desc_create_with_tag"
            return self.create("dnnl_memory_desc", len(shape), dims, kind, _ANY_LAYOUT, by=by)
        by = "dnnl_memory_desc_create_with_strides"
        return self.create("dnnl_memory_desc", len(shape), dims, kind, _Dims(*strides), by=by)

    def describe(self, operation: str, *arguments: Any) -> c.c_void_p:
        """Creates the primitive descriptor of an operation, such as 'dnnl_matmul'."""
        return self.create("dnnl_primitive_desc", *arguments, by=f"{operation}_primitive_desc_create")

    def attributes(self, kind: int, alpha: float = 0.0) -> c.c_void_p:
        """Creates attributes that make a primitive apply an elementwise operation (dnnl_alg_kind_t) to its result."""
        after = self.create("dnnl_post_ops")
        status = self._library.dnnl_post_ops_append_eltwise(after, kind, c.c_float(alpha), c.c_float(0.0))
        self.check("dnnl_post_ops_append_eltwise", status)
        attributes = self.create("dnnl_primitive_attr")
        self.check(
            "dnnl_primitive_attr_set_post_ops", self._library.dnnl_primitive_attr_set_post_ops(attributes, after)
        )
        return attributes

    def weights_layout(self, primitive_desc: Any) -> tuple[c.c_void_p, int]:
        """Returns the layout that a primitive expects its weights in, owned by the primitive, and its size in bytes."""
        layout = c.c_void_p(self._library.dnnl_primitive_desc_query_md(primitive_desc, _WEIGHTS_LAYOUT, 0))
        return layout, int(self._library.dnnl_memory_desc_get_size(layout))

    def execution(self, desc: Any, layouts: dict[int, Any]) -> Callable[..., None]:
        """Returns a function that runs the described primitive, given the data addresses in the order of `layouts`.
        `layouts`: memory descriptors by argument (DNNL_ARG_*)."""
        set_data, execute = self._library.dnnl_memory_set_data_handle, self._library.dnnl_primitive_execute
        primitive = self.create("dnnl_primitive", desc)
        memories = {arg: self.create("dnnl_memory", layout, self.engine, None) for arg, layout in layouts.items()}
        objects = list(memories.values())
        array = (_Argument * len(objects))(*(_Argument(arg, memory) for arg, memory in memories.items()))

        def run(*addresses: int) -> None:
            for memory, address in zip(objects, addresses, strict=True):
                set_data(memory, address)
            status = execute(primitive, self.stream, len(objects), array)
            if status:
                self.check("dnnl_primitive_execute", status)

        return run

    def product(self, *key: Any) -> Product:
        """Returns the product for these shapes and types, created on first use; `key`: `Product`'s arguments."""
        if key not in self._products:
            self._products[key] = Product(self, *key)
        return self._products[key]

    def attention(self, *key: Any) -> Attention:
        """Returns the attention for these shapes and types, created on first use; `key`: `Attention`'s arguments."""
        if key not in self._attentions:
            self._attentions[key] = Attention(self, *key)
        return self._attentions[key]

    def close(self) -> None:
        self._products.clear()
        self._attentions.clear()
        while self._owned:
            function, handle = self._owned.pop()
            getattr(self._library, function)(handle)


class Product:
    """y = activation(x . W^T + bias) with packed weights.

    `shape`: (rows of x, inputs, outputs). x `(rows, inputs)` and y `(rows, outputs)` are contiguous. The weights
    `(outputs, inputs)` must first be packed into oneDNN's layout (`pack`), which takes about as long as one product.
    With bfloat16 factors, sums are float32.
    """

    def __init__(
        self,
        dnn: OneDnn,
        shape: tuple[int, int, int],
        x_type: str,
        weight_type: str,
        weight_row: int,
        y_type: str,
        has_bias: bool,
        activation: str | None,
    ) -> None:
        """`weight_type`: type of the weights given to `pack`, which converts them to x's type. `weight_row`: number of
        values from the start of one of their rows to the next.
        """
        rows, n_in, n_out = shape
        x = dnn.layout(x_type, (rows, n_in), (n_in, 1))
        y = dnn.layout(y_type, (rows, n_out), (n_out, 1))
        bias = dnn.layout("F32", (1, n_out), (n_out, 1)) if has_bias else None
        anyhow = dnn.layout(x_type, (n_in, n_out))
        attributes = None if activation is None else dnn.attributes(*ACTIVATIONS[activation])
        desc = dnn.describe("dnnl_matmul", dnn.engine, x, anyhow, bias, y, attributes)
        packed, self.packed_nbytes = dnn.weights_layout(desc)
        given = dnn.layout(weight_type, (n_in, n_out), (1, weight_row))
        reorder = dnn.describe("dnnl_reorder", given, dnn.engine, packed, dnn.engine, None)
        self.pack = dnn.execution(reorder, {_SRC: given, _DST: packed})
        """`pack(weights, packed)`; both are addresses."""
        self.run = dnn.execution(desc, {_SRC: x, _WEIGHTS: packed} | ({_BIAS: bias} if has_bias else {}) | {_DST: y})
        """`run(x, packed, [bias,] y)`; all are addresses."""


class Attention:
    """softmax(Q . K^T / sqrt(head_dim)) . V for each head, on rows `(positions, heads * head_dim)` of Q, K and V.

    Scores are float32. With bfloat16 rows, the softmax weights are rounded to bfloat16. A few heads are computed at a
    time, so that their scores stay in the CPU's cache.
    """

    def __init__(self, dnn: OneDnn, kind: str, n_heads: int, head_dim: int, n: int, m: int) -> None:
        """`kind`: 'F32' or 'BF16', the type of the rows. `n`, `m`: number of queries and of keys."""
        self._dnn = dnn
        at_once = max(
            h for h in range(1, n_heads + 1) if n_heads % h == 0 and (h == 1 or 4 * h * n * m <= SCORES_NBYTES)
        )
        row, engine = n_heads * head_dim, dnn.engine
        q = dnn.layout(kind, (at_once, n, head_dim), (head_dim, row, 1))
        k = dnn.layout(kind, (at_once, head_dim, m), (head_dim, 1, row))
        v = dnn.layout(kind, (at_once, m, head_dim), (head_dim, row, 1))
        scores = dnn.layout("F32", (at_once, n, m), (n * m, m, 1))
        shares = dnn.layout(kind, (at_once, n, m), (n * m, m, 1))
        scaled = dnn.attributes(_LINEAR, head_dim**-0.5)
        desc = dnn.describe("dnnl_matmul", engine, q, k, None, scores, scaled)
        self._score = dnn.execution(desc, {_SRC: q, _WEIGHTS: k, _DST: scores})
        desc = dnn.describe("dnnl_softmax_forward", engine, _INFERENCE, _SOFTMAX, scores, shares, 2, None)
        self._softmax = dnn.execution(desc, {_SRC: scores, _DST: shares})
        desc = dnn.describe("dnnl_matmul", engine, shares, v, None, q, None)
        self._mix = dnn.execution(desc, {_SRC: shares, _WEIGHTS: v, _DST: q})
        self._scores_nbytes = 4 * at_once * n * m
        # float32 softmax weights overwrite the scores; bfloat16 ones come after them, at half the size
        self._shares_offset = 0 if kind == "F32" else self._scores_nbytes
        self.scratch_nbytes = self._scores_nbytes * (2 if kind == "F32" else 3) // 2
        step = at_once * head_dim * (4 if kind == "F32" else 2)
        self._offsets = range(0, step * (n_heads // at_once), step)

    def run(self, q: int, k: int, v: int, scratch: int, y: int) -> None:
        """Computes attention. All arguments are addresses; `scratch` has `scratch_nbytes` bytes."""
        shares = scratch + self._shares_offset
        for offset in self._offsets:
            self._score(q + offset, k + offset, scratch)
            self._softmax(scratch, shares)
            self._mix(shares, v + offset, y + offset)
