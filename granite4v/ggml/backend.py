"""ggml devices, and the objects that own native resources on them: a backend, and a context with its buffer.

`Backend` and `Arena` have `close()`, which may be called twice. Computing on a closed backend, or adding a tensor to a
closed arena, raises ValueError.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import sys
from typing import Any

import numpy as np

from granite4v.choices import MAX_THREADS, whole_number
from granite4v.errors import DeviceError
from granite4v.ggml.cpu import default_threads
from granite4v.ggml.declarations import BufferTypeP, DeviceP, InitParams
from granite4v.ggml.library import lib
from granite4v.ggml.onednn import OneDnn
from granite4v.ggml.types import TYPE_IDS

_DEVICE_CPU, _DEVICE_GPU, _DEVICE_IGPU = 0, 1, 2  # enum ggml_backend_dev_type
_USAGE_WEIGHTS = 1  # GGML_BACKEND_BUFFER_USAGE_WEIGHTS
_STATUS_SUCCESS, _STATUS_ABORTED = 0, 1  # enum ggml_status
DEVICES = ("auto", "cpu", "cuda", "metal")
_REGISTRIES = {"cuda": ("CUDA", "ROCm", "MUSA"), "metal": ("Metal", "MTL")}


class Aborted(Exception):
    """Raised when a computation stops early because the caller's abort callback asked for it."""


def check_threads(n_threads: int | None) -> int:
    """Returns `n_threads`, or the default for None. Raises DeviceError unless it is 1 to `MAX_THREADS`: ggml
    aborts the process on other numbers."""
    if n_threads is None:
        return default_threads()
    with contextlib.suppress(TypeError, ValueError):
        if whole_number("n_threads", n_threads, 1) <= MAX_THREADS:
            return int(n_threads)
    raise DeviceError(
        f"the number of threads is {n_threads!r:.40}, expected 1 to {MAX_THREADS}; leave it out for one on each of "
        f"the {default_threads()} cores."
    )


def find_device(name: str) -> Any:
    """Returns the ggml device for 'cpu', 'cuda', 'metal' or 'auto' (a GPU if there is one).

    Raises DeviceError when the name is unknown or this llama-cpp-python was built without that device.
    """
    if name not in DEVICES:
        raise DeviceError(f"unknown device {name!r}; known: {', '.join(DEVICES)}.")
    ggml = lib()
    devices = [ggml.ggml_backend_dev_get(i) for i in range(ggml.ggml_backend_dev_count())]
    gpus = [device for device in devices if ggml.ggml_backend_dev_type(device) in (_DEVICE_GPU, _DEVICE_IGPU)]
    if name in _REGISTRIES:
        gpus = [device for device in gpus if registry_name(device).startswith(_REGISTRIES[name])]
        if not gpus:
            raise DeviceError(
                f"device '{name}' is not available: this llama-cpp-python offers "
                f"{', '.join(ggml.ggml_backend_dev_name(device).decode() for device in devices)}. "
                f"Install one that is built for it, or use '--device cpu'."
            )
    if gpus and name != "cpu":
        return gpus[0]
    for device in devices:
        if is_cpu(device):
            return device
    raise DeviceError("ggml reports no CPU device; reinstall llama-cpp-python.")


def is_cpu(device: Any) -> bool:
    return bool(lib().ggml_backend_dev_type(device) == _DEVICE_CPU)


def device_name(name: str) -> str:
    """Returns ggml's name and description of the device that `find_device` selects. Raises DeviceError as it does."""
    device = find_device(name)
    ggml = lib()
    described = ggml.ggml_backend_dev_description(device).decode(errors="replace")
    return f"{ggml.ggml_backend_dev_name(device).decode()}: {described}"


def registry_name(device: Any) -> str:
    """Returns the name of the backend registry that a device belongs to: 'CPU', 'CUDA', 'MTL', ..."""
    return str(lib().ggml_backend_reg_name(lib().ggml_backend_dev_backend_reg(device)).decode())


class Backend:
    """An initialized ggml backend: one device, ready to compute graphs."""

    def __init__(self, device: str = "cpu", n_threads: int | None = None, abort: tuple[int, int] | None = None) -> None:
        """`abort`: the addresses of a C callback `bool (*)(void *)` and of its data. ggml calls it between graph nodes
        to ask whether to stop (CPU only); the caller keeps both alive. Raises DeviceError when the device or the number
        of threads is invalid, or the device does not start.
        """
        ggml = lib()
        self.device = find_device(device)
        self.name = str(ggml.ggml_backend_dev_name(self.device).decode())
        self.is_cpu = is_cpu(self.device)
        n_threads, self.n_threads = check_threads(n_threads), 0
        self.handle: Any = ggml.ggml_backend_dev_init(self.device, None)
        if not self.handle:
            raise DeviceError(
                f"ggml_backend_dev_init could not start device '{self.name}'; is it in use or out of memory?"
            )
        self._set_threads = self._registry_function("ggml_backend_set_n_threads", None, type(self.handle), ctypes.c_int)
        self.use_threads(n_threads)

        self._abort = abort
        if abort is not None:
            set_abort = self._registry_function(
                "ggml_backend_set_abort_callback", None, type(self.handle), ctypes.c_void_p, ctypes.c_void_p
            )
            if set_abort:
                set_abort(self.handle, *abort)

    def use_threads(self, n_threads: int) -> None:
        """Sets the number of threads for graphs computed from now on."""
        if n_threads == self.n_threads:
            return
        self.n_threads = n_threads
        if self._set_threads:
            self._set_threads(self.handle, n_threads)

    def is_aborted(self) -> bool:
        """Whether the abort callback asks to stop; for work outside ggml graphs."""
        if self._abort is None:
            return False
        callback, data = self._abort
        return bool(ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)(callback)(data))

    def _registry_function(self, name: str, restype: Any, *argtypes: Any) -> Any:
        """Looks up an optional backend function by name in the backend's registry; None if it has no such function."""
        registry = lib().ggml_backend_dev_backend_reg(self.device)
        address = lib().ggml_backend_reg_get_proc_address(registry, name.encode())
        return ctypes.CFUNCTYPE(restype, *argtypes)(address) if address else None

    @property
    def buffer_type(self) -> Any:
        """The device's default buffer type."""
        return lib().ggml_backend_dev_buffer_type(self.device)

    def extra_buffer_types(self) -> list[Any]:
        """Lists buffer types that repack weights for faster products (CPU repack, AMX), best first; often empty."""
        function = self._registry_function("ggml_backend_dev_get_extra_bufts", ctypes.POINTER(ctypes.c_void_p), DeviceP)
        found: list[Any] = []
        array = function(self.device) if function else None
        while array and array[len(found)]:
            found.append(BufferTypeP(array[len(found)]))
        return found

    def multiplies(self, buffer_type: Any, type_name: str, n_in: int, n_out: int) -> bool:
        """Whether this device can multiply weights `[n_in, n_out]` of this type that are kept in this buffer type.

        ggml answers this only for a complete operation, and looks at the buffer of its weight tensor. So a product is
        built with the weight in an empty buffer of that type, and never computed.
        """
        ggml, arena = lib(), Arena(4)
        buffer = ggml.ggml_backend_buft_alloc_buffer(buffer_type, 0)
        try:
            weight = arena.tensor(type_name, n_in, n_out)
            weight.contents.buffer = buffer
            x = arena.tensor("F32", n_in, 512)
            product = ggml.ggml_mul_mat(arena.context, weight, x)
            return bool(ggml.ggml_backend_dev_supports_op(self.device, product))
        finally:
            ggml.ggml_backend_buffer_free(buffer)
            arena.close()

    def compute(self, graph: Any) -> None:
        """Computes a complete graph; ctypes releases the GIL meanwhile. Raises Aborted when the abort callback stopped
        it, and DeviceError when the device fails."""
        status = lib().ggml_backend_graph_compute(self.open_handle, graph)
        if status == _STATUS_ABORTED:
            raise Aborted
        if status != _STATUS_SUCCESS:
            raise DeviceError(f"device '{self.name}' failed in ggml_backend_graph_compute with status {status}.")

    @functools.cached_property
    def onednn(self) -> OneDnn:
        """oneDNN with the backend's number of threads. Raises DeviceError if the extra is not installed."""
        return OneDnn(self.n_threads)

    @property
    def open_handle(self) -> Any:
        if not self.handle:
            raise ValueError("the backend is closed")
        return self.handle

    def close(self) -> None:
        handle, self.handle = getattr(self, "handle", None), None
        if handle:
            lib().ggml_backend_free(handle)
        onednn = self.__dict__.pop("onednn", None)
        if onednn is not None:
            onednn.close()


class Arena:
    """A ggml context for tensor headers, and the backend buffer that holds their data.

    Tensors point into the context's memory and are valid until `close`, which frees the buffer, then the context.
    """

    def __init__(self, n_tensors: int, graph_size: int = 0) -> None:
        ggml = lib()
        # headers only (no_alloc); 1024 bytes of slack for ggml's alignment
        mem_size = n_tensors * ggml.ggml_tensor_overhead() + 1024
        if graph_size:
            mem_size += ggml.ggml_graph_overhead_custom(graph_size, False)
        self.context: Any = ggml.ggml_init(InitParams(mem_size=mem_size, mem_buffer=None, no_alloc=True))
        if not self.context:
            raise DeviceError(f"ggml_init could not get {mem_size:,} bytes for tensor headers.")
        self.buffer: Any = None

    def tensor(self, type_name: str, *ne: int, name: str = "") -> Any:
        """Creates a tensor of ggml shape `[ne0, ne1, ne2, ne3]`, fastest axis first; it has no data until `allocate`.
        Raises ValueError when the arena is closed."""
        if not self.context:
            raise ValueError("the arena is closed")
        sizes = (*ne, *(1,) * (4 - len(ne)))
        tensor = lib().ggml_new_tensor_4d(self.context, TYPE_IDS[type_name], *sizes)
        if name:
            lib().ggml_set_name(tensor, name.encode()[:63])
        return tensor

    def allocate(self, buffer_type: Any, *, weights: bool) -> int:
        """Allocates all tensors in one buffer of this type and returns its size in bytes. Raises DeviceError when there
        is not enough memory."""
        ggml = lib()
        self.buffer = ggml.ggml_backend_alloc_ctx_tensors_from_buft(self.context, buffer_type)
        if not self.buffer:
            raise DeviceError(
                f"not enough memory in '{ggml.ggml_backend_buft_name(buffer_type).decode()}' for the model's tensors; "
                "use smaller weight types or another device."
            )
        if weights:
            ggml.ggml_backend_buffer_set_usage(self.buffer, _USAGE_WEIGHTS)
        return int(ggml.ggml_backend_buffer_get_size(self.buffer))

    def close(self) -> None:
        buffer, self.buffer = getattr(self, "buffer", None), None
        if buffer:
            lib().ggml_backend_buffer_free(buffer)
        context, self.context = getattr(self, "context", None), None
        if context:
            lib().ggml_free(context)


def buffer_type_name(buffer_type: Any) -> str:
    return str(lib().ggml_backend_buft_name(buffer_type).decode())


def release_pages(buffer: Any) -> None:
    """Returns a host buffer's memory to the system. The buffer stays usable; its contents become undefined.

    Only on Linux, where anonymous pages can be dropped; a no-op elsewhere.
    """
    start, end = _whole_pages(buffer)
    if end > start:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def use_large_pages(buffer: Any) -> None:
    """Requests huge pages for a host buffer; call it before anything is written. Weights that are read once per token
    are read up to a fifth faster. Only on Linux; a no-op elsewhere."""
    start, end = _whole_pages(buffer)
    if end > start:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_HUGEPAGE)


def _whole_pages(buffer: Any) -> tuple[int, int]:
    """Start and end address of the memory pages that lie completely inside a CPU buffer; (0, 0) for another device's
    buffer, or on a system other than Linux."""
    ggml = lib()
    if not sys.platform.startswith("linux") or not buffer or not _is_in_memory(buffer):
        return 0, 0
    start = ggml.ggml_backend_buffer_get_base(buffer)
    end = start + ggml.ggml_backend_buffer_get_size(buffer)
    return -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE


def _is_in_memory(buffer: Any) -> bool:
    """Whether a buffer's base is an address in this process. ggml does not count CPU repack buffers as host buffers,
    since other backends cannot read their layout; so the buffer type's device is checked, too."""
    ggml = lib()
    if ggml.ggml_backend_buffer_is_host(buffer):
        return True
    device = ggml.ggml_backend_buft_get_device(ggml.ggml_backend_buffer_get_type(buffer))
    return bool(device) and is_cpu(device)


def set_data(tensor: Any, data: np.ndarray) -> None:
    """Copies a C-contiguous array into a tensor, whose ggml shape is the NumPy shape reversed. Raises ValueError for
    another number of bytes or another layout."""
    nbytes = lib().ggml_nbytes(tensor)
    if data.nbytes != nbytes or not data.flags.c_contiguous:
        raise ValueError(
            f"tensor takes {nbytes} contiguous bytes, the array has {data.nbytes} ({data.shape} {data.dtype})"
        )
    lib().ggml_backend_tensor_set(tensor, data.ctypes.data, 0, nbytes)


def get_data(tensor: Any) -> np.ndarray:
    """Returns a float32 tensor's data as a new array, slowest axis first, without leading axes of size 1. Raises
    ValueError for another type."""
    header = tensor.contents
    if header.type != TYPE_IDS["F32"]:
        raise ValueError("get_data reads float32 tensors only")
    shape = [header.ne[d] for d in (3, 2, 1, 0)]
    while len(shape) > 1 and shape[0] == 1:
        shape.pop(0)
    out = np.empty(shape, dtype=np.float32)
    lib().ggml_backend_tensor_get(tensor, out.ctypes.data, 0, out.nbytes)
    return out
