"""Writes one GGUF file: header, metadata and tensor table through the gguf package, then the tensors' bytes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from granite4v.converter.plan import PlannedFile, aligned
from granite4v.converter.stream import stream

Advance = Callable[[int, str], None]


@dataclass(frozen=True)
class Typed:
    """A metadata value with the type that it had in another file. `kind`: its number in enum gguf_type; for a list,
    that of its elements."""

    value: Any
    kind: int
    is_list: bool


def write_file(file: PlannedFile, path: Path, n_threads: int, advance: Advance) -> None:
    """Writes `file` to `path`. `advance(n_bytes, tensor_name)` is called after every chunk.

    Raises CheckpointError when a source cannot be read, OSError when the target cannot be written.
    """
    write_header(file, path)
    start = aligned(path.stat().st_size)
    places = dict(zip((tensor.name for tensor in file.tensors), file.offsets_bytes, strict=True))
    with path.open("r+b") as out, closing(stream(file.tensors, n_threads)) as pieces:
        for chunk, data in pieces:
            out.seek(start + places[chunk.tensor.name] + chunk.offset_bytes)
            out.write(data.data)
            advance(data.nbytes, chunk.tensor.name)
        out.truncate(start + file.data_bytes)


def write_header(file: PlannedFile, path: Path) -> None:
    """Writes everything before the first tensor's bytes."""
    writer = gguf.GGUFWriter(path, file.arch)
    try:
        for key, value in file.metadata.items():
            _add(writer, key, value)
        for tensor in file.tensors:
            writer.add_tensor_info(
                tensor.name,
                tensor.shape,
                np.dtype(np.float32),  # ignored, since raw_dtype gives the type
                tensor.n_bytes,
                raw_dtype=gguf.GGMLQuantizationType[tensor.type_name],
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    """Adds a metadata value. Its Python type decides the GGUF type, which is the one that llama.cpp expects."""
    if isinstance(value, Typed):
        kind = gguf.GGUFValueType(value.kind)
        if value.is_list:
            writer.add_key_value(key, value.value, gguf.GGUFValueType.ARRAY, sub_type=kind)
        else:
            writer.add_key_value(key, value.value, kind)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, (list, tuple)):
        writer.add_array(key, value)
    else:
        raise TypeError(f"metadata '{key}' has type {type(value).__name__}")
