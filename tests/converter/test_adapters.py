"""Adapters with unusual settings, and adapters that peft itself wrote."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from granite4v.converter import Options, convert
from tests.helpers.damaged import edit, refusal
from tests.helpers.gguf_edit import tensor_bytes
from tests.toy.checkpoint import PRESETS, AdapterSpec, CheckpointSpec, write_adapter

TINY = PRESETS["tiny"]


@pytest.fixture
def source(make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path: Path) -> Path:
    return shutil.copytree(make_checkpoint(PRESETS["tiny"]), tmp_path / "source")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 0}, "'adapter_config.json': 'r' is 0; expected an integer from 1 to 262144."),
        ({"r": -4}, "'r' is -4; expected an integer"),
        ({"r": "4"}, "'r' is '4'; expected an integer"),
        ({"lora_alpha": float("nan")}, "'lora_alpha' is NaN; expected a number"),
        ({"lora_alpha": "8"}, "'lora_alpha' is '8'; expected a number"),
        ({"use_rslora": "yes"}, "'use_rslora' is 'yes'; expected true or false"),
        ({"rank_pattern": ["q_proj"]}, "'rank_pattern' is [\"q_proj\"]; expected a section"),
        ({"rank_pattern": {"q_proj": 0}}, "'rank_pattern.q_proj' is 0; expected an integer from 1"),
        ({"alpha_pattern": {"q_proj": "x"}}, "'alpha_pattern.q_proj' is 'x'; expected a number"),
        ({"rank_pattern": {"(": 4}}, "the pattern '(', which is not a regular expression"),
        ({"rank_pattern": {"(.*x)*y": 4}}, "the pattern '(.*x)*y'; expected the end of a module's name, or a regular"),
        ({"rank_pattern": {".*" * 20 + "z": 4}}, "at most 4 repetitions and no repeated groups"),
        ({"alpha_pattern": {"a?" * 30 + "a" * 30: 4}}, "at most 4 repetitions and no repeated groups"),
        ({"base_model_name_or_path": 7}, "'base_model_name_or_path' is 7; expected a string"),
        ({"base_model_name_or_path": "/no/such/folder"}, "names '/no/such/folder' as its base model, and there is no"),
        ({"base_model_name_or_path": "../gone"}, "names '../gone' as its base model, and there is no such directory"),
        ({"base_model_name_or_path": "x" * 5000}, "as its base model, and there is no such directory; give the base"),
    ],
)
def test_adapters_with_odd_settings(change: dict[str, Any], message: str, source: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", TINY, AdapterSpec(base_model_name_or_path=str(source)))
    edit(adapter / "adapter_config.json", lambda values: values.update(change))
    assert message in refusal(adapter)


def test_an_adapter_of_another_type_of_numbers_is_refused(source: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", TINY, AdapterSpec(base_model_name_or_path=str(source)))
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name].astype(np.int8)}, adapter / "adapter_model.safetensors")
    assert f"'{name}' in 'adapter_model.safetensors' has type I8; expected F32, F16, BF16" in refusal(adapter)


@pytest.mark.parametrize("spelling", ["as peft saves", "without the prefix", "with the adapter's name"])
def test_an_adapter_that_peft_wrote(spelling: str, source: Path, tmp_path: Path) -> None:
    """Saved and merged by peft itself, with the three spellings of keys that its versions have used."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32)
    modules = r".*language_model.*\.(q_proj|down_proj)"
    settings = LoraConfig(r=4, lora_alpha=12, target_modules=modules, rank_pattern={"layers.1.self_attn.q_proj": 2})
    wrapped = get_peft_model(model, settings)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    wrapped.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    assert all(name.startswith("base_model.model.") for name in tensors)
    rename = {
        "as peft saves": lambda name: name,
        "without the prefix": lambda name: name.removeprefix("base_model.model."),
        "with the adapter's name": lambda name: name.replace(".weight", ".default.weight"),
    }[spelling]
    save_file({rename(name): values for name, values in tensors.items()}, path)
    convert(source, tmp_path / "out", Options("F32", "F32", adapter=str(tmp_path / "adapter")))
    merged = wrapped.merge_and_unload().state_dict()
    found = tensor_bytes(tmp_path / "out" / "text-F32.gguf")
    for i in range(TINY.text_layers):
        expected = merged[f"model.language_model.layers.{i}.mlp.down_proj.weight"].numpy()
        ours = np.frombuffer(found[f"blk.{i}.ffn_down.weight"][1], np.float32).reshape(expected.shape)
        assert np.abs(ours - expected).max() <= 4e-7 * np.abs(expected).max()
    expected = merged["model.language_model.layers.1.self_attn.q_proj.weight"].numpy()
    halves = expected.reshape(TINY.text_heads, 2, TINY.head_dim // 2, -1).swapaxes(1, 2).reshape(expected.shape)
    ours = np.frombuffer(found["blk.1.attn_q.weight"][1], np.float32).reshape(expected.shape)
    assert np.abs(ours - halves).max() <= 4e-7 * np.abs(expected).max()
