"""Takes a GGUF file apart and puts it together again, without any of the checks of a regular writer.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
ALIGNMENT = 32


@dataclass
class Value:
    """A metadata value. `element`: the type of an array's elements; `count`: a wrong number of elements to write
    instead of the actual one."""

    type: int
    content: Any
    element: int = 0
    count: int | None = None


@dataclass
class Info:
    """A tensor's entry and its bytes. `dims` are in ggml's order, fastest first; `offset` counts from the start of the
    data."""

    name: bytes
    dims: list[int]
    type: int
    offset: int
    content: bytes = b""


@dataclass
class Gguf:
    magic: bytes = b"GGUF"
    version: int = 3
    metadata: list[tuple[bytes, Value]] = field(default_factory=list)
    tensors: list[Info] = field(default_factory=list)
    data: bytes = b""
    n_metadata: int | None = None  # in the header; None: the actual number
    n_tensors: int | None = None

    @classmethod
    def read(cls, data: bytes) -> Gguf:
        """Parses a sound file. Raises struct.error or KeyError for any other."""
        reader = _Reader(data)
        magic, version = reader.take(4), reader.number("I")
        n_tensors, n_metadata = reader.number("Q"), reader.number("Q")
        metadata = [(reader.string(), reader.value()) for _ in range(n_metadata)]
        tensors = [
            Info(reader.string(), [reader.number("Q") for _ in range(reader.number("I"))], *reader.numbers("IQ"))
            for _ in range(n_tensors)
        ]
        found = cls(magic, version, metadata, tensors, data[-(-reader.at // ALIGNMENT) * ALIGNMENT :])
        ends = sorted([*(info.offset for info in tensors), len(found.data)])
        for info in tensors:
            info.content = found.data[info.offset : ends[ends.index(info.offset) + 1]]
        return found

    def lay_out(self) -> None:
        """Places the tensors' bytes one after another, in the order of their entries."""
        at, parts = 0, []
        for info in self.tensors:
            info.offset = at
            parts.append(info.content + bytes(-len(info.content) % ALIGNMENT))
            at += len(parts[-1])
        self.data = b"".join(parts)

    def write(self) -> bytes:
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        n_metadata = len(self.metadata) if self.n_metadata is None else self.n_metadata
        parts = [self.magic, _packed("I", self.version), _packed("Q", n_tensors), _packed("Q", n_metadata)]
        for key, value in self.metadata:
            parts += [_string(key), _packed("I", value.type), _value(value)]
        for info in self.tensors:
            parts += [_string(info.name), _packed("I", len(info.dims)), *(_packed("Q", n) for n in info.dims)]
            parts += [_packed("I", info.type), _packed("Q", info.offset)]
        header = b"".join(parts)
        return header + bytes(-len(header) % ALIGNMENT) + self.data


@dataclass
class _Reader:
    data: bytes
    at: int = 0

    def take(self, n: int) -> bytes:
        self.at += n
        return self.data[self.at - n : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def numbers(self, codes: str) -> list[Any]:
        return [self.number(code) for code in codes]

    def string(self) -> bytes:
        return self.take(self.number("Q"))

    def value(self) -> Value:
        kind = self.number("I")
        if kind != ARRAY:
            return Value(kind, self.string() if kind == STRING else self.number(SCALARS[kind]))
        element, n = self.number("I"), self.number("Q")
        if element == STRING:
            return Value(kind, [self.string() for _ in range(n)], element)
        code = f"<{n}{SCALARS[element]}"
        return Value(kind, list(struct.unpack(code, self.take(struct.calcsize(code)))), element)


def _packed(code: str, value: Any) -> bytes:
    """Packs the value as this type; integers that do not fit are truncated to its width, floats become infinite."""
    if code in "fd":
        try:
            return struct.pack("<" + code, float(value))
        except OverflowError:
            return struct.pack("<" + code, float("inf"))
    n = struct.calcsize("<" + code)
    whole = int(value) if value == value and abs(value) != float("inf") else 0
    return (whole & ((1 << 8 * n) - 1)).to_bytes(n, "little")


def _string(data: bytes) -> bytes:
    return _packed("Q", len(data)) + data


def _value(value: Value) -> bytes:
    if value.type == STRING:
        return _string(value.content)
    if value.type != ARRAY:
        return _packed(SCALARS.get(value.type, "I"), value.content)
    count = len(value.content) if value.count is None else value.count
    head = _packed("I", value.element) + _packed("Q", count)
    if value.element == STRING:
        return head + b"".join(map(_string, value.content))
    code = SCALARS.get(value.element, "I")
    return head + b"".join(_packed(code, item) for item in value.content)
