"""Reads rows of the token embedding, for tokens that are decoded together with embeddings: a
llama_batch holds either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import BinaryIO

import numpy as np

from granite4v import gguf_keys as keys
from granite4v.errors import ModelFileError
from granite4v.ggml.backend import Backend
from granite4v.ggml.gguf_file import GgufFile
from granite4v.ggml.graph import Graph


def token_rows(file: GgufFile, tokens: Sequence[int]) -> np.ndarray:
    """Returns what llama.cpp looks up for these tokens of a text file, without an adapter: float32 `(n, n_embd)`.

    Raises ModelFileError for a file that has become shorter.
    """
    info = file.tensors[keys.TOKEN_EMBD]
    n_vocab, n_embd = info.shape
    n_bytes = info.nbytes // n_vocab
    with file.path.open("rb") as opened:
        data = b"".join(_read(opened, info.offset + token * n_bytes, n_bytes) for token in tokens)
    if len(data) != n_bytes * len(tokens):
        raise ModelFileError(f"'{file.path}' has become shorter since its header was read; open it again.")
    backend = Backend("cpu", 1)
    graph = Graph(backend, max_nodes=4)
    try:
        rows = graph.input("rows", info.type_name, n_embd, len(tokens))
        graph.output("found", graph.rows(rows, graph.input("index", "I32", len(tokens))))
        index = np.arange(len(tokens), dtype=np.int32)
        return graph.run(rows=np.frombuffer(data, np.uint8), index=index)["found"].reshape(len(tokens), n_embd)
    finally:
        graph.close()
        backend.close()


def _read(file: BinaryIO, offset: int, n_bytes: int) -> bytes:
    file.seek(offset)
    return file.read(n_bytes)
