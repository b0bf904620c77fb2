"""Layouts of published checkpoints: their fields are converted, and the results are the reference's.

transformers is the reference if it knows a field; otherwise the reference is built from its parts.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import granite4v
from granite4v.clip_projector import load_image
from granite4v.converter import Options, convert, plan_conversion
from granite4v.errors import CheckpointError
from tests.helpers.gguf_edit import tensor_bytes
from tests.helpers.parity import check_logits, check_model
from tests.helpers.pictures import noise_picture
from tests.peers.reference import Reference
from tests.toy.checkpoint import PRESETS, CheckpointSpec
from tests.toy.language import build_tokenizer, write_language_files

PUBLISHED, TINY = PRESETS["tiny-published"], PRESETS["tiny"]
FUSED = replace(TINY, text_type="granitemoehybrid")
F32 = Options("F32", "F32")
NEW_NAMES = {
    "deepstack_layer_map": "vision_layer_to_llm_layer",
    "use_spatial_sampling": "use_checkerboard_sampling",
    "spatial_stride": "checkerboard_stride",
    "spatial_vision_layer": "checkerboard_vision_layer",
    "spatial_target_layers": "checkerboard_llm_layers",
}

MakeCheckpoint = Callable[[CheckpointSpec], Path]


def edited(source: Path, target: Path, change: Callable[[dict[str, Any]], Any], without: str = "") -> Path:
    """Copies a checkpoint, changes its config.json, and drops tensors whose names contain `without`."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    change(config)
    (target / "config.json").write_text(json.dumps(config))
    if without:
        tensors = load_file(target / "model.safetensors")
        kept = {name: values for name, values in tensors.items() if without not in name}
        assert len(kept) < len(tensors)
        save_file(kept, target / "model.safetensors")
    return target


def published_fields(config: dict[str, Any]) -> None:
    """Sets the fields of 4.1's config.json other than the sizes."""
    text = config["text_config"]
    rope = text.pop("rope_parameters", {})
    text["rope_theta"] = rope.get("rope_theta", text.get("rope_theta"))
    text.update(model_type="granite", attention_bias=False, mlp_bias=False, attention_dropout=0.0, rope_scaling=None)
    config.update(
        use_spatial_sampling=True,
        use_image_newline_parameter=True,
        spatial_stride=2,
        image_seq_length=576,
        projector_hidden_act="gelu",
        dtype=config.pop("torch_dtype", "float32"),
        vision_feature_layer=-2,
        multimodal_projector_bias=True,
    )


def test_the_fields_of_4_1(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = edited(make_checkpoint(PUBLISHED), tmp_path / "source", published_fields)
    assert convert(source, tmp_path / "out", F32).plan.warnings == ()
    reference = Reference(source)
    with granite4v.load(tmp_path / "out", device="cpu") as model:
        check_model(reference, model)


@pytest.mark.parametrize("held", [False, True], ids=["projectors absent", "projectors there"])
def test_without_spatial_sampling(held: bool, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """transformers does not know the field; with no target layers it computes the same."""
    base = make_checkpoint(TINY)
    source = edited(
        base,
        tmp_path / "source",
        lambda config: config.update(use_spatial_sampling=False),
        without="" if held else "spatial_projectors",
    )
    plan = convert(source, tmp_path / "out", F32).plan
    assert sum("spatial_projectors" in name for name, _ in plan.dropped) == (4 * 34 if held else 0)
    reference = Reference(edited(base, tmp_path / "twin", lambda config: config.update(spatial_target_layers=[])))
    with granite4v.load(tmp_path / "out", device="cpu") as model:
        assert model.encode_image(load_image(noise_picture((64, 64)))).layers == [0, 2]
        check_model(reference, model)


@pytest.mark.parametrize("held", [False, True], ids=["newline absent", "newline there"])
def test_without_newlines(held: bool, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """The reference packs without its newline, as its own code does if there is none."""
    base = make_checkpoint(TINY)
    source = edited(
        base,
        tmp_path / "source",
        lambda config: config.update(use_image_newline_parameter=False),
        without="" if held else "image_newline",
    )
    convert(source, tmp_path / "out", F32)
    reference = Reference(base)
    reference.model.model.image_newline = None
    with granite4v.load(tmp_path / "out", device="cpu") as model:
        check_model(reference, model)


def test_older_field_names_give_the_same_files(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    def older(config: dict[str, Any]) -> None:
        config.update(use_spatial_sampling=True, spatial_stride=2)
        for new, old in NEW_NAMES.items():
            config[old] = config.pop(new)

    def both(config: dict[str, Any]) -> None:
        config.update(use_spatial_sampling=True, spatial_stride=2)
        config.update({old: config[new] for new, old in NEW_NAMES.items()})

    base = make_checkpoint(TINY)
    expected = plan_conversion(base, F32)
    for name, change in (("older", older), ("both", both)):
        plan = plan_conversion(edited(base, tmp_path / name, change), F32)
        for ours, theirs in zip(plan.files, expected.files, strict=True):
            named = {"granite4v.source", "granite4v.pair_id", "general.name"}
            assert {k: v for k, v in ours.metadata.items() if k not in named} == {
                k: v for k, v in theirs.metadata.items() if k not in named
            }
            assert [(t.name, t.shape, t.source and t.source.name) for t in ours.tensors] == [
                (t.name, t.shape, t.source and t.source.name) for t in theirs.tensors
            ]


@pytest.mark.parametrize("new", NEW_NAMES)
def test_both_spellings_with_different_values_are_refused(
    new: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    other = {"deepstack_layer_map": [[-1, 1]], "use_spatial_sampling": False, "spatial_target_layers": [1]}

    def change(config: dict[str, Any]) -> None:
        config.update({"use_spatial_sampling": True, "spatial_stride": 2})
        config[NEW_NAMES[new]] = other.get(new, 3)

    with pytest.raises(CheckpointError) as caught:
        plan_conversion(edited(make_checkpoint(TINY), tmp_path / "source", change))
    assert f"has '{new}' " in str(caught.value)
    assert f"under its older name, '{NEW_NAMES[new]}'" in str(caught.value)


def test_a_stride_that_no_projector_computes(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = edited(make_checkpoint(TINY), tmp_path / "source", lambda config: config.update(spatial_stride=3))
    with pytest.raises(CheckpointError, match="'spatial_stride' is 3; expected 2"):
        plan_conversion(source)


@pytest.mark.parametrize("spec", [TINY, FUSED], ids=["dense", "fused"])
def test_a_text_model_of_no_type_is_a_granite(
    spec: CheckpointSpec, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    base = make_checkpoint(spec)
    source = edited(base, tmp_path / "source", lambda config: config["text_config"].pop("model_type"))
    convert(source, tmp_path / "out", F32)
    convert(base, tmp_path / "expected", F32)
    for name in ("text-F32.gguf", "mmproj-F32.gguf"):
        assert tensor_bytes(tmp_path / "out" / name) == tensor_bytes(tmp_path / "expected" / name)


@pytest.mark.parametrize("model_type", [None, "siglip", "siglip2_vision_model"])
def test_a_tower_that_is_called_otherwise(
    model_type: str | None, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    base = make_checkpoint(TINY)
    source = edited(base, tmp_path / "source", lambda config: config["vision_config"].update(model_type=model_type))
    ours, expected = plan_conversion(source).files[1], plan_conversion(base).files[1]
    assert [(t.name, t.shape) for t in ours.tensors] == [(t.name, t.shape) for t in expected.tensors]
    assert {k: v for k, v in ours.metadata.items() if k.startswith("clip.")} == {
        k: v for k, v in expected.metadata.items() if k.startswith("clip.")
    }


def test_a_hybrid_says_only_what_differs_from_its_defaults(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """transformers writes only what differs from the defaults; here layer count, widths and epsilon are defaults."""
    from transformers import GraniteMoeHybridConfig

    from granite4v.families.text import text_architecture, text_section

    full = {
        "layer_types": ["attention"] * 32,
        "num_local_experts": 0,
        "position_embedding_type": "rope",
        "num_key_value_heads": 8,
        "logits_scaling": 3.0,
        "rope_theta": 1e7,
        "shared_intermediate_size": 512,
    }
    config = GraniteMoeHybridConfig(**full)
    default = GraniteMoeHybridConfig().to_dict()
    said = {key: value for key, value in config.to_dict().items() if value != default.get(key)}
    said["model_type"] = "granitemoehybrid"
    assert "hidden_size" not in said
    assert "layer_types" in said
    for text in (said, full | {"model_type": "granitemoehybrid"}):
        section = text_section({"model_type": "granite4_vision", "text_config": text})
        found = text_architecture(section).config(section, ["layers.0.shared_mlp.input_linear.weight"])
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "rms_norm_eps"):
            assert getattr(found, name) == getattr(config, name), name
        assert found.num_key_value_heads == config.num_key_value_heads
        assert found.intermediate_size == config.shared_intermediate_size
        assert found.rope_theta == config.rope_parameters["rope_theta"]
        assert (found.rotary, found.fused_mlp) == (True, True)
    section = text_section({"text_config": {key: full[key] for key in ("layer_types", "num_local_experts")}})
    found = text_architecture(section).config(section, [])
    assert (found.intermediate_size, found.rotary) == (default["shared_intermediate_size"], False)


def test_a_hybrid_without_its_layer_types_is_what_its_tensors_are(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    def change(config: dict[str, Any]) -> None:
        for key in ("layer_types", "num_local_experts"):
            del config["text_config"][key]

    base = make_checkpoint(FUSED)
    convert(edited(base, tmp_path / "source", change), tmp_path / "out", F32)
    convert(base, tmp_path / "expected", F32)
    name = "text-F32.gguf"
    assert tensor_bytes(tmp_path / "out" / name) == tensor_bytes(tmp_path / "expected" / name)
    moe = edited(base, tmp_path / "moe", change)
    tensors = load_file(moe / "model.safetensors")
    tensors["model.language_model.layers.0.block_sparse_moe.router.layer.weight"] = np.zeros((8, 64), np.float32)
    save_file(tensors, moe / "model.safetensors")
    with pytest.raises(CheckpointError, match="granitemoehybrid with 8 experts; only dense"):
        plan_conversion(moe)


# --- output heads ---


def test_a_head_that_is_absent_is_tied_with_a_warning(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = edited(make_checkpoint(replace(TINY, tied=False)), tmp_path / "source", lambda _: None, without="lm_head")
    plan = convert(source, tmp_path / "out", F32).plan
    assert len(plan.warnings) == 1
    assert "the checkpoint has none; tied" in plan.warnings[0]
    convert(make_checkpoint(TINY), tmp_path / "tied", F32)
    name = "text-F32.gguf"
    assert tensor_bytes(tmp_path / "out" / name) == tensor_bytes(tmp_path / "tied" / name)


def with_head(source: Path, target: Path, change: Callable[[np.ndarray], np.ndarray], name: str) -> Path:
    """Copies a tied checkpoint and adds a head made from its token embedding."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    embedding = tensors["model.language_model.embed_tokens.weight"]
    save_file(tensors | {name: np.ascontiguousarray(change(embedding))}, target / "model.safetensors")
    return target


def test_a_tied_head_that_differs_is_kept_with_a_warning(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """transformers keeps it, too. Only the last value differs."""

    def change(embedding: np.ndarray) -> np.ndarray:
        other = embedding.copy()
        other[-1, -1] += 1
        return other

    source = with_head(make_checkpoint(TINY), tmp_path / "source", change, "lm_head.weight")
    summary = convert(source, tmp_path / "out", F32)
    assert "'lm_head.weight' differs from 'model.language_model.embed_tokens.weight'" in summary.plan.warnings[0]
    found = tensor_bytes(tmp_path / "out" / "text-F32.gguf")["output.weight"][1]
    assert found == load_file(source / "model.safetensors")["lm_head.weight"].tobytes()
    reference = Reference(source)
    with granite4v.load(tmp_path / "out", device="cpu") as model:
        check_logits(reference, model, noise_picture((150, 100)))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_copy_of_the_embedding_is_dropped(
    dtype: type, make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever type it is stored in, and however few rows are compared at once."""
    monkeypatch.setattr("granite4v.converter.head.COMPARED_BYTES", 1000)
    base = make_checkpoint(replace(TINY, dtype="float16"))
    source = with_head(base, tmp_path / "source", lambda values: values.astype(dtype), "lm_head.weight")
    plan = convert(source, tmp_path / "out", F32).plan
    assert plan.warnings == ()
    assert ("lm_head.weight", "equal to the token embedding, to which it is tied") in plan.dropped
    assert "output.weight" not in tensor_bytes(tmp_path / "out" / "text-F32.gguf")


def test_of_two_that_are_tied_the_embedding_may_be_absent(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = with_head(make_checkpoint(TINY), tmp_path / "whole", lambda values: values, "lm_head.weight")
    source = edited(source, tmp_path / "source", lambda _: None, without="embed_tokens")
    convert(source, tmp_path / "out", F32)
    convert(make_checkpoint(TINY), tmp_path / "expected", F32)
    name = "text-F32.gguf"
    assert tensor_bytes(tmp_path / "out" / name) == tensor_bytes(tmp_path / "expected" / name)


# --- the tiny random checkpoint of transformers' tests ---


def transformers_tiny(folder: Path, **text: Any) -> Path:
    """Writes a checkpoint with the configuration of transformers' `tests/models/granite4_vision`: a CLIP tower, one
    stream, one tile."""
    import torch
    from transformers import Granite4VisionConfig, Granite4VisionForConditionalGeneration

    tokenizer = build_tokenizer()
    side = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 64, "intermediate_size": 64}
    config = Granite4VisionConfig(
        text_config={
            **side,
            "model_type": "granite",
            "vocab_size": tokenizer.n_vocab,
            "num_key_value_heads": 2,
            **text,
        },
        vision_config={**side, "model_type": "clip_vision_model", "image_size": 8, "patch_size": 2},
        qformer_config={"model_type": "blip_2_qformer", "num_hidden_layers": 1, "intermediate_size": 64},
        image_token_index=tokenizer.image_id,
        image_grid_pinpoints=[[8, 8]],
        downsample_rate="1/2",
        deepstack_layer_map=[[1, 0]],
        projector_dropout=0.0,
    )
    torch.manual_seed(0)
    model = Granite4VisionForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    write_language_files(folder, tokenizer)
    processor = {
        "image_processor_type": "LlavaNextImageProcessor",
        "size": {"height": 8, "width": 8},
        "crop_size": {"height": 8, "width": 8},
        "image_grid_pinpoints": [[8, 8]],
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    settings = {
        "processor_class": "Granite4VisionProcessor",
        "patch_size": 2,
        "downsample_rate": "1/2",
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "image_token": "<image>",
    }
    (folder / "processor_config.json").write_text(json.dumps(settings))
    return folder


def test_transformers_own_tiny_checkpoint(tmp_path: Path) -> None:
    source = transformers_tiny(tmp_path / "source")
    convert(source, tmp_path / "out", F32)
    reference = Reference(source)
    with granite4v.load(tmp_path / "out", device="cpu") as model:
        assert model.encode_image(load_image(noise_picture((64, 64)))).layers == [0]
        check_model(reference, model)


def test_what_its_text_model_computes_otherwise_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'text_config.hidden_act' is 'gelu'; expected 'silu'"):
        plan_conversion(transformers_tiny(tmp_path / "source", hidden_act="gelu"))
