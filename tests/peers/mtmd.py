"""Answers about an image with stock llama.cpp (libllama and libmtmd, as llama-cpp-python ships them).

The peer in side-by-side figures and numerical tests. It uses nothing of granite4v. The last line on stdout is one JSON
object: image tokens, seconds of image encoding and of image prefill, decoded tokens per second, peak memory.

    python -m tests.peers.mtmd TEXT.gguf MMPROJ.gguf IMAGE --raw "...{media}..." --predict 32 [--save DIR]

llama.cpp puts weights into whatever special buffer type the CPU advertises. If that ends the process (a virtual machine
that advertises AMX and faults), run it with --plain-weights.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import mtmd_cpp
from PIL import Image

QUIET = llama_cpp.llama_log_callback(lambda *_: None)
F32 = 0  # enum ggml_type
NO_FLASH_ATTENTION = 0


class Peer:
    """One text and vision pair in stock llama.cpp, with its context, which lives until the process ends."""

    def __init__(self, options: argparse.Namespace) -> None:
        llama_cpp.llama_log_set(QUIET, None)
        mtmd_cpp.mtmd_helper_log_set(QUIET, None)
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        if options.plain_weights:
            model_params.use_extra_bufts = False
        if options.cpu:
            model_params.n_gpu_layers = 0
        self.model = _made(llama_cpp.llama_model_load_from_file(os.fsencode(options.text), model_params), options.text)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = options.ctx, max(2048, options.ubatch), options.ubatch
        params.n_threads = params.n_threads_batch = options.threads
        vision = mtmd_cpp.mtmd_context_params_default()
        vision.use_gpu, vision.n_threads = not options.cpu, options.threads
        vision.print_timings = vision.warmup = False
        if options.exact:
            params.type_k = params.type_v = F32
            params.flash_attn_type = vision.flash_attn_type = NO_FLASH_ATTENTION
        self.n_batch = params.n_batch
        self.context = _made(llama_cpp.llama_init_from_model(self.model, params), "the context")
        self.vision = _made(
            mtmd_cpp.mtmd_init_from_file(os.fsencode(options.mmproj), self.model, vision), options.mmproj
        )
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.n_embd_inp = llama_cpp.llama_model_n_embd_inp(self.model)
        self.n_past = 0
        self._encode_only = options.encode_only
        self.seconds = {"encode_s": 0.0, "prefill_s": 0.0, "prefill_text_s": 0.0}
        self.n_image = 0
        self.embeddings: list[np.ndarray] = []

    def prefill(self, raw: str, pictures: list[Image.Image], keep_embeddings: bool) -> None:
        """Encodes and decodes the prompt `raw`, with one '{media}' for each image.

        With --encode-only the images are encoded and nothing is decoded.
        """
        chunks = self._cut(raw, pictures)
        n_chunks = mtmd_cpp.mtmd_input_chunks_size(chunks)
        for i in range(n_chunks):
            chunk = mtmd_cpp.mtmd_input_chunks_get(chunks, i)
            if mtmd_cpp.mtmd_input_chunk_get_type(chunk) == mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_IMAGE:
                self._image_chunk(chunk, keep_embeddings)
            elif not self._encode_only:
                self._text_chunk(chunk, is_last=i == n_chunks - 1)

    def _cut(self, raw: str, pictures: list[Image.Image]) -> Any:
        marker = mtmd_cpp.mtmd_default_marker().decode()
        text = mtmd_cpp.mtmd_input_text()
        text.text = raw.replace("{media}", marker).encode()
        text.text_len = len(text.text)
        text.add_special, text.parse_special = False, True
        bitmaps = (mtmd_cpp.mtmd_bitmap_p_ctypes * len(pictures))(*map(_bitmap, pictures))
        chunks = mtmd_cpp.mtmd_input_chunks_init()
        status = mtmd_cpp.mtmd_tokenize(self.vision, chunks, ctypes.byref(text), bitmaps, len(pictures))
        _done(status, "mtmd_tokenize")
        return chunks

    def _image_chunk(self, chunk: Any, keep_embeddings: bool) -> None:
        n_tokens = mtmd_cpp.mtmd_input_chunk_get_n_tokens(chunk)
        with self._timed("encode_s"):
            _done(mtmd_cpp.mtmd_encode_chunk(self.vision, chunk), "mtmd_encode_chunk")
        rows = mtmd_cpp.mtmd_get_output_embd(self.vision)
        if keep_embeddings:
            flat = np.ctypeslib.as_array(rows, shape=(n_tokens * self.n_embd_inp,))
            self.embeddings.append(flat.reshape(n_tokens, self.n_embd_inp).copy())
        self.n_image += n_tokens
        if self._encode_only:
            return
        n_past = llama_cpp.llama_pos(self.n_past)
        no_callback = mtmd_cpp.mtmd_helper_post_decode_callback()
        with self._timed("prefill_s"):
            status = mtmd_cpp.mtmd_helper_decode_image_chunk(
                self.vision,
                self.context,
                chunk,
                rows,
                self.n_past,
                0,
                self.n_batch,
                ctypes.byref(n_past),
                no_callback,
                None,
            )
            llama_cpp.llama_synchronize(self.context)
        _done(status, "mtmd_helper_decode_image_chunk")
        self.n_past = n_past.value

    def _text_chunk(self, chunk: Any, is_last: bool) -> None:
        n_past = llama_cpp.llama_pos(self.n_past)
        with self._timed("prefill_text_s"):
            status = mtmd_cpp.mtmd_helper_eval_chunk_single(
                self.vision, self.context, chunk, self.n_past, 0, self.n_batch, is_last, ctypes.byref(n_past)
            )
            llama_cpp.llama_synchronize(self.context)
        _done(status, "mtmd_helper_eval_chunk_single")
        self.n_past = n_past.value

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    def logits(self) -> np.ndarray:
        """Returns a copy of the last position's logits, float32 (n_vocab,)."""
        pointer = llama_cpp.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(pointer, shape=(self.n_vocab,)).copy()

    def greedy(self, n: int) -> tuple[list[int], float]:
        """Returns the next `n` greedy tokens, whatever they are, and the tokens per second."""
        batch = llama_cpp.llama_batch_init(1, 0, 1)
        tokens: list[int] = []
        start = time.perf_counter()
        for _ in range(n):
            tokens.append(int(self.logits().argmax()))
            batch.n_tokens = batch.n_seq_id[0] = batch.logits[0] = 1
            batch.token[0], batch.pos[0], batch.seq_id[0][0] = tokens[-1], self.n_past, 0
            _done(llama_cpp.llama_decode(self.context, batch), "llama_decode")
            self.n_past += 1
        return tokens, n / (time.perf_counter() - start) if n else 0.0


def _bitmap(picture: Image.Image) -> Any:
    pixels = np.ascontiguousarray(np.asarray(picture.convert("RGB")))
    data = (ctypes.c_uint8 * pixels.nbytes).from_buffer_copy(pixels.tobytes())
    return mtmd_cpp.mtmd_bitmap_init(pixels.shape[1], pixels.shape[0], data)


def _made(handle: Any, what: object) -> Any:
    if not handle:
        raise SystemExit(f"llama.cpp cannot make or load {what}")
    return handle


def _done(status: int, function: str) -> None:
    if status != 0:
        raise SystemExit(f"{function} returned {status}")


def peak_rss_gb() -> float:
    """Returns this process's peak resident memory in GB (10^9 bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, help="text GGUF")
    parser.add_argument("mmproj", type=Path, help="vision GGUF")
    parser.add_argument("image", type=Path, nargs="*", help="pictures, in the order of their places")
    parser.add_argument("--raw", required=True, help="the whole prompt, '{media}' where a picture goes")
    parser.add_argument("--predict", type=int, default=16, help="tokens to decode")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--ubatch", type=int, default=512)
    parser.add_argument("--ctx", type=int, default=4096)
    parser.add_argument("--exact", action="store_true", help="float32 cache, no flash attention: to compare values")
    parser.add_argument("--encode-only", action="store_true", help="encode the pictures, decode nothing")
    parser.add_argument("--plain-weights", action="store_true", help="no special buffer types for weights")
    parser.add_argument("--cpu", action="store_true", help="leave a GPU alone")
    parser.add_argument("--save", type=Path, help="write embeddings-N.npy, logits.npy and tokens.json here")
    options = parser.parse_args()
    peer = Peer(options)
    peer.prefill(options.raw, [Image.open(path) for path in options.image], keep_embeddings=options.save is not None)
    if options.save:
        options.save.mkdir(parents=True, exist_ok=True)
        for i, rows in enumerate(peer.embeddings):
            np.save(options.save / f"embeddings-{i}.npy", rows)
    tokens_per_s = 0.0 if options.encode_only else decode(peer, options)
    result = {"image_tokens": peer.n_image, **peer.seconds, "decode_tok_s": tokens_per_s, "peak_rss_gb": peak_rss_gb()}
    print(json.dumps({name: round(value, 4) for name, value in result.items()}))


def decode(peer: Peer, options: argparse.Namespace) -> float:
    """Decodes the requested tokens and saves them if requested; returns the tokens per second."""
    first_logits = peer.logits()
    tokens, tokens_per_s = peer.greedy(options.predict)
    if options.save:
        np.save(options.save / "logits.npy", first_logits)
        (options.save / "tokens.json").write_text(json.dumps(tokens))
    return tokens_per_s


if __name__ == "__main__":
    main()
