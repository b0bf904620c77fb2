"""Computing between the decoder layers of llama.cpp, on the hidden states of the rows of a batch.

`llama_decode` asks the context's evaluation callback about every node of its graph. For a node that is wanted it
computes up to there and calls again; what the callback writes into the node's tensor is what the next layer takes. The
output of layer k is called 'l_out-k'; before layer 0 stands 'embd', but not for a batch of embeddings, whose rows are
an input of the graph and are computed beforehand. The last layer's output has only the rows whose logits are wanted.

No exception may pass through C: it is kept, all further nodes are left alone, and it is raised after `llama_decode`.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from granite4v.errors import DeviceError
from granite4v.ggml.backend import host_array
from granite4v.ggml.declarations import TensorP, TensorStruct
from granite4v.ggml.library import lib
from granite4v.runtime.llama.library import llama

Compute = Callable[[np.ndarray, int], np.ndarray]  # rows float32 (n, n_embd) and a number of threads -> rows alike
MAX_PLACES = 64  # of rows in memory, by address and number
_NAME = TensorStruct.name.offset
_FIRST, _BETWEEN = b"embd", b"l_out-%d"


class LayerHook:
    """What is computed before which layer of one model, for as long as `is_wanted`."""

    def __init__(self, n_layers: int, computes: Mapping[int, Compute]) -> None:
        """`computes`: by the number of decoder layers before it, from 0 to `n_layers`, the model's own."""
        self._n_layers, self._computes = n_layers, dict(computes)
        self._names = {_FIRST if point == 0 else _BETWEEN % (point - 1): point for point in computes}
        # the beginnings of their names: what is asked about a thousand times a token reads no more
        self._starts = {int.from_bytes(name[:4], sys.byteorder) for name in self._names}
        self._error: BaseException | None = None
        self._seen: set[int] = set()
        self._n_threads = 1
        # Where rows are that were seen: between layers of a hundred megabytes nothing of Python is in the processor's
        # caches, and finding them anew takes 2% of a layer.
        self._in_place: dict[tuple[int, int], np.ndarray] = {}
        self.is_wanted = False
        self.callback: Any = llama().ggml_backend_sched_eval_callback(self._see)

    def begin(self, data: np.ndarray, n_threads: int) -> np.ndarray:
        """Before `llama_decode` of tokens int32 `(n,)` or embeddings float32 `(n, n_embd)`: what it is given."""
        self._error, self._seen, self._n_threads = None, set(), n_threads
        if self.is_wanted and data.ndim == 2 and 0 in self._computes:
            self._seen.add(0)
            return self._computes[0](data, n_threads)
        return data

    def end(self, *, is_complete: bool, has_outputs: bool) -> None:
        """After it: raises what was raised meanwhile, and DeviceError where a layer of a whole graph did not come by.
        `has_outputs`: whether any row's logits were wanted."""
        error, self._error = self._error, None
        if error is not None:
            raise error
        expected = set(self._computes) - (set() if has_outputs else {self._n_layers})
        missing = sorted(expected - self._seen) if self.is_wanted and is_complete else []
        if missing:
            raise DeviceError(
                f"llama.cpp computed no tensor {_name(missing[0])!r}, after which an image is attended to; install the "
                "llama-cpp-python that granite4v asks for."
            )

    def _see(self, node: int, asks: bool, _data: int) -> bool:
        """llama.cpp's callback: whether a node is wanted; and once it is computed, whether to go on."""
        if not self.is_wanted or self._error is not None:
            return False
        try:
            if ctypes.c_uint32.from_address(node + _NAME).value not in self._starts:
                return not asks
            point = self._names.get(TensorStruct.from_address(node).name)
            if asks:
                return point is not None and point not in self._seen
            if point is not None:
                self._compute(point, ctypes.cast(node, TensorP))
            return True
        except BaseException as error:
            self._error = error
            return False

    def _compute(self, point: int, tensor: Any) -> None:
        self._seen.add(point)
        header = tensor.contents
        n_embd, n_rows = header.ne[0], header.ne[1]
        if n_rows == 0:
            return
        rows = self._in_place.get((header.data, n_rows))
        if rows is not None:
            rows[:] = self._computes[point](rows, self._n_threads)
            return
        if lib().ggml_backend_buffer_is_host(header.buffer):
            if len(self._in_place) == MAX_PLACES:
                self._in_place.clear()
            self._in_place[header.data, n_rows] = host_array(tensor).reshape(n_rows, n_embd)
        rows = np.empty((n_rows, n_embd), dtype=np.float32)
        lib().ggml_backend_tensor_get(tensor, rows.ctypes.data, 0, rows.nbytes)
        rows = np.ascontiguousarray(self._computes[point](rows, self._n_threads), dtype=np.float32)
        lib().ggml_backend_tensor_set(tensor, rows.ctypes.data, 0, rows.nbytes)


def _name(point: int) -> str:
    return (_FIRST if point == 0 else _BETWEEN % (point - 1)).decode()
