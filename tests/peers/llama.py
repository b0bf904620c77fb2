"""Stock llama.cpp through llama-cpp-python's own declarations: its loader, decoder and quantizer.

Imported by tests only; uses none of our code. Weights stay in plain buffers ('use_extra_bufts' off), because some
machines advertise AMX and fault in it.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp as lc
import numpy as np
from llama_cpp import mtmd_cpp as mt

_quiet = lc.llama_log_callback(lambda *_: None)


class LlamaPeer:
    """A text GGUF, with F32 keys and values and no flash attention, so that values compare exactly."""

    def __init__(self, path: Path, n_ctx: int = 512) -> None:
        lc.llama_log_set(_quiet, None)
        lc.llama_backend_init()
        params = lc.llama_model_default_params()
        params.use_extra_bufts = False
        self.model = lc.llama_model_load_from_file(str(path).encode(), params)
        assert self.model, f"llama.cpp cannot load {path}"
        settings = lc.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = n_ctx
        settings.type_k = settings.type_v = 0  # F32
        settings.flash_attn_type = 0
        settings.n_threads = settings.n_threads_batch = 2
        self.context = lc.llama_init_from_model(self.model, settings)
        assert self.context
        self.vocab = lc.llama_model_get_vocab(self.model)
        self.n_vocab = lc.llama_vocab_n_tokens(self.vocab)

    def tokenize(self, text: str) -> list[int]:
        data = text.encode()
        ids = (lc.llama_token * (len(data) + 8))()
        n = lc.llama_tokenize(self.vocab, data, len(data), ids, len(ids), False, True)
        assert n >= 0
        return list(ids[:n])

    def adds_bos(self) -> bool:
        return bool(lc.llama_vocab_get_add_bos(self.vocab))

    def logits(self, given: Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns logits, float32 (n_tokens, n_vocab), from an empty context. `given`: tokens, or their rows, float32
        (n, n_embd)."""
        lc.llama_memory_clear(lc.llama_get_memory(self.context), True)
        ids, rows = (given, None) if not isinstance(given, np.ndarray) else ((), given)
        batch = lc.llama_batch_init(len(given), 0 if rows is None else rows.shape[1], 1)
        batch.n_tokens = len(given)
        for i in range(len(given)):
            batch.pos[i], batch.n_seq_id[i], batch.logits[i] = i, 1, 1
            batch.seq_id[i][0] = 0
        for i, token in enumerate(ids):
            batch.token[i] = token
        if rows is not None:
            ctypes.memmove(batch.embd, rows.ctypes.data, rows.nbytes)
        assert lc.llama_decode(self.context, batch) == 0
        found = np.ctypeslib.as_array(lc.llama_get_logits(self.context), shape=(len(given), self.n_vocab)).copy()
        lc.llama_batch_free(batch)
        return found

    @contextlib.contextmanager
    def adapter(self, path: Path, scale: float = 1.0) -> Iterator[None]:
        """Applies a GGUF LoRA adapter until the block ends."""
        handle = lc.llama_adapter_lora_init(self.model, str(path).encode())
        assert handle, f"llama.cpp cannot load the adapter {path}"
        adapters = (lc.llama_adapter_lora_p_ctypes * 1)(handle)
        lc.llama_set_adapters_lora(self.context, adapters, 1, (ctypes.c_float * 1)(scale))
        yield
        lc.llama_set_adapters_lora(self.context, adapters, 0, (ctypes.c_float * 1)(scale))

    def close(self) -> None:
        lc.llama_free(self.context)
        lc.llama_model_free(self.model)

    def __enter__(self) -> LlamaPeer:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def quantize(source: Path, target: Path, type_name: str) -> None:
    """Quantizes a file with llama.cpp's own quantizer, without an importance matrix."""
    lc.llama_log_set(_quiet, None)
    params = lc.llama_model_quantize_default_params()
    params.ftype = getattr(lc, "LLAMA_FTYPE_ALL_F32" if type_name == "F32" else f"LLAMA_FTYPE_MOSTLY_{type_name}")
    params.nthread = 2
    assert lc.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)) == 0


def encode_image(text: Path, mmproj: Path, pixels: np.ndarray) -> np.ndarray:
    """Encodes uint8 (height, width, 3) with libmtmd: float32 (n_tokens, n_embd_inp), streams side by side. Returns the
    last piece."""
    return encode_pieces(text, mmproj, pixels)[-1]


def encode_pieces(text: Path, mmproj: Path, pixels: np.ndarray) -> list[np.ndarray]:
    """Returns the same for each piece into which libmtmd cuts the image, in the order of its prompt."""
    mt.mtmd_helper_log_set(_quiet, None)
    with LlamaPeer(text) as peer:
        params = mt.mtmd_context_params_default()
        params.use_gpu, params.n_threads, params.print_timings, params.warmup = False, 2, False, False
        params.flash_attn_type = 0
        context = mt.mtmd_init_from_file(str(mmproj).encode(), peer.model, params)
        assert context, f"libmtmd cannot load {mmproj}"
        pixels = np.ascontiguousarray(pixels)
        data = (ctypes.c_uint8 * pixels.nbytes).from_buffer_copy(pixels.tobytes())
        bitmap = mt.mtmd_bitmap_init(pixels.shape[1], pixels.shape[0], data)
        text_in = mt.mtmd_input_text()
        text_in.text = mt.mtmd_default_marker()
        text_in.text_len = len(text_in.text)
        text_in.add_special, text_in.parse_special = False, True
        chunks = mt.mtmd_input_chunks_init()
        bitmaps = (mt.mtmd_bitmap_p_ctypes * 1)(bitmap)
        assert mt.mtmd_tokenize(context, chunks, ctypes.byref(text_in), bitmaps, 1) == 0
        width, pieces = lc.llama_model_n_embd_inp(peer.model), []
        for i in range(mt.mtmd_input_chunks_size(chunks)):
            chunk = mt.mtmd_input_chunks_get(chunks, i)
            if mt.mtmd_input_chunk_get_type(chunk) == mt.MTMD_INPUT_CHUNK_TYPE_IMAGE:
                assert mt.mtmd_encode_chunk(context, chunk) == 0
                n_tokens = mt.mtmd_input_chunk_get_n_tokens(chunk)
                out = np.ctypeslib.as_array(mt.mtmd_get_output_embd(context), shape=(n_tokens * width,))
                pieces.append(out.reshape(n_tokens, width).copy())
        mt.mtmd_input_chunks_free(chunks)
        mt.mtmd_bitmap_free(bitmap)
        mt.mtmd_free(context)
        return pieces
