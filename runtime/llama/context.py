"""Owners of llama.cpp's model and context. Nothing here knows of pictures, templates or answers.

Both have `close()`, work in a `with`, may be closed twice, and raise ValueError when used afterwards.
"""

from __future__ import annotations

import ctypes
import math
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from granite4v.errors import DeviceError, ModelFileError
from granite4v.ggml.backend import Aborted
from granite4v.runtime.llama.library import Cancel, Worker, listen, llama, log

if TYPE_CHECKING:
    import numpy as np

    from granite4v.runtime.llama.placement import Placement

_TYPE_F32, _TYPE_F16 = 0, 1  # enum ggml_type
_FLASH_OFF, _FLASH_AUTO = 0, -1  # enum llama_flash_attn_type
_LOAD_PLAIN, _LOAD_MMAP = 0, 1  # enum llama_load_mode
_ALL_LAYERS = -1
_ABORTED = 2  # llama_decode's result when the abort callback said so
_N_OUTPUTS = 8  # rows of logits one batch may ask for; llama.cpp reserves memory for them (0.4 MB a row)


class _Owner:
    """A C handle that is freed once: by `close`, by the garbage collector, or at exit (the youngest first)."""

    def _own(self, handle: Any, free: Callable[..., Any], *kept_alive: Any) -> None:
        """`kept_alive` are objects that C still uses until the handle is freed."""
        self._handle = handle
        self._finalizer = weakref.finalize(self, _free, free, handle, kept_alive)

    @property
    def handle(self) -> Any:
        if not self._finalizer.alive:
            raise ValueError(f"the {type(self).__name__} is closed")
        return self._handle

    def close(self) -> None:
        finalizer = getattr(self, "_finalizer", None)
        if finalizer is not None:
            finalizer()

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _free(free: Callable[..., Any], handle: Any, kept_alive: tuple[Any, ...]) -> None:
    free(handle)


class LlamaModel(_Owner):
    """The weights and the vocabulary of one text GGUF, and its adapter if one is loaded."""

    def __init__(
        self, path: Path, *, device: str = "cpu", placement: Placement | None = None, vocab_only: bool = False
    ) -> None:
        """`placement` says which buffer types hold the weights on the CPU; without it all stay mapped from the file.

        Raises ModelFileError with llama.cpp's reason when it cannot load the file, DeviceError when the device
        is missing.
        """
        self.path = path
        self._adapter: Any = None
        lib = llama()
        params = lib.llama_model_default_params()
        params.vocab_only = vocab_only
        devices = _device_list(device)
        params.devices = ctypes.cast(devices, ctypes.c_void_p)
        on_cpu = devices[0] is None
        params.n_gpu_layers = 0 if on_cpu else _ALL_LAYERS
        params.use_extra_bufts = False
        overrides = placement.overrides() if placement and on_cpu else None
        if overrides is not None:
            params.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p)
        params.load_mode = _LOAD_MMAP if overrides is None else _LOAD_PLAIN
        listen()
        handle = lib.llama_model_load_from_file(os.fsencode(path), params)
        if not handle:
            raise ModelFileError(
                f"llama.cpp cannot load '{path}': {log().reason()}. Convert it again with 'granite4v convert', or "
                "check that the file is a text model."
            )
        self._own(handle, lib.llama_model_free)  # frees its adapters too
        self.on_cpu = on_cpu
        self.vocab: Any = lib.llama_model_get_vocab(handle)
        self.n_vocab = int(lib.llama_vocab_n_tokens(self.vocab))
        self.n_embd = int(lib.llama_model_n_embd(handle)) if not vocab_only else 0
        self.n_embd_inp = int(lib.llama_model_n_embd_inp(handle)) if not vocab_only else 0

    # --- vocabulary ---

    def tokenize(self, text: str, *, plain: bool = False) -> list[int]:
        """Ids of `text`, with special tokens recognised, and what the file says is added; neither if `plain`."""
        lib, data = llama(), text.encode()
        room = len(data) + 8
        ids = (ctypes.c_int32 * room)()
        n = lib.llama_tokenize(self._open_vocab(), data, len(data), ids, room, not plain, not plain)
        if n < 0:
            raise ValueError(f"llama_tokenize needs room for {-n} tokens, {room} were expected to do")
        return list(ids[:n])

    def piece(self, token: int) -> bytes:
        """The bytes a token stands for; none for a special token."""
        lib, room = llama(), 256
        buffer = ctypes.create_string_buffer(room)
        n = lib.llama_token_to_piece(self._open_vocab(), token, buffer, room, 0, False)
        if n < 0:  # it tells how much room it needs
            room = -n
            buffer = ctypes.create_string_buffer(room)
            n = lib.llama_token_to_piece(self._open_vocab(), token, buffer, room, 0, False)
        return buffer.raw[: max(n, 0)]

    def _open_vocab(self) -> Any:
        return self.vocab if self.handle else None

    # --- adapter ---

    @property
    def has_adapter(self) -> bool:
        return bool(self._adapter)

    @property
    def adapter(self) -> Any:
        return self._adapter

    def load_adapter(self, path: Path) -> None:
        """Loads a LoRA; a context applies it once it is switched on. Raises ModelFileError when it does not fit."""
        listen()
        adapter = llama().llama_adapter_lora_init(self.handle, os.fsencode(path))
        if not adapter:
            raise ModelFileError(
                f"the adapter '{path}' does not fit '{self.path}': {log().reason()}. Use the adapter that was "
                "converted together with this model."
            )
        self._adapter = adapter


def _device_list(name: str) -> Any:
    """A NULL-terminated array of ggml devices for llama.cpp; it holds none for the CPU alone."""
    from granite4v.ggml.backend import find_device
    from granite4v.ggml.library import lib

    device = find_device(name)
    is_cpu = lib().ggml_backend_dev_type(device) == 0  # GGML_BACKEND_DEVICE_TYPE_CPU
    return (ctypes.c_void_p * 2)(None if is_cpu else device.value, None)


class LlamaContext(_Owner):
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
        listen()
        handle = lib.llama_init_from_model(model.handle, params)
        if not handle:
            raise DeviceError(
                f"llama.cpp cannot make a context of {n_ctx} tokens: {log().reason()}. Use a smaller context ('--ctx')."
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
        import numpy as np

        ids = np.asarray(tokens, dtype=np.int32)
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self.model.n_vocab:
            raise ModelFileError(
                f"the tokenizer gave token {int(ids.max())}, but '{self.model.path}' knows {self.model.n_vocab}; its "
                "tokenizer and its weights do not belong together. Convert it again."
            )
        self._decode("token", ids, ctypes.c_int32, position, n_outputs, cancel)

    def decode_rows(self, rows: np.ndarray, position: int, *, n_outputs: int, cancel: Cancel | None = None) -> None:
        """Appends embeddings, float32 `(n, n_embd_inp)`, at `position`. Raises Aborted when cancelled."""
        import numpy as np

        if rows.dtype != np.float32 or rows.shape[1:] != (self.model.n_embd_inp,):
            raise ValueError(
                f"rows are {rows.dtype} {rows.shape}, the model takes float32 (n, {self.model.n_embd_inp})"
            )
        self._decode("embd", np.ascontiguousarray(rows), ctypes.c_float, position, n_outputs, cancel)

    def _decode(
        self, field: str, data: np.ndarray, ctype: Any, position: int, n_outputs: int, cancel: Cancel | None
    ) -> None:
        import numpy as np

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

        listen()
        status = self._worker.run(call, cancel)
        if status == _ABORTED:
            raise Aborted
        if status != 0:
            raise DeviceError(f"llama_decode failed with status {status} at token {position}: {log().reason()}.")

    def logits(self, row: int = -1) -> np.ndarray:
        """A copy of the logits of the last batch, float32 `(n_vocab,)`; -1 is the last token's."""
        import numpy as np

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
        import numpy as np

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
