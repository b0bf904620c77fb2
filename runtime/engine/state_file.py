"""Reads and writes one stored state as a file: its description, the state, and a checksum of both.

    magic, format, bytes of the description, bytes of the state    24 bytes, little-endian
    description                                                    JSON
    state                                                          as llama.cpp wrote it
    SHA-256 of everything before it                                32 bytes

Knows nothing of pages, prompts or folders.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from granite4v.memory import large_buffer

MAGIC = b"G4VSTATE"
FORMAT = 1
_HEAD = struct.Struct("<8sIIQ")
_DIGEST_BYTES = 32
_MAX_DESCRIPTION = 1 << 16
PIECE = 8 << 20  # bytes written, or read and hashed, at a time
_OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


class DamagedState(Exception):
    """The file does not hold the expected state; the message says why."""


class Stopped(Exception):
    """Writing was given up."""


@dataclass(frozen=True)
class Description:
    """Describes a state. `key` identifies it; the rest is for users. `n_tokens`: length of the prefix; `created`:
    seconds since the epoch."""

    key: str
    model: str
    n_tokens: int
    n_images: int
    created: float


def write(file: FileIO, description: Description, state: np.ndarray, is_stopped: Callable[[], bool]) -> None:
    """Writes a state, uint8 `(n,)`, to an empty file. Raises OSError, and Stopped once `is_stopped` returns true."""
    text = json.dumps(asdict(description)).encode()
    digest = hashlib.sha256()
    for content in (_HEAD.pack(MAGIC, FORMAT, len(text), len(state)), text, state.data):
        for piece in _written(file, content, is_stopped):
            digest.update(piece)
    for _ in _written(file, digest.digest(), is_stopped):
        pass


def _written(file: FileIO, content: bytes | memoryview, is_stopped: Callable[[], bool]) -> Iterator[memoryview]:
    """Writes all of `content` and yields the written pieces: a nearly full disk takes less than it is given."""
    left = memoryview(content)
    while left:
        if is_stopped():
            raise Stopped
        piece = left[: file.write(left[:PIECE])]
        yield piece
        left = left[len(piece) :]


def size(description: Description, state: np.ndarray) -> int:
    """Size in bytes of the file that `write` makes."""
    return _HEAD.size + len(json.dumps(asdict(description)).encode()) + len(state) + _DIGEST_BYTES


def read(path: Path, key: str) -> np.ndarray:
    """Returns the state with this key, uint8 `(n,)`. Raises DamagedState for a file of another format or key, or one
    that was truncated or changed; OSError, MemoryError."""
    with _open(path) as file:
        description, n_bytes, digest = _begin(file)
        if description.key != key:
            raise DamagedState("it holds another state")
        state = np.frombuffer(large_buffer(n_bytes), dtype=np.uint8)[:n_bytes]
        left = state.data
        while left:
            n_read = file.readinto(left[:PIECE])
            if not n_read:
                raise DamagedState("it is cut short")
            digest.update(left[:n_read])
            left = left[n_read:]
        if file.read(_DIGEST_BYTES) != digest.digest():
            raise DamagedState("its checksum is wrong")
        return state


def describe(path: Path) -> Description:
    """Returns a file's description without checking its state. Raises DamagedState, OSError."""
    with _open(path) as file:
        return _begin(file)[0]


def _open(path: Path) -> FileIO:
    """Opens a regular file, not a link to one; other kinds of files might block forever."""
    descriptor = os.open(path, _OPEN_FLAGS | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DamagedState("it is not a regular file")
    return FileIO(descriptor, "rb")


def _begin(file: FileIO) -> tuple[Description, int, Any]:
    """Reads everything before the state. Returns its description, its size in bytes, and the checksum so far."""
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size or not head.startswith(MAGIC):
        raise DamagedState("it is not a page state of granite4v")
    _, version, n_text, n_bytes = _HEAD.unpack(head)
    if version != FORMAT:
        raise DamagedState(f"it has format {version}, expected {FORMAT}")
    n_expected = _HEAD.size + n_text + n_bytes + _DIGEST_BYTES
    n_found = os.fstat(file.fileno()).st_size
    if n_found != n_expected or n_text > _MAX_DESCRIPTION:
        raise DamagedState(f"it has {n_found:,} bytes, expected {n_expected:,}")
    text = file.read(n_text)
    digest = hashlib.sha256(head)
    digest.update(text)
    try:
        found = json.loads(text)
        description = Description(**{name: kind(found[name]) for name, kind in _FIELDS.items()})
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
        raise DamagedState("its description is damaged") from None
    return description, n_bytes, digest


_FIELDS = {"key": str, "model": str, "n_tokens": int, "n_images": int, "created": float}
