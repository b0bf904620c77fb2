"""Runs computations between the decoder layers of llama.cpp, on the hidden states of the rows of a batch.

`llama_decode` asks the context's evaluation callback about every node of its graph. For a node that is wanted it
computes up to there and calls again; the next layer uses what the callback writes into the node's tensor. The output of
layer k is called 'l_out-k'. The input of layer 0 is called 'embd', but in a batch of embeddings the rows are an input
of the graph and are processed beforehand. The last layer's output has only the rows whose logits are wanted.

With LLVM, a compiled callback is asked, and runs graphs that have run for this number of rows before; the others, and
those that fail, are left to Python. No exception may pass through C: it is kept, all further nodes are left alone, and
it is raised after `llama_decode`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from granite4v.errors import DeviceError
from granite4v.ggml.compiled.between_layers import InPlace, state_for
from granite4v.ggml.declarations import TensorP
from granite4v.ggml.library import lib
from granite4v.runtime.llama.library import llama

Compute = Callable[[np.ndarray, int], np.ndarray]  # float32 rows (n, n_embd), n_threads -> rows alike
FindGraph = Callable[[int, int, int], InPlace | None]  # layers before it, rows, threads -> graph


class LayerHook:
    """Holds what is computed before which layer of one model, while `is_wanted` is set."""

    def __init__(self, n_layers: int, computes: Mapping[int, Compute], find_graph: FindGraph | None = None) -> None:
        """`computes`: functions by the number of the model's own decoder layers before them, from 0 to `n_layers`.
        `find_graph`: returns, for one of these numbers, what computes the same during the next `llama_decode`, if there
        is such a graph."""
        self._n_layers, self._computes, self._find_graph = n_layers, dict(computes), find_graph
        self._names = {_name(point): index for index, point in enumerate(self._computes)}
        self._error: BaseException | None = None
        self._n_threads = 1
        self.is_wanted = False
        self._python: Any = llama().ggml_backend_sched_eval_callback(self._see)
        self._state = state_for(list(self._names), ctypes.cast(self._python, ctypes.c_void_p).value or 0)
        self._places = self._state.places[: len(self._names)]
        self.callback: Any = llama().ggml_backend_sched_eval_callback(self._state.callback)
        self.data = ctypes.addressof(self._state)  # user data of this callback; another callback can call it with this

    def begin(self, data: np.ndarray, n_threads: int) -> np.ndarray:
        """Prepares `llama_decode` of tokens int32 `(n,)` or embeddings float32 `(n, n_embd)`. Returns what to pass to
        it."""
        self._error, self._n_threads, self._state.is_wanted = None, n_threads, self.is_wanted
        if not self.is_wanted:
            return data
        for place, point in zip(self._places, self._computes, strict=True):
            found = None if self._find_graph is None else self._find_graph(point, len(data), n_threads)
            place.use(found, len(data))
            if point == 0 and data.ndim == 2:
                place.is_seen, data = True, self._computes[0](data, n_threads)
        return data

    def end(self, *, is_complete: bool, has_outputs: bool) -> None:
        """Finishes after `llama_decode`: raises an exception that was kept, and DeviceError if a complete graph lacked
        one of the expected layers. `has_outputs`: whether any row's logits were wanted."""
        error, self._error = self._error, None
        if error is not None:
            raise error
        if not (self.is_wanted and is_complete):
            return
        for place, point in zip(self._places, self._computes, strict=True):
            if not place.is_seen and (has_outputs or point < self._n_layers):
                raise DeviceError(
                    f"llama.cpp computed no tensor {_name(point).decode()!r}, after which an image is attended to; "
                    "install the llama-cpp-python that granite4v asks for."
                )

    def _see(self, node: int, asks: bool, _data: int) -> bool:
        """The evaluation callback: returns whether a node is wanted, and once it is computed, whether to go on."""
        if not self._state.is_wanted:
            return False
        try:
            tensor = ctypes.cast(node, TensorP)
            index = self._names.get(tensor.contents.name)
            if asks or index is None:
                return index is not None and not self._places[index].is_seen if asks else True
            self._places[index].is_seen = True
            self._compute(list(self._computes.values())[index], tensor)
            return True
        except BaseException as error:
            self._error, self._state.is_wanted = error, False
            return False

    def _compute(self, compute: Compute, tensor: Any) -> None:
        rows = np.empty(tensor.contents.ne[1::-1], dtype=np.float32)
        if len(rows):
            lib().ggml_backend_tensor_get(tensor, rows.ctypes.data, 0, rows.nbytes)
            rows = np.ascontiguousarray(compute(rows, self._n_threads), dtype=np.float32)
            lib().ggml_backend_tensor_set(tensor, rows.ctypes.data, 0, rows.nbytes)


def _name(n_layers_before: int) -> bytes:
    """The name of the node that is the output of this many layers."""
    return b"l_out-%d" % (n_layers_before - 1) if n_layers_before else b"embd"
