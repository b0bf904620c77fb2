"""LoRA adapters: merged as peft merges, kept separate as llama.cpp applies them, refused when they do not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from granite4v.converter import Options, convert, describe, plan_conversion
from granite4v.errors import CheckpointError
from granite4v.ggml.gguf_file import GgufFile
from tests.helpers.gguf_edit import tensor_bytes
from tests.peers.llama import LlamaPeer
from tests.peers.reference import relative_l2
from tests.toy.checkpoint import PRESETS, AdapterSpec, CheckpointSpec, write_adapter, write_checkpoint

if TYPE_CHECKING:
    from tests.peers.reference import Reference

TINY = PRESETS["tiny"]
FUSED = replace(TINY, text_type="granitemoehybrid")
MERGED = Options("F32", "F32")
SEPARATE = Options("F32", "F32", lora="separate")
PROMPT = "Total amount due: 1,284.50 EUR in 12345 days."

ADAPTERS = {
    "plain": AdapterSpec(),
    "rslora": AdapterSpec(rank=8, alpha=4.0, use_rslora=True),
    "patterns": AdapterSpec(
        rank=4,
        alpha=8.0,
        rank_pattern=(("self_attn.q_proj", 2), ("layers.3.mlp.up_proj", 6)),
        alpha_pattern=(("self_attn.k_proj", 3.0), ("layers.2.self_attn.v_proj", 1.0)),
    ),
    "rslora with patterns": AdapterSpec(
        use_rslora=True, rank_pattern=(("o_proj", 9),), alpha_pattern=(("down_proj", 2.5),)
    ),
}


@pytest.fixture(scope="module")
def make_adapter(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Returns the directory of an adapter, without a model."""
    made: dict[tuple[CheckpointSpec, AdapterSpec], Path] = {}

    def make(adapter: AdapterSpec, spec: CheckpointSpec = TINY) -> Path:
        if (spec, adapter) not in made:
            made[spec, adapter] = write_adapter(tmp_path_factory.mktemp("adapter"), spec, adapter)
        return made[spec, adapter]

    return make


def with_adapter(options: Options, adapter: Path) -> Options:
    return replace(options, adapter=str(adapter))


def text_tensors(path: Path) -> dict[str, np.ndarray]:
    return {name: np.frombuffer(data, np.float32) for name, (_, data) in tensor_bytes(path).items()}


@pytest.mark.parametrize("name", ADAPTERS)
def test_merging_equals_pefts_merge_and_unload(
    name: str,
    make_checkpoint: Callable[[CheckpointSpec], Path],
    make_adapter: Callable[..., Path],
    load_reference: Callable[..., Reference],
    tmp_path: Path,
) -> None:
    """Compares matrix by matrix, within the rounding of a float32 sum of `rank` products."""
    adapter = make_adapter(ADAPTERS[name])
    convert(make_checkpoint(TINY), tmp_path / "merged", with_adapter(MERGED, adapter))
    merged = load_reference(TINY, adapter).model.state_dict()
    peft_made = tmp_path / "peft"
    shutil.copytree(make_checkpoint(TINY), peft_made)
    names = load_file(peft_made / "model.safetensors")
    save_file({key: merged[key].numpy() for key in names}, peft_made / "model.safetensors")
    convert(peft_made, tmp_path / "theirs", MERGED)
    base = convert(make_checkpoint(TINY), tmp_path / "base", MERGED).paths[0]
    ours, theirs = (text_tensors(tmp_path / kind / "text-F32.gguf") for kind in ("merged", "theirs"))
    changed = [key for key, values in text_tensors(base).items() if not np.array_equal(values, ours[key])]
    assert len(changed) == 7 * TINY.text_layers
    for key, values in ours.items():
        assert np.abs(values - theirs[key]).max() <= 4e-7 * np.abs(theirs[key]).max(), key


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_separate_adapter_in_stock_llama_cpp_equals_the_merged_model(
    name: str,
    make_checkpoint: Callable[[CheckpointSpec], Path],
    make_adapter: Callable[..., Path],
    load_reference: Callable[..., Reference],
    tmp_path: Path,
) -> None:
    adapter = make_adapter(ADAPTERS[name])
    convert(make_checkpoint(TINY), tmp_path / "out", with_adapter(SEPARATE, adapter))
    reference, base = load_reference(TINY, adapter), load_reference(TINY)
    ids = reference.prompt_ids(PROMPT)
    with LlamaPeer(tmp_path / "out" / "text-F32.gguf") as peer:
        off = peer.logits(ids)
        with peer.adapter(tmp_path / "out" / "lora-F32.gguf"):
            on = peer.logits(ids)
    assert relative_l2(off, base.all_logits(PROMPT)) < 5e-5
    assert relative_l2(on, reference.all_logits(PROMPT)) < 5e-5
    assert np.abs(on - off).max() > 0.1


def test_the_base_of_a_separate_adapter_is_the_base_alone(
    make_checkpoint: Callable[[CheckpointSpec], Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    source, adapter = make_checkpoint(TINY), make_adapter(ADAPTERS["plain"])
    convert(source, tmp_path / "base", Options("Q4_0", "Q8_0"))
    for lora in ("separate", "ignore"):
        out = tmp_path / lora
        summary = convert(source, out, Options("Q4_0", "Q8_0", lora=lora, adapter=str(adapter)))
        assert tensor_bytes(out / "text-Q4_0.gguf") == tensor_bytes(tmp_path / "base" / "text-Q4_0.gguf")
        names = ["text-Q4_0.gguf", "mmproj-Q8_0.gguf"] + (["lora-F16.gguf"] if lora == "separate" else [])
        assert [path.name for path in summary.paths] == names


def test_an_adapter_of_the_fused_mlp_is_split_with_it(
    make_checkpoint: Callable[[CheckpointSpec], Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    """gate and up of the fused matrix share one A; the dense counterpart gets the same one."""
    shared = AdapterSpec(share_gate_up=True)
    fused, dense = make_adapter(shared, FUSED), make_adapter(shared, TINY)
    convert(make_checkpoint(FUSED), tmp_path / "fused", with_adapter(MERGED, fused))
    convert(make_checkpoint(TINY), tmp_path / "dense", with_adapter(MERGED, dense))
    ours, theirs = (text_tensors(tmp_path / kind / "text-F32.gguf") for kind in ("fused", "dense"))
    for key, values in ours.items():
        assert np.abs(values - theirs[key]).max() <= 4e-7 * np.abs(theirs[key]).max(), key
    for kind, spec, adapter in (("fused", FUSED, fused), ("dense", TINY, dense)):
        convert(make_checkpoint(spec), tmp_path / f"{kind}-separate", with_adapter(SEPARATE, adapter))
    separate = [tensor_bytes(tmp_path / f"{kind}-separate" / "lora-F32.gguf") for kind in ("fused", "dense")]
    assert separate[0] == separate[1]


def test_the_adapter_file_says_what_it_is(
    make_checkpoint: Callable[[CheckpointSpec], Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = make_adapter(ADAPTERS["patterns"])
    convert(make_checkpoint(TINY), tmp_path / "out", with_adapter(SEPARATE, adapter))
    with (
        GgufFile.open(tmp_path / "out" / "lora-F32.gguf") as lora,
        GgufFile.open(tmp_path / "out" / "text-F32.gguf") as text,
    ):
        assert lora.metadata["general.architecture"] == "granite"
        assert lora.metadata["general.type"] == "adapter"
        assert lora.metadata["adapter.type"] == "lora"
        assert lora.metadata["adapter.lora.alpha"] == 8.0
        for file in (lora, text):
            assert file.metadata["granite4v.adapter"] == "separate"
            assert file.metadata["granite4v.adapter_source"] == str(adapter)
        assert lora.metadata["granite4v.pair_id"] == text.metadata["granite4v.pair_id"]
        assert lora.tensors["blk.0.attn_q.weight.lora_a"].shape == (2, 64)
        assert lora.tensors["blk.3.ffn_up.weight.lora_b"].shape == (176, 6)


# --- where adapters are ---


def test_an_adapter_beside_the_model_is_merged_by_itself(
    make_checkpoint: Callable[[CheckpointSpec], Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    both = shutil.copytree(make_checkpoint(TINY), tmp_path / "both")
    write_adapter(both, TINY, ADAPTERS["plain"])
    convert(both, tmp_path / "beside", MERGED)
    convert(make_checkpoint(TINY), tmp_path / "given", with_adapter(MERGED, make_adapter(ADAPTERS["plain"])))
    ours, theirs = (tensor_bytes(tmp_path / kind / "text-F32.gguf") for kind in ("beside", "given"))
    assert ours == theirs
    with GgufFile.open(tmp_path / "beside" / "text-F32.gguf") as file:
        assert file.metadata["granite4v.adapter"] == "merged"


@pytest.mark.parametrize("relative", [False, True])
def test_an_adapter_alone_names_its_base(
    relative: bool, make_checkpoint: Callable[[CheckpointSpec], Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_checkpoint(TINY)
    if relative:
        shutil.copytree(base, tmp_path / "base")
    named = replace(ADAPTERS["plain"], base_model_name_or_path="../base" if relative else str(base))
    alone = write_adapter(tmp_path / "alone", TINY, named)
    convert(alone, tmp_path / "out", MERGED)
    convert(base, tmp_path / "given", with_adapter(MERGED, make_adapter(ADAPTERS["plain"])))
    ours, theirs = (tensor_bytes(tmp_path / kind / "text-F32.gguf") for kind in ("out", "given"))
    assert ours == theirs


@pytest.mark.parametrize("naming", ["v4", "old"])
def test_an_adapter_may_spell_names_otherwise_than_its_base(
    naming: str, make_checkpoint: Callable[[CheckpointSpec], Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = make_adapter(ADAPTERS["plain"], replace(TINY, naming=naming))
    convert(make_checkpoint(TINY), tmp_path / "other", with_adapter(MERGED, adapter))
    convert(make_checkpoint(TINY), tmp_path / "same", with_adapter(MERGED, make_adapter(ADAPTERS["plain"])))
    ours, theirs = (tensor_bytes(tmp_path / kind / "text-F32.gguf") for kind in ("other", "same"))
    assert ours == theirs


def test_names_that_keep_the_adapters_own_name_are_read(
    make_checkpoint: Callable[[CheckpointSpec], Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    plain = make_adapter(ADAPTERS["plain"])
    renamed = shutil.copytree(plain, tmp_path / "renamed")
    tensors = load_file(plain / "adapter_model.safetensors")
    save_file(
        {name.replace(".weight", ".default.weight"): values for name, values in tensors.items()},
        renamed / "adapter_model.safetensors",
    )
    for name, adapter in (("a", plain), ("b", renamed)):
        convert(make_checkpoint(TINY), tmp_path / name, with_adapter(MERGED, adapter))
    assert tensor_bytes(tmp_path / "a" / "text-F32.gguf") == tensor_bytes(tmp_path / "b" / "text-F32.gguf")


def test_an_adapter_of_the_image_side_is_merged_there_and_cannot_be_separate(
    make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path: Path
) -> None:
    module = "model.vision_tower.encoder.layers.1.mlp.fc1"
    adapter = write_adapter(tmp_path / "adapter", TINY, ADAPTERS["plain"])
    rng = np.random.default_rng(0)
    a = rng.standard_normal((4, TINY.vision_hidden), dtype=np.float32)
    b = rng.standard_normal((TINY.vision_ffn, 4), dtype=np.float32)
    pair = {f"base_model.model.{module}.lora_{side}.weight": values for side, values in (("A", a), ("B", b))}
    save_file(pair, adapter / "adapter_model.safetensors")
    convert(make_checkpoint(TINY), tmp_path / "out", with_adapter(MERGED, adapter))
    found = tensor_bytes(tmp_path / "out" / "mmproj-F32.gguf")["v.blk.1.ffn_up.weight"][1]
    weight = load_file(make_checkpoint(TINY) / "model.safetensors")[f"{module}.weight"]
    expected = np.pad(weight + np.float32(1.5) * (b @ a), ((0, 24), (0, 0)))
    assert np.abs(np.frombuffer(found, np.float32) - expected.ravel()).max() < 1e-5
    with pytest.raises(
        CheckpointError, match="changes the image side or layers of cross-attention as well .* use --lora merge"
    ):
        plan_conversion(make_checkpoint(TINY), with_adapter(SEPARATE, adapter))


def test_the_plan_shows_what_is_merged(
    make_checkpoint: Callable[[CheckpointSpec], Path], make_adapter: Callable[..., Path]
) -> None:
    plan = plan_conversion(make_checkpoint(TINY), with_adapter(MERGED, make_adapter(ADAPTERS["plain"])))
    assert describe(plan).count("merge LoRA") == 7 * TINY.text_layers


# --- adapters that do not fit ---


def damaged(folder: Path, config: dict[str, Any] | None = None, **change: Any) -> Path:
    """Changes settings of the adapter, or replaces tensors (None: removes them)."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    if change:
        tensors = load_file(folder / "adapter_model.safetensors")
        for key, values in change.items():
            name = f"base_model.model.model.language_model.layers.0.{key.replace('__', '.')}.weight"
            tensors.pop(name, None)
            if values is not None:
                tensors[name] = values
        save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ({"use_dora": True}, {}, "it uses DoRA"),
        ({"modules_to_save": ["lm_head"]}, {}, "modules trained in full beside the LoRA matrices ('modules_to_save')"),
        ({"bias": "all"}, {}, "it trains biases (bias = 'all')"),
        ({"lora_bias": True}, {}, "LoRA biases ('lora_bias')"),
        ({"trainable_token_indices": [1, 2]}, {}, "trained token embeddings"),
        ({"peft_type": "IA3"}, {}, "it is of type 'IA3'; only LORA converts"),
        ({"init_lora_weights": "pissa_niter_4"}, {}, "it starts from 'pissa_niter_4', which alters the base weights"),
        ({"r": 5}, {}, "found [4, 64], expected [5, 64]"),
        ({}, {"self_attn__q_proj__lora_B": None}, "self_attn.q_proj.weight' has no lora_B"),
        ({}, {"self_attn__q_proj__lora_A": np.zeros((4, 32), np.float32)}, "found [4, 32], expected [4, 64]"),
        ({}, {"self_attn__r_proj__lora_A": np.zeros((4, 64), np.float32)}, "a linear layer that the model does not"),
        ({}, {"self_attn__q_proj__lora_magnitude": np.zeros(64, np.float32)}, "neither lora_A nor lora_B"),
        ({}, {"self_attn__q_proj__lora_A__default": np.zeros((4, 64), np.float32)}, "doubled tensor"),
    ],
)
def test_adapters_that_cannot_be_applied(
    config: dict[str, Any],
    change: dict[str, Any],
    message: str,
    make_checkpoint: Callable[[CheckpointSpec], Path],
    tmp_path: Path,
) -> None:
    adapter = damaged(write_adapter(tmp_path / "adapter", TINY, AdapterSpec()), config, **change)
    with pytest.raises(CheckpointError) as caught:
        convert(make_checkpoint(TINY), tmp_path / "models" / "out", with_adapter(MERGED, adapter))
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"the adapter '{adapter}' cannot be applied to")
    assert not (tmp_path / "models").exists()


def test_an_adapter_for_another_model_is_refused_with_all_that_differs(
    make_checkpoint: Callable[[CheckpointSpec], Path], make_adapter: Callable[..., Path]
) -> None:
    other = make_adapter(AdapterSpec(), replace(TINY, text_hidden=128, text_layers=10))
    with pytest.raises(CheckpointError) as caught:
        plan_conversion(make_checkpoint(TINY), with_adapter(MERGED, other))
    assert "found [4, 128], expected [4, 64]" in str(caught.value)
    assert "... and" in str(caught.value)


def test_an_adapter_that_is_ignored_may_be_of_any_kind(
    make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path: Path
) -> None:
    adapter = damaged(write_adapter(tmp_path / "adapter", TINY, AdapterSpec()), {"use_dora": True})
    options = replace(with_adapter(MERGED, adapter), lora="ignore")
    assert plan_conversion(make_checkpoint(TINY), options).files[0].metadata["granite4v.adapter"] == "ignored"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config", "has no 'adapter_config.json'; it is not a PEFT adapter"),
        ("weights", "has 'adapter_config.json' but no 'adapter_model.safetensors'"),
    ],
)
def test_an_adapter_without_its_files(
    name: str, message: str, make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", TINY, AdapterSpec())
    (adapter / {"config": "adapter_config.json", "weights": "adapter_model.safetensors"}[name]).unlink()
    with pytest.raises(CheckpointError, match=message):
        plan_conversion(make_checkpoint(TINY), with_adapter(MERGED, adapter))


def test_an_adapter_alone_without_a_base_says_what_to_do(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", TINY, AdapterSpec())
    with pytest.raises(CheckpointError, match="has no 'base_model_name_or_path'. Give the base model as SRC"):
        plan_conversion(adapter)


def test_bfloat16_adapters_are_merged_in_float32(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file as load_torch

    source = write_checkpoint(tmp_path / "source", replace(TINY, dtype="bfloat16"))
    write_adapter(source, TINY, AdapterSpec(dtype="bfloat16"))
    convert(source, tmp_path / "out", MERGED)
    found = tensor_bytes(tmp_path / "out" / "text-F32.gguf")["blk.2.ffn_gate.weight"][1]
    module = "model.language_model.layers.2.mlp.gate_proj"
    base = load_torch(source / "model.safetensors")[f"{module}.weight"].float()
    lora = load_torch(source / "adapter_model.safetensors")
    a, b = (lora[f"base_model.model.{module}.lora_{side}.weight"].to(torch.float64) for side in "AB")
    expected = (base.double() + 1.5 * (b @ a)).numpy()
    assert np.abs(np.frombuffer(found, np.float32).reshape(expected.shape) - expected).max() < 1e-6
