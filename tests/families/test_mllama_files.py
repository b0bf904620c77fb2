"""Mllama's files: every tensor has the checkpoint's values, and stock llama.cpp runs the text file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from granite4v import gguf_keys as keys
from granite4v.converter import Options, convert
from granite4v.converter.requantize import requantize
from granite4v.errors import CheckpointError
from granite4v.families.registry import read_vision
from granite4v.ggml.gguf_file import GgufFile
from granite4v.gguf_summary import summarize
from tests.helpers.damaged import edit, refusal
from tests.helpers.gguf_edit import tensor_bytes
from tests.peers.llama import LlamaPeer
from tests.toy.checkpoint import PRESETS, AdapterSpec, CheckpointSpec, write_adapter

SPEC, FIRST, WIDE = PRESETS["tiny-mllama"], PRESETS["tiny-mllama-first"], PRESETS["tiny-mllama-wide"]
CROSS = {
    "input_layernorm.weight": "attn_norm.weight",
    "cross_attn.q_proj.weight": "attn_q.weight",
    "cross_attn.k_proj.weight": "attn_k.weight",
    "cross_attn.v_proj.weight": "attn_v.weight",
    "cross_attn.o_proj.weight": "attn_output.weight",
    "cross_attn.q_norm.weight": "attn_q_norm.weight",
    "cross_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "cross_attn_attn_gate": "attn_gate",
    "cross_attn_mlp_gate": "ffn_gate_scale",
}
TOWER = {
    "class_embedding": "v.class_embd",
    "patch_embedding.weight": "v.patch_embd.weight",
    "gated_positional_embedding.embedding": "v.position_embd.weight",
    "gated_positional_embedding.gate": "v.tile_position_embd.gate",
    "gated_positional_embedding.tile_embedding.weight": "v.tile_position_embd",
    "pre_tile_positional_embedding.gate": "v.pre_tile_embd.gate",
    "pre_tile_positional_embedding.embedding.weight": "v.pre_tile_embd",
    "post_tile_positional_embedding.gate": "v.post_tile_embd.gate",
    "post_tile_positional_embedding.embedding.weight": "v.post_tile_embd",
    "layernorm_pre.weight": "v.pre_ln.weight",
    "layernorm_post.bias": "v.post_ln.bias",
    "transformer.layers.3.self_attn.o_proj.weight": "v.blk.3.attn_out.weight",
    "transformer.layers.0.input_layernorm.bias": "v.blk.0.ln1.bias",
    "global_transformer.layers.1.gate_attn": "v.global_blk.1.attn_gate",
    "global_transformer.layers.1.gate_ffn": "v.global_blk.1.ffn_gate_scale",
    "global_transformer.layers.0.self_attn.q_proj.weight": "v.global_blk.0.attn_q.weight",
    "global_transformer.layers.1.post_attention_layernorm.weight": "v.global_blk.1.ln2.weight",
}


def values(file: Path, name: str) -> np.ndarray:
    return np.frombuffer(tensor_bytes(file)[name][1], np.float32)


def checkpoint_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Returns the tensors by their names in transformers 5."""
    tensors = load_file(folder / "model.safetensors")
    if not any(name.startswith("language_model.") for name in tensors):
        return tensors
    renamed = {name.replace("language_model.model.", "language_model."): value for name, value in tensors.items()}
    head = renamed.pop("language_model.lm_head.weight")
    return {f"model.{name}": value for name, value in renamed.items()} | {"lm_head.weight": head}


def pairs(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows of each head for llama.cpp's rotary embedding."""
    return matrix.reshape(heads, 2, len(matrix) // heads // 2, -1).swapaxes(1, 2).reshape(matrix.shape)


@pytest.mark.parametrize("spec", [SPEC, FIRST], ids=["today's names", "published names"])
def test_every_tensor_is_the_checkpoints(
    spec: CheckpointSpec, make_checkpoint: Callable[..., Path], make_model: Callable[..., Path]
) -> None:
    source, folder = checkpoint_tensors(make_checkpoint(spec)), make_model(spec)
    text, vision = (
        {name: np.frombuffer(data, np.float32) for name, (_, data) in tensor_bytes(folder / file).items()}
        for file in ("text-F32.gguf", "mmproj-F32.gguf")
    )
    own = [i for i in range(spec.text_layers) if i not in spec.cross_layers]
    for k, i in enumerate(own):
        layer = f"model.language_model.layers.{i}."
        for part, heads in (("q", spec.text_heads), ("k", spec.text_kv_heads)):
            expected = pairs(source[f"{layer}self_attn.{part}_proj.weight"], heads)
            assert np.array_equal(text[f"blk.{k}.attn_{part}.weight"], expected.ravel())
        for theirs, ours in (("self_attn.v_proj", "attn_v"), ("mlp.down_proj", "ffn_down")):
            assert np.array_equal(text[f"blk.{k}.{ours}.weight"], source[f"{layer}{theirs}.weight"].ravel())
    assert f"blk.{len(own)}.attn_q.weight" not in text
    head = source["lm_head.weight"]
    embedding = source["model.language_model.embed_tokens.weight"]
    assert len(embedding) == len(head) + 8
    assert np.array_equal(text["token_embd.weight"], embedding[: len(head)].ravel())
    assert np.array_equal(text["output.weight"], head.ravel())
    for i in spec.cross_layers:
        for theirs, ours in CROSS.items():
            expected = source[f"model.language_model.layers.{i}.{theirs}"].ravel()
            assert np.array_equal(vision[f"xattn.blk.{i}.{ours}"], expected)
    for theirs, ours in TOWER.items():
        assert np.array_equal(vision[ours], source[f"model.vision_model.{theirs}"].ravel())
    for part in ("weight", "bias"):
        assert np.array_equal(vision[f"mm.0.{part}"], source[f"model.multi_modal_projector.{part}"].ravel())


def test_the_tower_feed_forward_is_padded_with_zeros(
    make_checkpoint: Callable[..., Path], make_model: Callable[..., Path]
) -> None:
    source, folder = checkpoint_tensors(make_checkpoint(SPEC)), make_model(SPEC)
    up = values(folder / "mmproj-F32.gguf", "v.blk.1.ffn_up.weight").reshape(64, 32)
    assert np.array_equal(up[:48], source["model.vision_model.transformer.layers.1.mlp.fc1.weight"])
    assert not up[48:].any()


def test_facts_are_read_back(make_model: Callable[..., Path]) -> None:
    with GgufFile.open(make_model(SPEC) / "mmproj-F32.gguf") as file:
        family, config = read_vision(file)
        assert file.integer(keys.IMAGE_TOKEN_ID, 0, 1 << 20) == 405
    assert family.name == "mllama"
    assert config.tower.intermediate_states == (0, 1, 3)  # the input of layers 0, 1, 3
    assert (config.tower.num_hidden_layers, config.tower.num_global_layers) == (4, 2)
    assert config.tower.supported_aspect_ratios[5] == (2, 2)
    assert config.tiling.supported_aspect_ratios == config.tower.supported_aspect_ratios
    assert np.float32(config.tiling.image_mean).tolist() == np.float32([0.48145466, 0.4578275, 0.40821073]).tolist()
    assert config.tiling.resample == 2
    cross = config.cross_attention
    assert cross is not None and cross.layers == (1, 3, 4, 8)
    assert (cross.hidden_size, cross.intermediate_size, cross.head_dim) == (64, 96, 16)
    assert (config.streams, config.newline) == ((), False)


def test_the_image_token_is_beyond_the_text_files_vocabulary(make_model: Callable[..., Path]) -> None:
    with GgufFile.open(make_model(SPEC) / "text-F32.gguf") as file:
        assert file.n_texts(keys.TOKENS) == 405 and keys.IMAGE_TOKEN_ID not in file
        assert file.tensors["token_embd.weight"].shape == file.tensors["output.weight"].shape == (405, 64)
        added = json.loads(file.text(keys.TOKENIZER_HF_JSON))["added_tokens"]
        assert added[-1]["id"] == 405 and added[-1]["content"] == "<|image|>"
        assert "<|image|>" in file.text(keys.CHAT_TEMPLATE)


def test_layers_of_cross_attention_are_quantized_as_the_text(make_model: Callable[..., Path]) -> None:
    types = {
        name: kind for name, (kind, _) in tensor_bytes(make_model(WIDE, "Q4_K_M", "F16") / "mmproj-F16.gguf").items()
    }
    names = {kind if isinstance(kind, str) else kind.name for kind in types.values()}
    assert names == {"Q4_K", "F16", "F32"}
    summary = summarize(make_model(WIDE, "Q4_K_M", "F16") / "mmproj-F16.gguf")
    assert summary["tensor_types"]["Q4_K"]["tensors"] == 2 * 7
    assert summary["cross_attention"]["layers"] == "1, 3" and summary["sequences"] == "one at a time"


def test_requantizing_keeps_them_byte_for_byte(make_model: Callable[..., Path], tmp_path: Path) -> None:
    before = make_model(WIDE, "Q4_K_M", "F16") / "mmproj-F16.gguf"
    after = requantize(before, "Q8_0", tmp_path)
    found, expected = tensor_bytes(after), tensor_bytes(before)
    cross = [name for name in expected if name.startswith("xattn.")]
    assert cross and all(found[name] == expected[name] for name in cross)
    converted = tensor_bytes(make_model(WIDE, "Q4_K_M", "Q8_0") / "mmproj-Q8_0.gguf")
    assert {name: kind for name, (kind, _) in found.items()} == {name: kind for name, (kind, _) in converted.items()}
    with GgufFile.open(after) as one, GgufFile.open(before) as other:
        assert read_vision(one)[1].cross_attention == read_vision(other)[1].cross_attention


def test_an_adapter_is_merged_into_both_kinds_of_layers(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", SPEC, AdapterSpec())
    source, lora = checkpoint_tensors(make_checkpoint(SPEC)), load_file(adapter / "adapter_model.safetensors")
    convert(make_checkpoint(SPEC), tmp_path / "out", Options("F32", "F32", adapter=str(adapter)))
    for theirs, file, ours in (
        ("layers.3.cross_attn.v_proj", "mmproj-F32.gguf", "xattn.blk.3.attn_v.weight"),
        ("layers.4.mlp.down_proj", "mmproj-F32.gguf", "xattn.blk.4.ffn_down.weight"),
        ("layers.2.self_attn.v_proj", "text-F32.gguf", "blk.1.attn_v.weight"),
    ):
        module = f"model.language_model.{theirs}"
        a, b = (lora[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
        expected = source[f"{module}.weight"] + np.float32(6.0 / 4) * (b @ a)
        found = values(tmp_path / "out" / file, ours).reshape(expected.shape)
        assert np.abs(found - expected).max() <= 4e-6
        assert np.abs(found - source[f"{module}.weight"]).max() > 0.1


def test_a_separate_adapter_on_them_is_refused(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", SPEC, AdapterSpec())
    with pytest.raises(CheckpointError, match="layers of cross-attention as well .*use --lora merge"):
        convert(make_checkpoint(SPEC), tmp_path / "out", Options("F32", "F32", "separate", str(adapter)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("text_config", {"cross_attention_layers": [1, 1]}, "a list of different layers, at least one"),
        ("text_config", {"cross_attention_layers": [9]}, "an integer from 0 to 8"),
        ("text_config", {"cross_attention_layers": list(range(9))}, "at least one decoder layer of self-attention"),
        ("vision_config", {"norm_eps": 1e-6}, "'vision_config.norm_eps' is 1e-06; expected 1e-05"),
        ("vision_config", {"intermediate_layers_indices": [3, 1]}, "must be different and ascending"),
        ("vision_config", {"vision_output_dim": 96}, "'vision_config.vision_output_dim' is 96; expected 128"),
        ("vision_config", {"supported_aspect_ratios": [[1, 1]]}, "'max_image_tiles' is 4; expected a number whose"),
        ("vision_config", {"supported_aspect_ratios": [[3, 3]]}, "each must have 1 to 4 tiles"),
        ("vision_config", {"attention_heads": 5}, "a width of 32 with 5 heads"),
    ],
)
def test_what_no_such_model_can_be(
    section: str, change: dict[str, object], message: str, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = shutil.copytree(make_checkpoint(SPEC), tmp_path / "source")
    edit(source / "config.json", lambda config: config[section].update(change))
    assert message in refusal(source)


def test_equal_bounds_of_scaled_frequencies_are_a_step(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """As in transformers: wavelengths longer than the bound are divided by the factor, shorter ones by 1."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig

    scaled = tuple((key, 1.0 if "freq" in key else value) for key, value in SPEC.rope_scaling)
    spec = replace(SPEC, rope_scaling=scaled)
    convert(make_checkpoint(spec), tmp_path / "out", Options("F32", "F32"))
    config = MllamaTextConfig(
        hidden_size=64, num_attention_heads=4, rope_parameters={**dict(scaled), "rope_theta": spec.rope_theta}
    )
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = spec.rope_theta ** -(np.arange(0, 16, 2) / 16)
    found = values(tmp_path / "out" / "text-F32.gguf", "rope_freqs.weight")
    assert np.allclose(plain / found, frequencies.numpy(), rtol=1e-6)
    assert set(found) == {1.0, 8.0}


@pytest.mark.parametrize("spec", [SPEC, FIRST], ids=["today's names", "published names"])
def test_stock_llama_runs_the_text_file_as_transformers_does(
    spec: CheckpointSpec, make_checkpoint: Callable[..., Path], make_model: Callable[..., Path]
) -> None:
    """Logits of up to 19 differ by 3e-5. That transformers loads every tensor shows that the checkpoint is complete."""
    import torch
    from transformers import AutoModelForImageTextToText

    model, loading = AutoModelForImageTextToText.from_pretrained(
        make_checkpoint(spec), dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(loading.values())
    ids = [385, *range(10, 100, 10)]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    with LlamaPeer(make_model(spec) / "text-F32.gguf") as peer:
        assert np.abs(peer.logits(ids) - expected).max() < 1e-4
