"""Parses and checks the header of a GGUF file: metadata and the offset of each tensor. Reads no weights.

ggml's own reader prints its error messages to stderr, and both it and llama.cpp trust the numbers in a file: a wrong
one aborts the process or causes an out-of-bounds read. So every count, length, type, shape and offset is checked here
first, and a wrong one raises an error with a message. Strings are skipped without decoding them: 300,000 take some
40 ms. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import stat
import struct
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from granite4v import gguf_keys as keys
from granite4v.errors import ModelFileError
from granite4v.ggml.library import TESTED_VERSION
from granite4v.ggml.types import TYPE_NAMES, TYPES

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMS = 4  # GGML_MAX_DIMS
MAX_NAME_BYTES = 63  # GGML_MAX_NAME - 1
MAX_ALIGNMENT = 1 << 20
MAX_HEADER_BYTES = 512 << 20  # the longest published ones, with vocabulary and tokenizer.json, have some 30 MB
MAX_KEYS, MAX_TENSORS, MAX_ARRAY = 1 << 16, 1 << 18, 1 << 24
STRING, ARRAY, _BOOL = 8, 9, 7  # enum gguf_type
# struct format characters of enum gguf_type; for a bool any byte is accepted
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_AGAIN = "copy or convert it again"
_LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class TensorInfo:
    """Location of a tensor in the file. `shape` is in NumPy's order, slowest axis first; `offset` is from the start of
    the file."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Field:
    """A value that is not decoded yet: its type, offset of its first byte, and for a list its number of elements."""

    kind: int
    start: int
    n: int | None = None

    def decode(self, data: bytes) -> Any:
        """Decodes the value: str, int, float or bool, or a list of one of these."""
        if self.kind == STRING:
            position, texts = self.start, []
            for _ in range(1 if self.n is None else self.n):
                end = position + 8 + _U64.unpack_from(data, position)[0]
                texts.append(data[position + 8 : end].decode("utf-8", "replace"))
                position = end
            return texts[0] if self.n is None else texts
        values: list[Any] = list(
            struct.unpack_from(f"<{1 if self.n is None else self.n}{_FORMATS[self.kind]}", data, self.start)
        )
        if self.kind == _BOOL:
            values = [bool(value) for value in values]
        return values[0] if self.n is None else values


@dataclass(frozen=True)
class Header:
    """A parsed header: its bytes, its fields by key, and its tensors by name."""

    data: bytes
    fields: dict[str, Field]
    tensors: dict[str, TensorInfo]


def read_header(path: Path) -> Header:
    """Parses the header of a GGUF file. Raises ModelFileError when it is missing, not GGUF, malformed, cut short, or
    newer than this ggml."""
    try:
        with _open_regular(path) as file:
            start, size = file.read(24), os.fstat(file.fileno()).st_size
            _check_start(path, start, size)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _Parser(path, content, size).parse()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise ModelFileError(f"cannot read '{path}': {reason}. Give a GGUF file that you may read.") from None
    except MemoryError:
        raise ModelFileError(f"not enough memory to read the header of '{path}'; close other programs.") from None


def _open_regular(path: Path) -> Any:
    """Opens a regular file only: opening a FIFO would block forever, and a device has no end. Raises ModelFileError or
    OSError."""
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        raise ModelFileError(f"'{path}' is not a regular file; give a GGUF file.")
    return path.open("rb")


def _check_start(path: Path, start: bytes, size: int) -> None:
    if start.startswith(_LFS):
        raise ModelFileError(
            f"'{path}' is not a GGUF file but a Git LFS pointer of {size} bytes; fetch the file itself with "
            "'git lfs pull', or download it again."
        )
    if start[:4] != MAGIC:
        raise ModelFileError(
            f"'{path}' is not a GGUF file: it begins with {start[:4]!r}, expected {MAGIC!r}. Give a file that "
            "'granite4v convert' or llama.cpp wrote."
        )
    if len(start) < 24:
        raise ModelFileError(
            f"'{path}' begins like a GGUF file, but its header is broken or cut short ({size:,} bytes); {_AGAIN}."
        )
    version = _U32.unpack_from(start, 4)[0]
    if int.from_bytes(start[4:8], "big") in (1, *VERSIONS):
        raise ModelFileError(
            f"'{path}' is a big-endian GGUF file; expected little-endian. Convert it with "
            "'gguf-convert-endian', or download the little-endian file."
        )
    if version not in VERSIONS:
        age = "newer than this granite4v" if version > max(VERSIONS) else "no longer in use"
        raise ModelFileError(
            f"'{path}' is GGUF version {version}, which is {age}; expected version 2 or 3. "
            f"{'Update granite4v' if version > max(VERSIONS) else 'Convert the model again'}, or download another file."
        )


class _Parser:
    def __init__(self, path: Path, content: mmap.mmap, size: int) -> None:
        self._path, self._content, self._size = path, content, size
        self._end = min(size, MAX_HEADER_BYTES)
        self._at = 8

    def parse(self) -> Header:
        n_tensors, n_keys = self._count("tensors", MAX_TENSORS), self._count("metadata keys", MAX_KEYS)
        fields: dict[bytes, Field] = {}
        for i in range(n_keys):
            key = self._string(f"metadata key {i + 1}")
            name = _readable(key)
            if not key:
                raise self._broken(f"metadata key {i + 1} has no name")
            if key in fields:
                raise self._broken(f"it has the key '{name}' twice")
            fields[key] = self._field(name)
        alignment = self._alignment(fields.get(keys.GENERAL_ALIGNMENT.encode()))
        listed = self._tensor_list(n_tensors)
        start = -(-self._at // alignment) * alignment
        tensors = self._place(listed, start, alignment)
        data = self._content[: self._at]
        return Header(data, {_readable(key): field for key, field in fields.items()}, tensors)

    def _count(self, what: str, most: int) -> int:
        n = self._unpack(_U64)
        if n > most:
            raise self._broken(f"it counts {n:,} {what}, expected at most {most:,}")
        return n

    def _field(self, key: str) -> Field:
        kind, n = self._unpack(_U32), None
        if kind == ARRAY:
            kind, n = self._unpack(_U32), self._unpack(_U64)
            if kind == ARRAY:
                raise self._broken(f"the key '{key}' holds a list of lists")
            if n > MAX_ARRAY:
                raise self._broken(f"the key '{key}' holds a list of {n:,} values, expected at most {MAX_ARRAY:,}")
        start = self._at
        if kind == STRING:
            self._skip_strings(f"key '{key}'", 1 if n is None else n)
        elif kind in _FORMATS:
            self._skip(struct.calcsize(_FORMATS[kind]) * (1 if n is None else n), f"key '{key}'")
        else:
            raise self._broken(f"the key '{key}' has value type {kind}, expected 0 to 12")
        return Field(kind, start, n)

    def _alignment(self, field: Field | None) -> int:
        if field is None:
            return 32
        value = field.decode(self._content) if field.n is None else None  # type: ignore[arg-type]
        if field.kind != 4 or value is None or not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
            raise self._broken(
                f"'{keys.GENERAL_ALIGNMENT}' is {value!r:.40}, expected a power of two as a 32-bit integer"
            )
        return int(value)

    def _tensor_list(self, n_tensors: int) -> list[tuple[str, tuple[int, ...], str, int]]:
        """Lists (name, shape in ggml's order, type, offset from the start of the data) in the file's order."""
        listed, names = [], set()
        for i in range(n_tensors):
            raw = self._string(f"the name of tensor {i + 1}")
            name = _readable(raw)
            if len(raw) > MAX_NAME_BYTES:
                raise self._broken(
                    f"tensor {i + 1} has a name of {len(raw):,} bytes ({name!r:.40}), expected at most {MAX_NAME_BYTES}"
                )
            if raw in names:
                raise self._broken(f"it has tensor '{name}' twice")
            names.add(raw)
            n_dims = self._unpack(_U32)
            if n_dims > MAX_DIMS:
                raise self._broken(f"tensor '{name}' has {n_dims:,} dimensions, expected at most {MAX_DIMS}")
            shape = tuple(self._unpack(_U64) for _ in range(n_dims)) or (1,)
            type_id = self._unpack(_U32)
            listed.append((name, shape, self._type(name, type_id, shape), self._unpack(_U64)))
        return listed

    def _type(self, name: str, type_id: int, shape: tuple[int, ...]) -> str:
        if type_id not in TYPE_NAMES:
            raise ModelFileError(f"'{self._path}': {unknown_type(name, type_id)}.")
        type_name = TYPE_NAMES[type_id]
        if 0 in shape:
            raise self._broken(f"tensor '{name}' has shape {list(shape)}, which holds no value")
        if math.prod(shape) >= 1 << 62:
            raise self._broken(f"tensor '{name}' has shape {list(shape)}, more values than any file holds")
        if shape[0] % TYPES[type_name].block:
            raise self._broken(
                f"tensor '{name}' has rows of {shape[0]:,} values, expected a multiple of {type_name}'s block of "
                f"{TYPES[type_name].block}"
            )
        return type_name

    def _place(
        self, listed: list[tuple[str, tuple[int, ...], str, int]], start: int, alignment: int
    ) -> dict[str, TensorInfo]:
        """Computes absolute offsets. Raises ModelFileError unless the tensors follow each other with alignment padding
        only, as ggml requires, and end inside the file."""
        tensors, expected = {}, 0
        for name, shape, type_name, offset in listed:
            if offset != expected:
                raise self._broken(f"tensor '{name}' begins at byte {offset:,} of the data, expected {expected:,}")
            kind = TYPES[type_name]
            nbytes = math.prod(shape) // kind.block * kind.nbytes
            end = start + offset + nbytes
            if end > self._size:
                raise ModelFileError(
                    f"'{self._path}' is cut short: tensor '{name}' should end at byte {end:,}, the file has "
                    f"{self._size:,}; {_AGAIN}."
                )
            while len(shape) > 1 and shape[-1] == 1:
                shape = shape[:-1]
            tensors[name] = TensorInfo(name, shape[::-1], type_name, start + offset, nbytes)
            expected = -(-(offset + nbytes) // alignment) * alignment
        return tensors

    # --- cursor ---

    def _unpack(self, form: struct.Struct) -> int:
        self._skip(form.size, "its header")
        return int(form.unpack_from(self._content, self._at - form.size)[0])

    def _string(self, what: str) -> bytes:
        start = self._at + 8
        self._skip_strings(what, 1)
        return self._content[start : self._at]

    def _skip_strings(self, what: str, n: int) -> None:
        unpack, content, at = _U64.unpack_from, self._content, self._at
        try:
            for _ in range(n):
                at += 8 + unpack(content, at)[0]
        except (struct.error, OverflowError, ValueError):
            at = self._size + 1
        self._skip(at - self._at, what)

    def _skip(self, n: int, what: str) -> None:
        self._at += n
        if self._at > self._end:
            raise self._broken(f"{what} would end at byte {self._at:,}" if n < 1 << 63 else f"{what} has no end")

    def _broken(self, reason: str) -> ModelFileError:
        return ModelFileError(
            f"'{self._path}' begins like a GGUF file, but its header is broken or cut short ({self._size:,} bytes): "
            f"{reason}; {_AGAIN}."
        )


def unknown_type(name: str, type_id: int) -> str:
    """Explains why a tensor cannot be read: its type was removed from ggml, or is newer than this one."""
    if type_id < max(TYPE_NAMES):
        return (
            f"tensor '{name}' has type {type_id}, which ggml no longer reads; download a newer file of this model, or "
            "convert it again"
        )
    return (
        f"type {type_id} of tensor '{name}' is newer than this llama-cpp-python "
        f"({metadata.version('llama-cpp-python')}, ggml {TESTED_VERSION}), whose types end at {max(TYPE_NAMES)}; "
        "download a file of another type (Q4_K_M, Q8_0), or update granite4v"
    )


def _readable(raw: bytes) -> str:
    """Decodes a key or name; bytes that are not UTF-8 become escapes, so that different names stay different."""
    return raw.decode("utf-8", "backslashreplace")
