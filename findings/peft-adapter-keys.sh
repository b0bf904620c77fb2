#!/usr/bin/env bash
# peft: an adapter file holds more than LoRA matrices, and spells its keys by the kind of layer
#
# Expected: adapter_model.safetensors has two tensors for each adapted layer, named
#   "<module>.lora_A.weight" and "<module>.lora_B.weight", and nothing of the base model.
# Observed (peft 0.21.2, transformers 5.23.0), for one LoraConfig over a projection, the input
#   embedding and the output head:
#   - linear layers follow that pattern;
#   - the embedding's are "lora_embedding_A" and "lora_embedding_B", without ".weight", stored
#     (rank, rows) and (width, rank): their product is the transposed update;
#   - as soon as an embedding or the head is a target, their complete base weights are in the file,
#     too, under "<module>.base_layer.weight", a name that the base checkpoint does not know. They
#     make up most of the file and are unchanged by training.
#   peft warns of the last point when saving; who receives the file gets no hint.
# Output (vocabulary 48, width 16, rank 2; "base_model.model." left out):
#   peft 0.21.2, transformers 5.23.0
#   lm_head.base_layer.weight (48, 16)
#   lm_head.lora_A.weight (2, 16)
#   lm_head.lora_B.weight (48, 2)
#   model.embed_tokens.base_layer.weight (48, 16)
#   model.embed_tokens.lora_embedding_A (2, 48)
#   model.embed_tokens.lora_embedding_B (16, 2)
#   model.layers.0.self_attn.q_proj.lora_A.weight (2, 16)
#   model.layers.0.self_attn.q_proj.lora_B.weight (16, 2)
#   of 1856 numbers in the file, 1536 are copies of the base model's
# Why it matters: a converter that merges adapters, or turns them into GGUF, must match three patterns
#   and recognize base weights; one that rejects unknown names refuses a good adapter, and one that
#   skips them drops the embedding's update.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    'peft==0.21.2' 'transformers==5.23.0' 'torch==2.13.0' 'safetensors==0.8.0' 'numpy==2.4.6'
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

print(f"peft {version('peft')}, transformers {version('transformers')}")
torch.manual_seed(0)
sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=48, tie_word_embeddings=False, **sizes))
base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
targets = ["q_proj", "embed_tokens", "lm_head"]
config = LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False)
adapted = get_peft_model(model, config)
adapted.save_pretrained("adapter")

prefix = "base_model.model."
saved = load_file("adapter/adapter_model.safetensors")
assert all(name.startswith(prefix) for name in saved)
saved = {name.removeprefix(prefix): tensor for name, tensor in sorted(saved.items())}
for name, tensor in saved.items():
    print(name, tuple(tensor.shape))
assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == {
    "lm_head.base_layer.weight": (48, 16),
    "lm_head.lora_A.weight": (2, 16),
    "lm_head.lora_B.weight": (48, 2),
    "model.embed_tokens.base_layer.weight": (48, 16),
    "model.embed_tokens.lora_embedding_A": (2, 48),
    "model.embed_tokens.lora_embedding_B": (16, 2),
    "model.layers.0.self_attn.q_proj.lora_A.weight": (2, 16),
    "model.layers.0.self_attn.q_proj.lora_B.weight": (16, 2),
}
copies = {name: tensor for name, tensor in saved.items() if ".base_layer." in name}
assert all(torch.equal(tensor, base[name.replace(".base_layer", "")]) for name, tensor in copies.items())

merged = adapted.merge_and_unload().state_dict()
table = "model.embed_tokens"
update = saved[f"{table}.lora_embedding_B"] @ saved[f"{table}.lora_embedding_A"]  # alpha / rank is 1
assert torch.allclose(merged[f"{table}.weight"], base[f"{table}.weight"] + update.T, atol=1e-6)
update = saved["lm_head.lora_B.weight"] @ saved["lm_head.lora_A.weight"]
assert torch.allclose(merged["lm_head.weight"], base["lm_head.weight"] + update, atol=1e-6)

everything = sum(tensor.numel() for tensor in saved.values())
of_base = sum(tensor.numel() for tensor in copies.values())
print(f"of {everything} numbers in the file, {of_base} are copies of the base model's")
PYTHON
