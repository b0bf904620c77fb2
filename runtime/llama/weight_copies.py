"""Copies a text model's weights to buffer types that multiply them faster, in addition to the mapped file.

llama.cpp has one tensor for each weight, in one buffer, so prefill and decoding use the same kernel. No kernel is best
at both: 512 rows are multiplied with plain Q4_K weights at 945 GFLOP/s and with repacked ones at 470, one row at 120
and 185 (two cores with AVX-512, ggml's kernels). So the model is opened with all its weights mapped, and those that
gain are copied. Before each batch the tensors are pointed at the form that is fastest for its number of rows. Three
fields of `struct ggml_tensor`, which ggml reads anew for every graph, say where a tensor's data is: data, buffer,
extra.

A copy may also be of another type. llama.cpp does not notice: it builds graphs from tensors of any type, and ggml looks
at the type when it computes. The type and the strides are then switched together with the place.

A mapped weight whose copy is used takes no memory: its pages are given back, and read again from the system's file
cache. During a prefill with mapped weights they are given back while it runs, a fifth of a second after use, so that
the copies and the complete file are never in this process's memory together.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from granite4v.errors import DeviceError
from granite4v.ggml.backend import Aborted, Arena, use_large_pages
from granite4v.ggml.compiled.products import MOST_FLOAT_ROWS
from granite4v.ggml.declarations import TensorP
from granite4v.ggml.library import lib as ggml
from granite4v.ggml.quantize import quantize_rows
from granite4v.ggml.types import row_bytes, type_name
from granite4v.runtime.llama.abort import AbortFlag
from granite4v.runtime.llama.context import BatchRows, LlamaContext
from granite4v.runtime.llama.library import capture_log, llama
from granite4v.runtime.llama.model import LlamaModel
from granite4v.runtime.llama.placement import Copy, Placement

# Batches of more rows count as prompts, batches of at most this many as decode steps. With Q4_K and two cores with
# AVX-512, repacked weights take 0.75 times as long as plain ones for 17 rows, as a question after a page has, and just
# as long from 28 rows on.
MAX_FEW_ROWS = 24
RETURN_EVERY_S = 0.2
_OP_NONE = 0  # enum ggml_op: a tensor that no operation computes
_FIELDS = ("data", "buffer", "extra", "type", "nb")
WIDENED_AT_ONCE = 1 << 22  # weights at a time; each takes four bytes meanwhile


def open_model(path: Path, placement: Placement, *, device: str = "cpu", n_threads: int = 1) -> LlamaModel:
    """Opens a model, with its copies if there is memory for them. Raises ModelFileError and DeviceError as
    `LlamaModel`."""
    model = LlamaModel(path, device=device)
    if not placement.copies or not model.on_cpu:
        return model
    try:
        with contextlib.suppress(DeviceError):  # no memory for the copies: the mapped weights are only slower
            model.use_copies(WeightCopies(model, placement.copies, n_threads))
    except BaseException:
        model.close()
        raise
    return model


class WeightCopies:
    """The copies of a model's weights, and the switch between them and the mapped file. Closed by the model."""

    def __init__(self, model: LlamaModel, copies: Sequence[Copy], n_threads: int = 1) -> None:
        """Makes the copies. Raises DeviceError when there is not enough memory."""
        self._n_threads = n_threads
        tensors = weight_tensors(model)
        found = [copy for copy in copies if copy.name in tensors]
        self._arenas: list[Arena] = []
        self._forms: list[_Forms] = []
        self._mapped = _Pages(tensors[copy.name] for copy in found)
        try:
            for kernel in dict.fromkeys(copy.kernel for copy in found):
                self._copy([copy for copy in found if copy.kernel == kernel], tensors)
        except BaseException:
            self.close()
            raise
        self._used: tuple[bool, bool] | None = None  # for many rows, and with widened copies; None: unknown
        self._needs_mapped = bool({copy.name for copy in found} - {copy.name for copy in found if copy.many})

    def _copy(self, copies: Sequence[Copy], tensors: dict[str, Any]) -> None:
        arena = Arena(len(copies))
        self._arenas.append(arena)
        capture_log()  # repacking reports every tensor
        targets = []
        for copy in copies:
            header = tensors[copy.name].contents
            targets.append(arena.tensor(copy.widened or type_name(header.type), *header.ne, name=copy.name))
        arena.allocate(copies[0].buffer_type, weights=True)
        use_large_pages(arena.buffer)
        sources = [tensors[copy.name] for copy in copies]
        with ThreadPoolExecutor(self._n_threads) as pool:
            list(pool.map(self._fill, copies, sources, targets))
        places = zip(copies, sources, map(_where, sources), map(_where, targets), strict=True)
        self._forms += [_Forms(*place) for place in places]

    def _fill(self, copy: Copy, source: Any, target: Any) -> None:
        if target.contents.type == source.contents.type:
            ggml().ggml_backend_tensor_set(target, source.contents.data, 0, ggml().ggml_nbytes(source))
        else:
            _widen(source, target)
        self._mapped.give_back()

    @contextlib.contextmanager
    def used_for(self, n_rows: int, *, is_prompt: bool = False) -> Iterator[None]:
        """Points the tensors at the weights for a batch of `n_rows` rows, which is computed inside the block.

        A decode step, however many rows it has, uses no widened copies, so that values do not depend on what else it
        computes. It gives no mapped pages back, because the next step follows at once and reads the same ones. Nor does
        a prompt with as few rows as a step may have use widened copies: it runs in the graph that llama.cpp reuses,
        which knows one type.
        """
        is_many, widens = n_rows > MAX_FEW_ROWS, is_prompt and n_rows > MOST_FLOAT_ROWS
        used = is_many, widens
        if used != self._used:
            self._used = None  # unknown if this is interrupted
            self._point_at_file()
            for forms in self._forms:
                if (forms.copy.many if is_many else forms.copy.few) and (widens or forms.copy.widened is None):
                    forms.point(is_copy=True)
            self._used = used
        if is_prompt and is_many and self._needs_mapped:
            with self._mapped.given_back_meanwhile():
                yield
        else:
            yield

    def _point_at_file(self) -> None:
        for forms in self._forms:
            forms.point(is_copy=False)

    def close(self) -> None:
        """Points all tensors back at the mapped file and frees the copies."""
        self._point_at_file()
        while self._arenas:
            self._arenas.pop().close()


@dataclass(frozen=True)
class _Forms:
    """One weight: llama.cpp's tensor, and the location of its data in the mapped file and in the copy."""

    copy: Copy
    tensor: Any
    mapped: tuple[Any, ...]
    copied: tuple[Any, ...]

    def point(self, *, is_copy: bool) -> None:
        header = self.tensor.contents
        for name, value in zip(_FIELDS, self.copied if is_copy else self.mapped, strict=True):
            setattr(header, name, value)


def _where(tensor: Any) -> tuple[Any, ...]:
    """The current values of a tensor's fields, copied, because ctypes objects would follow later changes."""
    return tuple(_value(getattr(tensor.contents, name)) for name in _FIELDS)


def _value(field: Any) -> Any:
    if isinstance(field, ctypes.c_void_p):
        return type(field)(field.value)
    return type(field)(*field) if isinstance(field, ctypes.Array) else field


def _widen(source: Any, target: Any) -> None:
    """Copies a tensor of a quantized type to one of another type."""
    kind, wide = type_name(source.contents.type), type_name(target.contents.type)
    n_in, n_rows = source.contents.ne[0], source.contents.ne[1]
    row, start = row_bytes(kind, n_in), source.contents.data
    step = max(1, WIDENED_AT_ONCE // n_in)
    for first in range(0, n_rows, step):
        n = min(step, n_rows - first)
        packed = np.ctypeslib.as_array((ctypes.c_uint8 * (n * row)).from_address(start + first * row)).reshape(n, row)
        values = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind])
        rows = quantize_rows(values, wide, 1)
        ggml().ggml_backend_tensor_set(target, rows.ctypes.data, first * rows.shape[1], rows.nbytes)


class _Pages:
    """The pages of a mapped file that hold only these tensors. Giving them back loses nothing: they are read again when
    they are touched."""

    def __init__(self, tensors: Iterator[Any]) -> None:
        spans = sorted((tensor.contents.data, tensor.contents.data + ggml().ggml_nbytes(tensor)) for tensor in tensors)
        self._ranges: list[list[int]] = []
        for start, end in spans:
            if self._ranges and start - self._ranges[-1][1] < mmap.PAGESIZE:
                self._ranges[-1][1] = end
            else:
                self._ranges.append([start, end])
        self._madvise = ctypes.CDLL(None).madvise if sys.platform.startswith("linux") else None

    def give_back(self) -> None:
        if self._madvise is None:
            return
        for start, end in self._ranges:
            first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
            if last > first:
                self._madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)

    @contextlib.contextmanager
    def given_back_meanwhile(self) -> Iterator[None]:
        """Gives the pages back repeatedly inside the block, and at its end."""
        done = threading.Event()

        def repeat() -> None:
            while not done.wait(RETURN_EVERY_S):
                self.give_back()

        thread = threading.Thread(target=repeat, name="granite4v pages", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self.give_back()


def weight_tensors(model: LlamaModel) -> dict[str, Any]:
    """Returns llama.cpp's tensors of the weights that it multiplies, by name.

    No function of llama.cpp returns them. The evaluation callback, which is asked about every node of a graph before it
    is computed, sees them as the nodes' sources; the computation itself is aborted at its first node.
    """
    found: dict[str, Any] = {}
    abort = AbortFlag()

    def see(node: int, _asks: bool, _data: int) -> bool:
        weight = ctypes.cast(node, TensorP).contents.src[0]
        if weight and weight.contents.op == _OP_NONE and weight.contents.name.endswith(b".weight"):
            # cast, because the pointer itself is in the node, which is freed with the context
            found[weight.contents.name.decode()] = ctypes.cast(weight, TensorP)
        abort.raise_()
        return False

    callback = llama().ggml_backend_sched_eval_callback(see)
    with LlamaContext(model, 256, 8, 1, abort=abort, node_callback=callback) as context, contextlib.suppress(Aborted):
        context.decode(BatchRows.of(np.zeros(1, np.int32), 0, 0, output=True))
    return found
