"""Owner of llama.cpp's context: the KV cache of a sequence. Knows nothing of images, templates or answers."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from granite4v.errors import DeviceError, ModelFileError
from granite4v.ggml.backend import Aborted
from granite4v.runtime.llama.library import Cancel, Worker, capture_log, llama, log
from granite4v.runtime.llama.model import LlamaModel
from granite4v.runtime.llama.owner import Owner

_TYPE_F32, _TYPE_F16 = 0, 1  # enum ggml_type
_FLASH_OFF, _FLASH_AUTO = 0, -1  # enum llama_flash_attn_type
_ABORTED = 2  # llama_decode's result when the abort callback said so
_N_OUTPUTS = 8  # rows of logits one batch may ask for; llama.cpp reserves memory for them (0.4 MB a row)


class LlamaContext(Owner):
    """The KV cache of one sequence and the buffers to extend it."""

    def __init__(
        self, model: LlamaModel, n_ctx: int, n_ubatch: int, n_threads: int, *, exact: bool, worker: Worker
    ) -> None:
        """`exact`: float32 KV cache and no flash attention, for comparing values rather than for speed.

        Raises DeviceError when there is not enough memory.
        """
        lib = llama()
        self.model, self.n_ctx, self.n_ubatch = model, n_ctx, n_ubatch
        self._worker = worker
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = n_ctx, n_ubatch, n_ubatch, 1
        params.n_outputs_max = min(_N_OUTPUTS, n_ubatch)
        params.n_threads = params.n_threads_batch = n_threads
        params.type_k = params.type_v = _TYPE_F32 if exact else _TYPE_F16
        params.flash_attn_type = _FLASH_OFF if exact else _FLASH_AUTO
        params.offload_kqv = params.op_offload = not model.on_cpu
        params.abort_callback = lib.ggml_abort_callback(worker.abort_address)
        params.abort_callback_data = worker.abort_data
        capture_log()
        handle = lib.llama_init_from_model(model.handle, params)
        if not handle:
            raise DeviceError(
                f"llama.cpp cannot make a context of {n_ctx} tokens: {log().reason()}. "
                "Use a smaller context (--ctx-size, n_ctx)."
            )
        self._own(handle, lib.llama_free, model, worker)
        self._memory = lib.llama_get_memory(handle)
        self.adapter_on = False

    def set_adapter(self, on: bool) -> None:
        """Applies the model's LoRA to what is decoded from now on, or stops doing so."""
        if on == self.adapter_on:
            return
        if on and not self.model.has_adapter:
            raise ValueError("the model has no adapter loaded")
        lib = llama()
        adapters = (lib.llama_adapter_lora_p_ctypes * 1)(*([self.model.adapter] if on else []))
        if lib.llama_set_adapters_lora(self.handle, adapters, 1 if on else 0, (ctypes.c_float * 1)(1.0)) != 0:
            raise DeviceError(f"llama.cpp cannot switch the adapter: {log().reason()}.")
        self.adapter_on = on

    def decode_tokens(
        self, tokens: Sequence[int], position: int, *, n_outputs: int, cancel: Cancel | None = None
    ) -> None:
        """Appends tokens at `position`; keeps logits of the last `n_outputs`. Raises Aborted when cancelled."""
        ids = np.asarray(tokens, dtype=np.int32)
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self.model.n_vocab:
            raise ModelFileError(
                f"the tokenizer gave token {int(ids.max())}, but '{self.model.path}' knows {self.model.n_vocab}; its "
                "tokenizer and its weights do not belong together. Convert it again."
            )
        self._decode("token", ids, ctypes.c_int32, position, n_outputs, cancel)

    def decode_rows(self, rows: np.ndarray, position: int, *, n_outputs: int, cancel: Cancel | None = None) -> None:
        """Appends embeddings, float32 `(n, n_embd_inp)`, at `position`. Raises Aborted when cancelled."""
        if rows.dtype != np.float32 or rows.shape[1:] != (self.model.n_embd_inp,):
            raise ValueError(
                f"rows are {rows.dtype} {rows.shape}, the model takes float32 (n, {self.model.n_embd_inp})"
            )
        self._decode("embd", np.ascontiguousarray(rows), ctypes.c_float, position, n_outputs, cancel)

    def _decode(
        self, field: str, data: np.ndarray, ctype: Any, position: int, n_outputs: int, cancel: Cancel | None
    ) -> None:
        lib, n = llama(), len(data)
        if not 0 < n <= self.n_ubatch or position + n > self.n_ctx:
            raise ValueError(
                f"cannot decode {n} tokens at {position}: batches hold {self.n_ubatch}, the context {self.n_ctx}"
            )
        if n_outputs > min(n, _N_OUTPUTS):
            raise ValueError(f"a batch of {n} tokens cannot give {n_outputs} rows of logits (at most {_N_OUTPUTS})")
        positions = np.arange(position, position + n, dtype=np.int32)
        wanted = np.zeros(n, dtype=np.int8)
        wanted[n - n_outputs :] = 1
        batch = lib.llama_batch(n_tokens=n)  # no n_seq_id and seq_id: everything is sequence 0
        setattr(batch, field, data.ctypes.data_as(ctypes.POINTER(ctype)))
        batch.pos = positions.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        batch.logits = wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
        handle = self.handle

        def call() -> int:
            status = int(lib.llama_decode(handle, batch))
            lib.llama_synchronize(handle)
            return status

        capture_log()
        status = self._worker.run(call, cancel)
        if status == _ABORTED:
            raise Aborted
        if status != 0:
            raise DeviceError(f"llama_decode failed with status {status} at token {position}: {log().reason()}.")

    def logits(self, row: int = -1) -> np.ndarray:
        """A copy of the logits of the last batch, float32 `(n_vocab,)`; -1 is the last token's."""
        pointer = llama().llama_get_logits_ith(self.handle, row)
        if not pointer:
            raise ValueError("the last batch asked for no logits")
        values = np.ctypeslib.as_array(pointer, shape=(self.model.n_vocab,)).copy()
        if math.isnan(float(values.sum())):
            raise ModelFileError(
                f"'{self.model.path}' computes logits that are not numbers, so its weights or those of its vision file "
                "or adapter are damaged; convert it again with 'granite4v convert', or download it again."
            )
        return values

    def truncate(self, n_tokens: int) -> None:
        """Forgets everything from position `n_tokens` on."""
        llama().llama_memory_seq_rm(self._open_memory(), 0, n_tokens, -1)

    def state(self) -> np.ndarray:
        """The cached sequence as bytes, for `restore` in another context of the same model."""
        lib, handle = llama(), self.handle
        data = np.empty(lib.llama_state_seq_get_size(handle, 0), dtype=np.uint8)
        n = lib.llama_state_seq_get_data(handle, data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)), len(data), 0)
        return data[:n]

    def restore(self, state: np.ndarray) -> None:
        lib = llama()
        data = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if lib.llama_state_seq_set_data(self.handle, data, len(state), 0) == 0:
            raise DeviceError(f"llama.cpp cannot take over the cached sequence: {log().reason()}.")

    def _open_memory(self) -> Any:
        return self._memory if self.handle else None
