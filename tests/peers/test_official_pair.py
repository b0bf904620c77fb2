"""The official pair of GGUF files: files with those names and exactly those keys load, and give the reference's
results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gguf import GGUFReader

import granite4v
from granite4v.converter import Options, convert
from tests.helpers.gguf_edit import copy_gguf
from tests.helpers.parity import check_model
from tests.peers.reference import Reference
from tests.toy.checkpoint import PRESETS, CheckpointSpec

OFFICIAL_TEXT, OFFICIAL_VISION = "granite-vision-4.1-4b-Q8_0.gguf", "mmproj-model-f16.gguf"
GENERAL = {"general.architecture", "general.type", "general.name", "general.file_type", "general.quantization_version"}
TEXT_KEYS = {
    *(f"granite.{key}" for key in ("vocab_size", "block_count", "context_length", "embedding_length")),
    *(f"granite.{key}" for key in ("feed_forward_length", "attention.head_count", "attention.head_count_kv")),
    *(f"granite.{key}" for key in ("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count")),
    *(f"granite.{key}" for key in ("attention.scale", "embedding_scale", "residual_scale", "logit_scale")),
    "granite.deepstack_mapping",
    *(f"tokenizer.ggml.{key}" for key in ("model", "pre", "merges", "tokens", "token_type", "add_bos_token")),
    *(f"tokenizer.ggml.{key}_token_id" for key in ("bos", "eos", "unknown", "padding")),
    "tokenizer.chat_template",
}
VISION_KEYS = {
    *(f"clip.{key}" for key in ("projector_type", "has_vision_encoder", "use_gelu")),
    *(f"clip.vision.{key}" for key in ("image_size", "patch_size", "embedding_length", "feed_forward_length")),
    *(f"clip.vision.{key}" for key in ("block_count", "projection_dim", "attention.head_count")),
    *(f"clip.vision.{key}" for key in ("attention.layer_norm_epsilon", "image_mean", "image_std", "feature_layer")),
    *(f"clip.vision.{key}" for key in ("preproc_image_size", "image_grid_pinpoints")),
    *(f"clip.vision.projector.{key}" for key in ("query_side", "window_side", "spatial_offsets")),
}


def official_pair(source: Path, folder: Path) -> Path:
    """Copies the files of a conversion to the official names, with exactly the keys that the official files have."""
    folder.mkdir()
    for ours, theirs, wanted, change in (
        ("text-F32.gguf", OFFICIAL_TEXT, TEXT_KEYS, {"tokenizer.ggml.pre": "granite-docling"}),
        ("mmproj-F32.gguf", OFFICIAL_VISION, VISION_KEYS, {}),
    ):
        held = {key for key in GGUFReader(source / ours).fields if not key.startswith("GGUF.")}
        assert wanted | GENERAL <= held
        copy_gguf(source / ours, folder / theirs, change=change, without=sorted(held - wanted - GENERAL))
        found = {key for key in GGUFReader(folder / theirs).fields if not key.startswith("GGUF.")}
        assert found == wanted | GENERAL
    return folder


def test_a_pair_with_the_official_names_and_keys(
    make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path: Path
) -> None:
    source = make_checkpoint(PRESETS["tiny-published"])
    convert(source, tmp_path / "ours", Options("F32", "F32"))
    folder = official_pair(tmp_path / "ours", tmp_path / "official")
    reference = Reference(source)
    with granite4v.load(folder, device="cpu") as model:
        check_model(reference, model)
