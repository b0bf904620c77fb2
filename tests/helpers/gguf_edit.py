"""GGUF files in tests: copies with other metadata, which our converter would not write, and tensors as bytes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import gguf
from gguf.constants import GGUFValueType

from granite4v.ggml.gguf_file import GgufFile


def copy_gguf(
    source: Path,
    target: Path,
    *,
    change: Mapping[str, Any] | None = None,
    without: Collection[str] = (),
    retype: bool = False,
    tensors: Mapping[str, Any] | None = None,
    tensors_a_part: int = 0,
) -> Path:
    """Writes `source` as `target` with `change` put over its metadata and the keys that start with one of
    `without` left out; tensors stay as they are, but for those of `tensors`: other arrays, or None for none. A changed
    value keeps its GGUF type; with `retype` it gets that of its Python type. Returns `target`.
    """
    reader = gguf.GGUFReader(source)
    change = dict(change or {})
    writer = gguf.GGUFWriter(
        target,
        change.pop("general.architecture", reader.fields["general.architecture"].contents()),
        split_max_tensors=tensors_a_part,
    )
    for key, field in reader.fields.items():
        if key.startswith(("GGUF.", "general.architecture", *without)):
            continue
        value = change.get(key, field.contents())
        if retype and key in change:
            writer.add_key_value(key, value, GGUFValueType.get_type(value))
        elif field.types[0] == GGUFValueType.ARRAY:
            writer.add_key_value(key, value, GGUFValueType.ARRAY, sub_type=field.types[-1])
        else:
            writer.add_key_value(key, value, field.types[0])
    for tensor in reader.tensors:
        if tensors and tensor.name in tensors:
            if tensors[tensor.name] is not None:
                writer.add_tensor(tensor.name, tensors[tensor.name])
            continue
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def tensor_bytes(path: Path) -> dict[str, tuple[str, bytes]]:
    """Tensor name -> its type and bytes."""
    data = path.read_bytes()
    with GgufFile.open(path) as file:
        return {
            info.name: (info.type_name, data[info.offset : info.offset + info.nbytes]) for info in file.tensors.values()
        }
