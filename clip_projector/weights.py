"""Loads the tensors of an mmproj file where a graph can use them, and chooses the kernels for products with them.

On the CPU the file is memory-mapped: weights stay on disk until they are touched, and their pages can be released
after the images are encoded. Weights of a type that multiplies faster in another buffer type (CPU repack), and all
weights for a GPU, are copied there once.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from granite4v.errors import DeviceError, ModelFileError
from granite4v.families.vision_layout import ffn_block, ffn_padded, padded_width, tensor_kind
from granite4v.ggml.backend import Aborted, Arena, Backend, use_large_pages
from granite4v.ggml.gguf_file import GgufFile, TensorInfo
from granite4v.ggml.graph import Graph, Tensor
from granite4v.ggml.kernels import ATTENTION, PLAIN, Kernel
from granite4v.ggml.library import lib
from granite4v.ggml.quantize import quantize_rows
from granite4v.ggml.types import NO_WEIGHTS, TYPES, row_bytes

_PLAIN = Kernel(PLAIN)
FLOATS = ("F32", "F16", "BF16")
ALIGNMENT = 32  # bytes; tensors that are aligned to less are copied


class Weights:
    """Tensors by their GGUF name; `matrix` returns a weight in the form that multiplies fastest."""

    def __init__(
        self,
        file: GgufFile,
        backend: Backend,
        kernels: Mapping[str, Kernel],
        names: Mapping[str, str] | None = None,
        quantized_as: str | None = None,
        *,
        infos: Iterable[TensorInfo] | None = None,
    ) -> None:
        """Maps or copies the tensors.

        `kernels`: how each weight type is multiplied; types without an entry use the plain kernel. `names`: our name ->
        the file's, for tensors that the file names differently. `quantized_as`: the type to which matrices of float
        types are quantized now, in memory, which takes seconds. `infos`: the wanted tensors of the file; None for all.
        Raises ModelFileError, DeviceError and Aborted.
        """
        ours = {theirs: our for our, theirs in (names or {}).items()}
        named = (replace(info, name=ours.get(info.name, info.name)) for info in infos or file.tensors.values())
        self._infos = {info.name: info for info in named}
        self._sources: dict[str, TensorInfo] = {}  # as in the file, of tensors with another type or shape in memory
        if quantized_as is not None:
            self._plan_quantizing(quantized_as)
        self._kernels = kernels
        self._path = file.path
        self._arenas: list[Arena] = []
        self._tensors: dict[str, Tensor] = {}
        self._file = open(file.path, "rb")  # noqa: SIM115  kept for as long as the mapping
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        if len(self._map) < max((info.offset + info.nbytes for info in self._infos.values()), default=0):
            self._map.close()
            self._file.close()
            raise ModelFileError(f"'{file.path}' has become shorter since its header was read; open it again.")
        # ggml's host buffer points to the address of this NumPy view of the mapping. Closing the mapping while the
        # view exists is an error, so `close` deletes the view first.
        self._bytes = np.frombuffer(self._map, dtype=np.uint8)
        elsewhere: dict[Any, list[TensorInfo]] = {}
        mapped: list[TensorInfo] = []
        shifted: list[TensorInfo] = []
        for info in self._infos.values():
            kernel = self._kernel(info)
            if _takes(backend, kernel, info):
                elsewhere.setdefault(kernel.name, []).append(info)
            elif info.offset % ALIGNMENT or info.name in self._sources:
                shifted.append(info)
            else:
                mapped.append(info)
        for name, infos in elsewhere.items():
            self._copy(backend, infos, next(kernel.buffer_type for kernel in kernels.values() if kernel.name == name))
        if not backend.is_cpu:
            mapped, shifted = [], mapped + shifted
        if mapped:
            self._map_in_place(mapped, backend)
        if shifted:
            self._copy(backend, shifted, backend.buffer_type)

    def _kernel(self, info: TensorInfo) -> Kernel:
        return self._kernels.get(info.type_name, _PLAIN) if len(info.shape) > 1 else _PLAIN

    def _plan_quantizing(self, type_name: str) -> None:
        """Replaces the file's tensors by those that will be in memory. Feed-forward widths are padded in both of their
        matrices, as in a converted file, unless any matrix has a type that is not a float type."""
        block = ffn_block(type_name)
        kinds = {name: tensor_kind(name, info.shape) for name, info in self._infos.items()}
        matrices = [info for name, info in self._infos.items() if kinds[name] == "matrix"]
        pads_ffn = all(info.type_name in FLOATS for info in matrices)
        for name, info in list(self._infos.items()):
            if info.type_name not in FLOATS:
                continue
            shape = ffn_padded(name, info.shape, block) if pads_ffn else info.shape
            kind = info.type_name
            if kinds[name] == "matrix":
                shape, kind = (*shape[:-1], padded_width(shape[-1], TYPES[type_name].block)), type_name
            if (shape, kind) != (info.shape, info.type_name):
                self._sources[name] = info
                nbytes = math.prod(shape[:-1]) * row_bytes(kind, shape[-1])
                self._infos[name] = TensorInfo(name, shape, kind, info.offset, nbytes)

    def _data(self, info: TensorInfo, backend: Backend) -> np.ndarray:
        """The bytes of a tensor, from the file or quantized from the file's tensor. Raises Aborted."""
        source = self._sources.get(info.name, info)
        data = self._bytes[source.offset : source.offset + source.nbytes]
        if source is info:
            return data
        if backend.is_aborted():
            raise Aborted
        values = np.zeros(info.shape, dtype=np.float32)
        values[tuple(map(slice, source.shape))] = _as_float32(data, source.type_name).reshape(source.shape)
        self.release()  # drops the pages just read before quantizing allocates more
        return quantize_rows(values.reshape(-1, info.shape[-1]), info.type_name, backend.n_threads)

    def _copy(self, backend: Backend, infos: list[TensorInfo], buffer_type: Any) -> None:
        arena = Arena(len(infos))
        self._arenas.append(arena)
        tensors = [arena.tensor(info.type_name, *reversed(info.shape), name=info.name) for info in infos]
        arena.allocate(buffer_type, weights=True)
        use_large_pages(arena.buffer)
        for info, tensor in zip(infos, tensors, strict=True):
            data = self._data(info, backend)
            lib().ggml_backend_tensor_set(tensor, data.ctypes.data, 0, info.nbytes)
            self._tensors[info.name] = Tensor(tensor)
            self.release()  # else all copies and their sources would be in memory together

    def _map_in_place(self, infos: list[TensorInfo], backend: Backend) -> None:
        arena = Arena(len(infos))
        self._arenas.append(arena)
        base = self._bytes.ctypes.data
        # the buffer covers the complete file; each tensor points to its data in the mapping, nothing is copied
        arena.buffer = lib().ggml_backend_dev_buffer_from_host_ptr(
            backend.device, base, self._bytes.nbytes, self._bytes.nbytes
        )
        if not arena.buffer:
            raise DeviceError(f"device '{backend.name}' cannot use the mapped file '{self._path}' as its memory.")
        for info in infos:
            tensor = arena.tensor(info.type_name, *reversed(info.shape), name=info.name)
            lib().ggml_backend_tensor_alloc(arena.buffer, tensor, base + info.offset)
            self._tensors[info.name] = Tensor(tensor)

    def vector(self, name: str, n: int) -> Tensor:
        """A float32 tensor of `n` values; raises ModelFileError if it is missing or has another type or size."""
        info = self._info(name)
        if info.type_name != "F32" or info.nbytes != 4 * n:
            raise ModelFileError(
                f"'{self._path}' has tensor '{name}' as {info.type_name} {info.shape}, expected F32 with {n:,} values."
            )
        return self._tensors[name]

    def table(self, graph: Graph, name: str, width: int, n_rows: int) -> Tensor:
        """Vectors `[width, n_rows]` as float32, for addition; half-precision ones are widened. Raises
        ModelFileError."""
        info = self._info(name)
        if info.type_name not in ("F32", "F16", "BF16") or _flat(info.shape) != (n_rows, width):
            raise ModelFileError(
                f"'{self._path}' has tensor '{name}' as {info.type_name} {info.shape}, expected {n_rows:,} vectors of "
                f"{width:,} values."
            )
        tensor = self._tensors[name]
        return tensor if info.type_name == "F32" else graph.cast(tensor, "F32")

    def lookup(self, graph: Graph, name: str, index: Tensor, width: int, n_rows: int) -> Tensor:
        """The float32 vector `[width]` that the I32 input `index` `[1]` picks from `n_rows`; no other row is read."""
        info = self._info(name)
        if info.type_name not in FLOATS or _flat(info.shape) != (n_rows, width):
            raise ModelFileError(
                f"'{self._path}' has tensor '{name}' as {info.type_name} {info.shape}, expected {n_rows:,} vectors of "
                f"{width:,} values."
            )
        return graph.rows(graph.reshape(self._tensors[name], width, n_rows), index)

    def array(self, name: str, *shape: int) -> np.ndarray:
        """Copies a float32 tensor to a NumPy array of the given shape."""
        n = int(np.prod(shape))
        self.vector(name, n)
        info = self._infos[name]
        return self._bytes[info.offset : info.offset + info.nbytes].view(np.float32).reshape(shape).copy()

    def matrix(self, graph: Graph, name: str, n_in: int, n_out: int) -> Tensor:
        """A weight matrix `[n_in, n_out]` ready for `graph.matmul`, widened to float32 where that is faster. Raises
        ModelFileError if it is missing or has an unsuitable type or shape.

        K-quant rows may be longer: padded with zeros to whole blocks, `n_in` to the next multiple of 256.
        """
        info = self._info(name)
        if info.type_name in NO_WEIGHTS:
            raise ModelFileError(
                f"'{self._path}' has tensor '{name}' as {info.type_name}, expected a type that weights are multiplied "
                "in, such as F16 or Q8_0; convert it again with 'granite4v convert'."
            )
        block = TYPES[info.type_name].block
        shapes = dict.fromkeys(((n_out, n_in), (n_out, -(-n_in // block) * block)))  # plain and padded, if they differ
        if _flat(info.shape) not in shapes:
            raise ModelFileError(
                f"'{self._path}' has tensor '{name}' with shape {info.shape}, expected "
                f"{' or '.join(map(str, shapes))} by its metadata."
            )
        tensor, kernel = self._tensors[name], self._kernel(info)
        if len(info.shape) > 2:
            tensor = graph.reshape(tensor, *reversed(_flat(info.shape)))
        return kernel.matrix(graph, tensor)

    def kernel(self, name: str) -> Kernel:
        """The kernel for products with this weight."""
        return self._kernel(self._info(name))

    @property
    def attention(self) -> Kernel:
        """The kernel for attention."""
        return self._kernels.get(ATTENTION, _PLAIN)

    def n_rows(self, name: str) -> int:
        """The number of outputs of a weight matrix."""
        return _flat(self._info(name).shape)[0]

    def _info(self, name: str) -> TensorInfo:
        if self._file.closed:
            raise ValueError("the weights are closed")
        if name not in self._infos:
            raise ModelFileError(f"'{self._path}' has no tensor '{name}'; convert it again with 'granite4v convert'.")
        return self._infos[name]

    def release(self) -> None:
        """Lets the system drop the mapped pages; touching them reads them from the file again."""
        if hasattr(mmap, "MADV_DONTNEED") and not self._file.closed:
            self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        for arena in self._arenas:
            arena.close()
        self._arenas.clear()
        self._tensors.clear()
        if not self._file.closed:
            del self._bytes
            self._map.close()
            self._file.close()


def _takes(backend: Backend, kernel: Kernel, info: TensorInfo) -> bool:
    """Whether a kernel has its own buffer type and can multiply a tensor of this type and shape in it."""
    n_out, n_in = _flat(info.shape)
    return kernel.buffer_type is not None and backend.multiplies(kernel.buffer_type, info.type_name, n_in, n_out)


def _as_float32(data: np.ndarray, type_name: str) -> np.ndarray:
    if type_name == "BF16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return data.view(np.float16 if type_name == "F16" else np.float32).astype(np.float32, copy=False)


def _flat(shape: tuple[int, ...]) -> tuple[int, int]:
    """(n_out, n_in) of a matrix. A convolution kernel (out, channels, height, width) is flattened to one row per
    output."""
    if len(shape) == 1:
        return (1, shape[0])
    n_in = 1
    for n in shape[1:]:
        n_in *= n
    return (shape[0], n_in)
