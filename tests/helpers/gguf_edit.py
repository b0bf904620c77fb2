"""GGUF files in tests: copies with other metadata, which our converter would not write, and tensors as bytes."""

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
    """Writes `source` as `target` with `change` put over its metadata and the keys that start with one of
    `without` left out; tensors stay as they are, but for those of `tensors`: other arrays, or bytes `(rows,
    row_bytes)` and their type, or None for none. A changed value keeps its GGUF type; with `retype` it gets that of its
    Python type. Returns `target`.
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
            if isinstance(value, tuple):  # bytes of rows, and their type's name
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
    """A vision file in the layout of llama.cpp's older converter, with our file's values in half precision."""
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
    """A vision file as llama.cpp's converter writes it: the checkpoint's feed-forward width, no keys of ours."""
    reader, changed = gguf.GGUFReader(source), {}
    for tensor in reader.tensors:
        if tensor.name.startswith("v.blk.") and ".ffn_up." in tensor.name:
            changed[tensor.name] = tensor.data[:n_ffn].copy()
        elif tensor.name.startswith("v.blk.") and tensor.name.endswith("ffn_down.weight"):
            changed[tensor.name] = tensor.data[:, :n_ffn].copy()
    change = {"clip.vision.feed_forward_length": n_ffn, "general.name": "somebody's"}
    return copy_gguf(source, target, change=change, without=("granite4v.",), tensors=changed)


def tensor_bytes(path: Path) -> dict[str, tuple[str, bytes]]:
    """Tensor name -> its type and bytes."""
    data = path.read_bytes()
    with GgufFile.open(path) as file:
        return {
            info.name: (info.type_name, data[info.offset : info.offset + info.nbytes]) for info in file.tensors.values()
        }
