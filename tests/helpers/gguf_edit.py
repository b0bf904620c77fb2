"""GGUF files for tests: copies with metadata that our converter would not write, and tensors as bytes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGUFValueType

from granite4v.ggml.gguf_file import GgufFile
from tests.toy.spec import CheckpointSpec


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
    """Writes a changed copy of `source` to `target` and returns `target`.

    `change` overrides metadata values, and keys that start with one of `without` are left out. A changed value keeps
    its GGUF type; with `retype` it gets the GGUF type of its Python type. Tensors are copied unless `tensors` names
    them: its values are arrays, or (bytes of shape `(rows, row_bytes)`, type name), or None to leave the tensor out.
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
            value = tensors[tensor.name]
            if isinstance(value, tuple):  # bytes of rows, and the name of their type
                writer.add_tensor(tensor.name, value[0], raw_dtype=gguf.GGMLQuantizationType[value[1]])
            elif value is not None:
                writer.add_tensor(tensor.name, value)
            continue
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def older_layout(source: Path, target: Path, spec: CheckpointSpec) -> Path:
    """Writes a vision file in the layout of llama.cpp's older converter, with our file's values in half precision."""
    reader = gguf.GGUFReader(source)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    writer = gguf.GGUFWriter(target, "clip")
    for key in ("has_text_encoder", "has_vision_encoder", "has_llava_projector", "use_gelu"):
        writer.add_bool(f"clip.{key}", key in ("has_vision_encoder", "has_llava_projector"))
    writer.add_file_type(1)
    writer.add_name("siglip-model")
    writer.add_description("image encoder for LLaVA")
    writer.add_string("clip.projector_type", "mlp")
    for key in ("image_size", "patch_size", "embedding_length", "feed_forward_length", "attention.head_count"):
        writer.add_uint32(f"clip.vision.{key}", fields[f"clip.vision.{key}"])
    writer.add_uint32("clip.vision.projection_dim", 0)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-6)
    writer.add_uint32("clip.vision.block_count", fields["clip.vision.block_count"])
    writer.add_array("clip.vision.image_grid_pinpoints", [px for pair in spec.grid_pinpoints for px in pair])
    writer.add_string("clip.vision.mm_patch_merge_type", "spatial_unpad")
    writer.add_array("clip.vision.feature_layer", fields["clip.vision.feature_layer"])
    writer.add_array("clip.vision.image_mean", [0.5, 0.5, 0.5])
    writer.add_array("clip.vision.image_std", [0.5, 0.5, 0.5])
    swapped = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
    for tensor in reader.tensors:
        parts = [swapped.get(part, part) for part in tensor.name.split(".")]
        name = "model.image_newline" if tensor.name == "v.image_newline" else ".".join(parts)
        matrix = name.endswith(".weight") and len(tensor.shape) > 1
        writer.add_tensor(name, tensor.data.astype(np.float16 if matrix else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def unpadded(source: Path, target: Path, n_ffn: int) -> Path:
    """Writes a vision file the way llama.cpp's converter does: with the checkpoint's feed-forward width, and without
    our own keys."""
    reader, changed = gguf.GGUFReader(source), {}
    for tensor in reader.tensors:
        if tensor.name.startswith("v.blk.") and ".ffn_up." in tensor.name:
            changed[tensor.name] = tensor.data[:n_ffn].copy()
        elif tensor.name.startswith("v.blk.") and tensor.name.endswith("ffn_down.weight"):
            changed[tensor.name] = tensor.data[:, :n_ffn].copy()
    change = {"clip.vision.feed_forward_length": n_ffn, "general.name": "somebody's"}
    return copy_gguf(source, target, change=change, without=("granite4v.",), tensors=changed)


def tensor_bytes(path: Path) -> dict[str, tuple[str, bytes]]:
    """Maps each tensor name to the tensor's type and bytes."""
    data = path.read_bytes()
    with GgufFile.open(path) as file:
        return {
            info.name: (info.type_name, data[info.offset : info.offset + info.nbytes]) for info in file.tensors.values()
        }
