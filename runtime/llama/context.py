"""The KV cache of llama.cpp, its sequences, and the batches that extend them. Knows nothing of images or answers."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from granite4v.choices import CacheType
from granite4v.errors import DeviceError, ModelFileError
from granite4v.ggml.backend import Aborted
from granite4v.ggml.compiled.nodes import NodeKernels, callback
from granite4v.ggml.cpu import FreeThreads
from granite4v.memory import large_buffer
from granite4v.runtime.llama.abort import AbortFlag
from granite4v.runtime.llama.kv_pages import PADDING, KvPages, SequenceRoom, consists_of, cpu_buffers
from granite4v.runtime.llama.layer_hook import LayerHook
from granite4v.runtime.llama.library import capture_log, llama, log
from granite4v.runtime.llama.model import LlamaModel
from granite4v.runtime.llama.owner import Owner

_TYPES = {"f32": 0, "f16": 1, "q8_0": 8}  # enum ggml_type
_FLASH_OFF, _FLASH_AUTO = 0, -1  # enum llama_flash_attn_type
_ABORTED = 2  # result of llama_decode when the abort callback returned true
_STATE_HEADER = 12  # bytes before the streams in the state of a sequence: magic number, sequence, number of streams
_N_OUTPUTS = 64  # most rows of logits per batch, or one per sequence if that is more; each takes 0.4 MB


@dataclass(frozen=True)
class BatchRows:
    """The rows of one `llama_decode` call, of any number of sequences: token ids or embeddings, never both.

    `data`: int32 `(n,)` or float32 `(n, n_embd_inp)`; `positions`, `sequences`: int32 `(n,)`; `outputs`: bool `(n,)`,
    the rows whose logits are wanted.
    """

    data: np.ndarray
    positions: np.ndarray
    sequences: np.ndarray
    outputs: np.ndarray

    @classmethod
    def of(cls, data: np.ndarray, position: int, sequence: int, *, output: bool) -> BatchRows:
        """Makes consecutive rows of one sequence from `position` on, with logits of the last one or of none."""
        n = len(data)
        outputs = np.zeros(n, dtype=bool)
        outputs[n - 1 :] = output
        positions = np.arange(position, position + n, dtype=np.int32)
        return cls(data, positions, np.full(n, sequence, dtype=np.int32), outputs)

    @classmethod
    def joined(cls, parts: Sequence[BatchRows]) -> BatchRows:
        if len(parts) == 1:
            return parts[0]
        fields = ("data", "positions", "sequences", "outputs")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in fields))

    def __len__(self) -> int:
        return len(self.data)


def node_callback(kernels: NodeKernels) -> Any:
    """Returns a context's `node_callback` for compiled kernels; None if there are none."""
    return llama().ggml_backend_sched_eval_callback(callback(kernels)) if kernels else None


def _set_callback(params: Any, node_callback: Any, hook: LayerHook | None) -> None:
    if node_callback is not None:
        params.cb_eval, params.cb_eval_user_data = node_callback, None if hook is None else hook.data
    elif hook is not None:
        params.cb_eval, params.cb_eval_user_data = hook.callback, hook.data


class LlamaContext(Owner):
    """A KV cache for several sequences, numbered from 0, and the buffers to extend them.

    Each sequence has its own cells (llama.cpp's streams). In a cache shared by all (`kv_unified`) a sequence's values
    would depend, by rounding, on the contents of the others, because cells are summed in another order.
    """

    def __init__(
        self,
        model: LlamaModel,
        n_cells: int,
        n_ubatch: int,
        n_threads: int,
        *,
        n_seq_max: int = 1,
        exact: bool = False,
        flash: bool = True,
        cache_type: CacheType = "f16",
        abort: AbortFlag | None = None,
        node_callback: Any = None,
        hook: LayerHook | None = None,
        free_threads: FreeThreads | None = None,
    ) -> None:
        """`n_cells`: tokens that a sequence has room for. `exact`: float32 KV cache without flash attention, for
        comparing values rather than for speed; otherwise the cache has `cache_type`. `flash`: flash attention, where
        the device supports it; a quantized cache needs it. Without it, values are stored transposed. `node_callback`: a
        `ggml_backend_sched_eval_callback` that is asked about every node of a graph; if there is also a `hook`, which
        computes between layers, it gets the hook's data and asks the hook's callback. `free_threads`: asked before each
        batch how many of the threads to use; None: all.

        Raises DeviceError when there is not enough memory.
        """
        lib = llama()
        self.model, self.n_cells, self.n_ubatch, self.n_seq_max = model, n_cells, n_ubatch, n_seq_max
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max = n_cells * n_seq_max, n_seq_max
        params.n_batch = params.n_ubatch = n_ubatch
        params.kv_unified = False
        params.n_outputs_max = self.max_outputs = min(max(_N_OUTPUTS, n_seq_max), n_ubatch)
        params.n_threads = params.n_threads_batch = n_threads
        params.type_k = params.type_v = _TYPES["f32" if exact else cache_type]
        params.flash_attn_type = _FLASH_AUTO if flash and not exact else _FLASH_OFF
        params.offload_kqv = params.op_offload = not model.on_cpu
        if abort is not None:
            params.abort_callback = lib.ggml_abort_callback(abort.callback_address)
            params.abort_callback_data = abort.data_address
        _set_callback(params, node_callback, hook)
        capture_log()
        n_layers = int(lib.llama_model_n_layer(model.handle))
        n_padded = -(-n_cells // PADDING) * PADDING
        n_all = 2 * n_layers * n_seq_max * n_padded
        with cpu_buffers(lambda n_bytes: model.on_cpu and consists_of(n_bytes, n_all)) as buffers:
            handle = lib.llama_init_from_model(model.handle, params)
        if not handle:
            raise DeviceError(
                f"llama.cpp cannot make a context of {n_seq_max} x {n_cells} tokens: {log().reason()}. Use a smaller "
                "context (--ctx-size, n_ctx)."
            )
        self._own(handle, lib.llama_free, model, abort, node_callback, hook)
        self._memory = lib.llama_get_memory(handle)
        n_made = int(lib.llama_n_ctx_seq(handle))
        pages = KvPages.among(buffers, n_layers, n_seq_max, n_made) if model.on_cpu else None
        self._room = SequenceRoom(pages, n_seq_max, n_made)
        self.adapter_on = False
        self._n_threads, self._free_threads, self._hook = n_threads, free_threads, hook

    def set_adapter(self, on: bool) -> None:
        """Switches the model's LoRA on or off for what is decoded from now on."""
        if on == self.adapter_on:
            return
        if on and not self.model.has_adapter:
            raise ValueError("the model has no adapter loaded")
        lib = llama()
        adapters = (lib.llama_adapter_lora_p_ctypes * 1)(*([self.model.adapter] if on else []))
        if lib.llama_set_adapters_lora(self.handle, adapters, 1 if on else 0, (ctypes.c_float * 1)(1.0)) != 0:
            raise DeviceError(f"llama.cpp cannot switch the adapter: {log().reason()}.")
        self.adapter_on = on

    def _use_free_threads(self) -> None:
        n_threads = self._n_threads if self._free_threads is None else self._free_threads.now()
        if n_threads != self._n_threads:
            self._n_threads = n_threads
            llama().llama_set_n_threads(self.handle, n_threads, n_threads)

    def decode(self, rows: BatchRows, *, is_prompt: bool = False) -> None:
        """Appends rows to their sequences. Rows of several sequences are computed together if the numbers of the
        sequences are consecutive and ascending; otherwise each consecutive run takes a pass of its own. `is_prompt`:
        the rows are part of a prompt and need not have the bits that they would have in decode steps.

        Raises Aborted when the abort flag is raised. Some of the rows may then be in the cache, as after any other
        error: `truncate` the sequences.
        """
        lib, n = llama(), len(rows)
        self._check(rows)
        self._use_free_threads()
        given = rows.data if self._hook is None else self._hook.begin(rows.data, self._n_threads)
        data = np.ascontiguousarray(given)
        positions, sequences = np.ascontiguousarray(rows.positions), np.ascontiguousarray(rows.sequences)
        wanted = rows.outputs.astype(np.int8)
        n_sequences = np.ones(n, dtype=np.int32)
        # llama_batch.seq_id is an array of pointers, one to each row's list of sequences (here of one)
        pointers = sequences.ctypes.data + sequences.itemsize * np.arange(n, dtype=np.uintp)
        batch = lib.llama_batch(n_tokens=n)
        if data.ndim == 1:
            batch.token = data.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        else:
            batch.embd = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        batch.pos = positions.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        batch.n_seq_id = n_sequences.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        batch.seq_id = pointers.ctypes.data_as(ctypes.POINTER(ctypes.POINTER(ctypes.c_int32)))
        batch.logits = wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
        capture_log()
        self._room.will_write(rows.sequences, rows.positions)
        with self.model.multiplying(n, is_prompt=is_prompt):
            status = int(lib.llama_decode(self.handle, batch))
            lib.llama_synchronize(self.handle)
        self._room.has_written()
        if self._hook is not None:
            self._hook.end(is_complete=status == 0, has_outputs=bool(rows.outputs.any()))
        if status == _ABORTED:
            raise Aborted
        if status != 0:
            raise DeviceError(
                f"llama_decode failed with status {status} for {n} rows at position {int(positions[0])}: "
                f"{log().reason()}."
            )

    def _check(self, rows: BatchRows) -> None:
        """Rejects batches that would make llama.cpp end the process, or read memory out of bounds."""
        n, data = len(rows), rows.data
        if not 0 < n <= self.n_ubatch or not len(rows.positions) == len(rows.sequences) == len(rows.outputs) == n:
            raise ValueError(f"cannot decode {n} rows: the batch size is {self.n_ubatch}")
        if int(rows.sequences.min()) < 0 or int(rows.sequences.max()) >= self.n_seq_max:
            raise ValueError(f"sequence {int(rows.sequences.max())}: the context has {self.n_seq_max} sequences")
        if int(rows.positions.max()) >= self.n_cells:
            raise ValueError(f"position {int(rows.positions.max())}: the sequence size is {self.n_cells} tokens")
        if int(rows.outputs.sum()) > self.max_outputs:
            raise ValueError(f"{int(rows.outputs.sum())} rows of logits: a batch gives {self.max_outputs} at most")
        if data.ndim == 1:
            if data.dtype != np.int32:
                raise ValueError(f"tokens are {data.dtype}, expected int32")
            if not 0 <= int(data.min()) <= int(data.max()) < self.model.n_vocab:
                raise ModelFileError(
                    f"the tokenizer gave token {int(data.max())}, but '{self.model.path}' has a vocabulary of "
                    f"{self.model.n_vocab}; its tokenizer does not match its weights. Convert it again."
                )
        elif data.dtype != np.float32 or data.shape[1:] != (self.model.n_embd_inp,):
            raise ValueError(
                f"rows are {data.dtype} {data.shape}, the model takes float32 (n, {self.model.n_embd_inp})"
            )

    def logits(self, row: int) -> np.ndarray:
        """Returns a copy of the logits of a row of the last batch, float32 `(n_vocab,)`; -1 is the last row that has
        logits.

        Raises ModelFileError if there are NaNs among them, ValueError if the batch asked for no logits of this row.
        """
        pointer = llama().llama_get_logits_ith(self.handle, row)
        if not pointer:
            raise ValueError(f"the last batch asked for no logits of row {row}")
        values = np.ctypeslib.as_array(pointer, shape=(self.model.n_vocab,)).copy()
        if math.isnan(float(values.sum())):
            raise ModelFileError(
                f"'{self.model.path}' computes non-finite logits, so its weights or those of its vision file or "
                "adapter are damaged; convert it again with 'granite4v convert', or download it again."
            )
        return values

    def truncate(self, sequence: int, n_tokens: int) -> bool:
        """Cuts a sequence to its first `n_tokens` positions. Returns False where the cache cannot be cut there
        (recurrent states, sliding windows): the sequence is then unchanged, and only `n_tokens` = 0 is sure to work."""
        start = n_tokens if n_tokens > 0 else -1
        is_cut = bool(llama().llama_memory_seq_rm(self._open_memory(), sequence, start, -1))
        if is_cut:
            self._room.has_cut(sequence, n_tokens)
        return is_cut

    def copy(self, source: int, target: int, n_tokens: int) -> None:
        """Makes the first `n_tokens` of `source` the contents of `target`, replacing what it held.

        Between streams llama.cpp copies only complete sequences, and ends the process when asked for a part. It copies
        at the next `decode`; until then `state` would return the old contents of `target`.
        """
        lib, memory = llama(), self._open_memory()
        lib.llama_memory_seq_cp(memory, source, target, -1, -1)
        lib.llama_memory_seq_rm(memory, target, n_tokens, -1)
        self._room.will_copy(target, n_tokens)

    def state(self, sequence: int) -> np.ndarray:
        """Returns a sequence's cells as bytes, for `restore` in a context of the same model with any number of
        sequences."""
        lib, handle = llama(), self.handle
        data = np.frombuffer(large_buffer(lib.llama_state_seq_get_size(handle, sequence)), dtype=np.uint8)
        buffer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        n = lib.llama_state_seq_get_data(handle, buffer, len(data), sequence)
        return data[:n]

    def restore(self, sequence: int, state: np.ndarray) -> None:
        """Restores a sequence's cells from `state`. Raises DeviceError when llama.cpp refuses it."""
        state = _for_streams(state, self.n_seq_max)
        n_held = state[_STATE_HEADER:][: 4 * self.n_seq_max].view(np.uint32)  # tokens of each stream; only one has any
        self._room.is_filled(sequence, int(n_held.max(initial=0)))
        data = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if llama().llama_state_seq_set_data(self.handle, data, len(state), sequence) == 0:
            raise DeviceError(f"llama.cpp cannot take over the cached sequence: {log().reason()}.")

    def _open_memory(self) -> Any:
        return self._memory if self.handle else None


def _for_streams(state: np.ndarray, n_streams: int) -> np.ndarray:
    """Rewrites a sequence's state into the form that a context with this many sequences writes, the only form that
    llama.cpp accepts. After a header of three words, the last of which is the number of streams, comes for each stream
    its number of cells and their contents: just a zero for all streams except the sequence's own. A state of another
    form is returned unchanged.

    For example, with two streams and a sequence in the second: magic, 1, 2, | 0, | 20, its 20 cells. For four streams
    it becomes: magic, 1, 4, | 20, its 20 cells, | 0, | 0, | 0.
    """
    n_words = _STATE_HEADER // 4
    header = state[:_STATE_HEADER].view(np.uint32)
    if len(header) < n_words or int(header[-1]) == n_streams:
        return state
    n_old = int(header[-1])
    occupied = np.flatnonzero(state[_STATE_HEADER : _STATE_HEADER + 4 * n_old].view(np.uint32))
    if not len(occupied):
        return state
    start, end = _STATE_HEADER + 4 * int(occupied[0]), len(state) - 4 * (n_old - 1 - int(occupied[0]))
    if state[end:].any():  # something follows the cells: a recurrent state, or another cache
        return state
    words = np.array([*header[:-1], n_streams], dtype=np.uint32)
    return np.concatenate([words.view(np.uint8), state[start:end], np.zeros(4 * (n_streams - 1), dtype=np.uint8)])
