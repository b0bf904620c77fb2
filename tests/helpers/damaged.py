"""Deliberately damaged checkpoints, and the error messages that they cause."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from granite4v.converter import Options, plan_conversion
from granite4v.errors import CheckpointError


def refusal(folder: Path, **options: Any) -> str:
    """Returns the error message for a checkpoint whose conversion cannot be planned."""
    with pytest.raises(CheckpointError) as caught:
        plan_conversion(folder, Options(**options))
    return str(caught.value)


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def read_raw(path: Path) -> tuple[dict[str, Any], bytes]:
    """Returns the header of a safetensors file, and its data."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_raw(path: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def change_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    header, data = read_raw(path)
    change(header)
    write_raw(path, header, data)
