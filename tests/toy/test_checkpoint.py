"""The random checkpoints match what transformers would have saved, in every layout."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from tests.helpers.pictures import SMALL_SIZES, noise_picture, odd_files, text_picture
from tests.toy.checkpoint import MAPPING_CASES, PRESETS, AdapterSpec, CheckpointSpec, model_tensors, write_adapter
from tests.toy.checkpoint import write_checkpoint as write

TINY = PRESETS["tiny"]


def test_names_and_shapes_are_those_of_the_reference_model(load_reference):
    for spec in (TINY, replace(TINY, tied=False), PRESETS["tiny-real-tiles"]):
        model = load_reference(spec).model
        expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        if spec.tied:
            del expected["lm_head.weight"]
        n_vocab = model.config.text_config.vocab_size
        assert {tensor.name: tensor.shape for tensor in model_tensors(spec, n_vocab)} == expected


def test_full_size_has_the_published_number_of_parameters():
    counts = [np.prod(tensor.shape) for tensor in model_tensors(PRESETS["full-4.1"], n_vocab=100353)]
    assert round(sum(counts) / 1e9, 3) == 3.997


def test_spelling_and_shards_hold_the_same_values(tmp_path):
    v5 = load_file(write(tmp_path / "v5", TINY) / "model.safetensors")
    v4 = load_file(write(tmp_path / "v4", replace(TINY, naming="v4")) / "model.safetensors")
    assert {name.replace(".vision_model", "") for name in v4} == set(v5)
    old = load_file(write(tmp_path / "old", replace(TINY, naming="old")) / "model.safetensors")
    assert "language_model.model.layers.0.mlp.up_proj.weight" in old and "image_newline" in old
    sharded = write(tmp_path / "sharded", replace(TINY, max_shard_bytes=4_000_000))
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    for name, file_name in index["weight_map"].items():
        assert np.array_equal(load_file(sharded / file_name)[name], v5[name])


def test_hybrid_text_fuses_gate_and_up(tmp_path):
    dense = load_file(write(tmp_path / "dense", TINY) / "model.safetensors")
    fused = load_file(write(tmp_path / "fused", replace(TINY, text_type="granitemoehybrid")) / "model.safetensors")
    layer = "model.language_model.layers.3."
    halves = [dense[f"{layer}mlp.{part}_proj.weight"] for part in ("gate", "up")]
    assert np.array_equal(fused[f"{layer}shared_mlp.input_linear.weight"], np.concatenate(halves))
    assert not any(".mlp." in name for name in fused if "language_model" in name)


def test_adapter_loads_in_peft_and_changes_the_answer(tmp_path, load_reference):
    adapter = AdapterSpec(rank_pattern=(("q_proj", 8),), alpha_pattern=(("down_proj", 3.0),))
    directory = write_adapter(tmp_path, TINY, adapter)
    base, merged = load_reference(TINY).logits("hello"), load_reference(TINY, directory).logits("hello")
    assert np.abs(base - merged).max() > 0.1


@pytest.mark.parametrize("name", MAPPING_CASES)
def test_mapping_cases_load(name, load_reference):
    picture = noise_picture((100, 80))
    reference = load_reference(MAPPING_CASES[name])
    streams = reference.streams(picture)
    assert all(stream.shape == (reference.n_tokens(picture), 64) for stream in streams.values())
    assert (
        sorted(streams)
        == {
            "unsorted": [0, 1, 2, 3, 4, 5, 7],
            "nothing-at-layer-0": [1, 2, 3, 4, 5, 7],
            "non-negative": [0, 2, 3, 4, 5, 7],
            "layer-named-twice": [0, 2, 3, 4, 5, 7],
        }[name]
    )


def test_answers_depend_on_the_picture_and_vary(load_reference):
    reference = load_reference(TINY)
    answers = [reference.greedy("what is this?", [draw((300, 200))]) for draw in (text_picture, noise_picture)]
    assert answers[0] != answers[1]
    assert all(len(answer) == 32 and len(set(answer)) > 8 for answer in answers)


def test_greedy_answers_are_those_of_one_pass_over_everything(load_reference):
    reference = load_reference(TINY)
    prompt, answer = reference.prompt_ids("what is this?"), reference.greedy("what is this?")
    with torch.inference_mode():
        logits = reference.model(torch.tensor([prompt + answer])).logits[0]
    assert logits.argmax(-1)[len(prompt) - 1 : -1].tolist() == answer


def test_processor_and_by_hand_prompt_agree(load_reference):
    reference = load_reference(TINY)
    pictures = [text_picture((300, 200)), noise_picture((90, 70))]
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "first 1234567"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
        {"role": "user", "content": [{"type": "text", "text": "second"}, {"type": "image"}]},
    ]
    whole = reference.processor(images=pictures, text=reference.prompt_text(messages), return_tensors="pt")
    assert reference.prompt_ids(messages, pictures) == whole["input_ids"][0].tolist()


def test_every_odd_file_and_size_goes_through_the_reference(load_reference):
    reference = load_reference(TINY)
    for size in SMALL_SIZES:
        assert reference.tiles(noise_picture(size)).shape[1:] == (3, 64, 64)
    for name, data in odd_files().items():
        assert reference.tiles(Image.open(io.BytesIO(data))).dtype == np.float32, name


def test_specifications_are_hashable_and_compare_by_value():
    assert CheckpointSpec() == TINY and len({CheckpointSpec(), TINY}) == 1
