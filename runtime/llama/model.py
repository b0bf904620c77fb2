"""Owns llama.cpp's model: weights, vocabulary, adapter. Knows nothing of images, templates or answers."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from pathlib import Path
from typing import Any, Protocol

from granite4v.errors import ModelFileError
from granite4v.ggml.backend import find_device, is_cpu
from granite4v.runtime.llama.library import capture_log, llama, log
from granite4v.runtime.llama.owner import Owner

_LOAD_MMAP = 1  # enum llama_load_mode
_ALL_LAYERS = -1


class Copies(Protocol):
    """Copies of the model's weights in other forms (see `weight_copies`)."""

    def used_for(self, n_rows: int, *, is_prompt: bool) -> contextlib.AbstractContextManager[None]: ...
    def close(self) -> None: ...


class LlamaModel(Owner):
    """The weights and the vocabulary of one text GGUF, and its adapter if one is loaded."""

    def __init__(self, path: Path, *, device: str = "cpu", vocab_only: bool = False) -> None:
        """Maps the weights from the file.

        Raises ModelFileError with llama.cpp's reason when it cannot load the file, DeviceError when the device is
        missing.
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
        params.use_extra_bufts = False  # llama.cpp's own choice; `weight_copies` makes a measured one
        params.load_mode = _LOAD_MMAP
        capture_log()
        handle = lib.llama_model_load_from_file(os.fsencode(path), params)
        if not handle:
            raise ModelFileError(
                f"llama.cpp cannot load '{path}': {log().reason()}. Convert it again with 'granite4v convert', or "
                "check that the file is a text model."
            )
        self._copies: list[Copies] = []
        self._own(handle, functools.partial(_free, self._copies))
        self.on_cpu = on_cpu
        self.vocab: Any = lib.llama_model_get_vocab(handle)
        self.n_vocab = int(lib.llama_vocab_n_tokens(self.vocab))
        self.n_embd = int(lib.llama_model_n_embd(handle)) if not vocab_only else 0
        self.n_embd_inp = int(lib.llama_model_n_embd_inp(handle)) if not vocab_only else 0

    # --- copies of weights ---

    def use_copies(self, copies: Copies) -> None:
        """Uses these copies from now on, and closes them with the model."""
        self._copies.append(copies)

    def multiplying(self, n_rows: int, *, is_prompt: bool = False) -> contextlib.AbstractContextManager[None]:
        """Selects the weights for a batch of `n_rows` rows, of a prompt or of a decode step, inside the block."""
        return self._copies[0].used_for(n_rows, is_prompt=is_prompt) if self._copies else contextlib.nullcontext()

    # --- vocabulary ---

    def tokenize(self, text: str, *, plain: bool = False) -> list[int]:
        """Returns the ids of `text`. Special tokens are recognised, and added as the file's settings say; neither if
        `plain`."""
        lib, data = llama(), text.encode()
        room = len(data) + 8  # a token covers at least one byte; the rest is for added tokens
        ids = (ctypes.c_int32 * room)()
        n = lib.llama_tokenize(self._open_vocab(), data, len(data), ids, room, not plain, not plain)
        if n < 0:
            raise ValueError(f"llama_tokenize needs room for {-n} tokens, {room} were expected to suffice")
        return list(ids[:n])

    def piece(self, token: int) -> bytes:
        """The bytes of a token's text; none for a special token."""
        lib, room = llama(), 256
        buffer = ctypes.create_string_buffer(room)
        n = lib.llama_token_to_piece(self._open_vocab(), token, buffer, room, 0, False)
        if n < 0:  # minus the room needed
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
        """Loads a LoRA, which a context applies once switched on. Raises ModelFileError when it does not fit."""
        capture_log()
        adapter = llama().llama_adapter_lora_init(self.handle, os.fsencode(path))
        if not adapter:
            raise ModelFileError(
                f"the adapter '{path}' does not fit '{self.path}': {log().reason()}. Use the adapter that was "
                "converted together with this model."
            )
        self._adapter = adapter


def _free(copies: list[Copies], handle: Any) -> None:
    while copies:
        copies.pop().close()
    llama().llama_model_free(handle)  # frees its adapters too


def _device_list(name: str) -> Any:
    """Returns a NULL-terminated array of ggml devices for llama.cpp; it is empty for the CPU alone."""
    device = find_device(name)
    return (ctypes.c_void_p * 2)(None if is_cpu(device) else device.value, None)
