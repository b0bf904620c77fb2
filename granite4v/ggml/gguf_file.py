"""Opens a GGUF file's header: checked metadata, and the offset of each tensor. Reads no weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from granite4v.ggml.gguf_header import STRING, Header, TensorInfo, read_header
from granite4v.ggml.metadata import GgufMetadata
from granite4v.ggml.types import NO_WEIGHTS

__all__ = ["GgufFile", "TensorInfo", "n_weights"]


def n_weights(tensors: Iterable[TensorInfo]) -> dict[str, int]:
    """Counts the weights of these tensors by type; types that are never weights are left out (`NO_WEIGHTS`)."""
    found: Counter[str] = Counter()
    for info in tensors:
        if info.type_name not in NO_WEIGHTS:
            found[info.type_name] += math.prod(info.shape)
    return dict(found)


class GgufFile(GgufMetadata):
    """The metadata of one GGUF file as a mapping, and its tensors by name.

    Values are decoded on access: str, int, float, bool, or a list of one of these. `GgufMetadata` has accessors that
    check them.
    """

    def __init__(self, path: str | Path) -> None:
        """Reads the header. Raises ModelFileError for a file that is missing, not GGUF, malformed, cut short, or newer
        than our ggml."""
        self.path = Path(path)
        self._header: Header | None = read_header(self.path)
        self._fields = self._header.fields
        self.tensors = self._header.tensors

    @classmethod
    def open(cls, path: str | Path) -> GgufFile:
        """Same as the constructor, for use in a `with` statement."""
        return cls(path)

    @property
    def metadata(self) -> GgufMetadata:
        return self

    def __getitem__(self, key: str) -> Any:
        if self._header is None:
            raise ValueError(f"'{self.path}' is closed")
        return self._fields[key].decode(self._header.data)

    def kind(self, key: str) -> tuple[int, bool]:
        """Returns a value's number in enum gguf_type and False; for a list, its elements' number and True."""
        field = self._fields[key]
        return field.kind, field.n is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __contains__(self, key: object) -> bool:
        return key in self._fields  # Mapping's default would decode the value

    def n_texts(self, key: str) -> int:
        """Returns the length of a list of strings, without decoding it: a vocabulary has 100,000. 0 without the key."""
        field = self._fields.get(key)
        return super().n_texts(key) if field is None or field.kind != STRING else field.n or 0

    def close(self) -> None:
        self._header = None

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
