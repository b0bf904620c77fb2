"""A GGUF file's header: metadata and where each tensor lies. Reads no weights.

ggml's own reader parses it (fast with vocabularies of 100,000 entries, and the same verdict on a broken
header as llama.cpp's). What ggml leaves unchecked is checked here: that the tensors lie inside the file.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from granite4v.errors import ModelFileError
from granite4v.ggml.library import lib
from granite4v.ggml.types import type_name

MAGIC = b"GGUF"
_STRING, _ARRAY, _BOOL = 8, 9, 7  # enum gguf_type
_C_TYPES: dict[int, Any] = {
    0: ctypes.c_uint8,
    1: ctypes.c_int8,
    2: ctypes.c_uint16,
    3: ctypes.c_int16,
    4: ctypes.c_uint32,
    5: ctypes.c_int32,
    6: ctypes.c_float,
    7: ctypes.c_int8,
    10: ctypes.c_uint64,
    11: ctypes.c_int64,
    12: ctypes.c_double,
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies. `shape` is NumPy's order, slowest first; `offset` counts from the file's start."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    offset: int
    nbytes: int


class GgufFile(Mapping[str, Any]):
    """The metadata of one GGUF file as a mapping, and its tensors by name.

    Values are read when they are asked for: str, int, float, bool, or a list of them.
    """

    def __init__(self, path: str | Path) -> None:
        """Raises ModelFileError for a file that is missing, not GGUF, malformed or cut short."""
        self.path = Path(path)
        size = _check_magic(self.path)
        handle = lib().gguf_init_from_file(str(self.path).encode(), _no_alloc())
        if not handle:
            raise ModelFileError(
                f"'{self.path}' begins like a GGUF file, but its header is broken or cut short ({size:,} bytes); "
                "copy or convert it again."
            )
        self._handle: Any = handle
        try:
            keys = (lib().gguf_get_key(handle, i).decode() for i in range(lib().gguf_get_n_kv(handle)))
            self._ids = {key: i for i, key in enumerate(keys)}
            self.tensors = self._read_tensors(size)
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, path: str | Path) -> GgufFile:
        """Same as the constructor; reads well in a `with`."""
        return cls(path)

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self

    def __getitem__(self, key: str) -> Any:
        if not self._handle:
            raise ValueError(f"'{self.path}' is closed")
        return self._value(self._ids[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._ids)

    def _value(self, i: int) -> Any:
        gguf, handle = lib(), self._handle
        kind = gguf.gguf_get_kv_type(handle, i)
        if kind == _STRING:
            return gguf.gguf_get_val_str(handle, i).decode("utf-8", "replace")
        if kind != _ARRAY:
            value = _C_TYPES[kind].from_address(gguf.gguf_get_val_data(handle, i)).value
            return bool(value) if kind == _BOOL else value
        n, kind = gguf.gguf_get_arr_n(handle, i), gguf.gguf_get_arr_type(handle, i)
        if kind == _STRING:
            return [gguf.gguf_get_arr_str(handle, i, j).decode("utf-8", "replace") for j in range(n)]
        if n == 0:
            return []
        values = list((_C_TYPES[kind] * n).from_address(gguf.gguf_get_arr_data(handle, i)))
        return [bool(value) for value in values] if kind == _BOOL else values

    def _read_tensors(self, file_size: int) -> dict[str, TensorInfo]:
        gguf, handle = lib(), self._handle
        start = gguf.gguf_get_data_offset(handle)
        tensors = {}
        for i in range(gguf.gguf_get_n_tensors(handle)):
            name = gguf.gguf_get_tensor_name(handle, i).decode()
            ne = gguf.gguf_get_tensor_ne(handle, i)
            dims = [ne[d] for d in range(4)]
            while len(dims) > 1 and dims[-1] == 1:
                dims.pop()
            info = TensorInfo(
                name=name,
                shape=tuple(reversed(dims)),
                type_name=type_name(gguf.gguf_get_tensor_type(handle, i)),
                offset=start + gguf.gguf_get_tensor_offset(handle, i),
                nbytes=gguf.gguf_get_tensor_size(handle, i),
            )
            if info.offset + info.nbytes > file_size:
                raise ModelFileError(
                    f"'{self.path}' is cut short: tensor '{name}' should end at byte {info.offset + info.nbytes:,}, "
                    f"the file has {file_size:,}; copy or convert it again."
                )
            tensors[name] = info
        return tensors

    def close(self) -> None:
        handle, self._handle = getattr(self, "_handle", None), None
        if handle:
            lib().gguf_free(handle)

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def _no_alloc() -> Any:
    from granite4v.ggml.declarations import GgufInitParams

    return GgufInitParams(no_alloc=True, ctx=None)


def _check_magic(path: Path) -> int:
    """The file's size in bytes; raises ModelFileError unless it is a readable file that starts with 'GGUF'."""
    try:
        with path.open("rb") as file:
            magic, size = file.read(4), file.seek(0, 2)
    except OSError as error:
        raise ModelFileError(f"cannot read '{path}': {error.strerror or error}.") from None
    if magic != MAGIC:
        raise ModelFileError(
            f"'{path}' is not a GGUF file: it begins with {magic!r}, expected {MAGIC!r}. Give a file that "
            "'granite4v convert' or llama.cpp wrote."
        )
    return size
