#!/usr/bin/env bash
# llama.cpp: a saved sequence depends on whether flash attention was on
#
# Expected: flash attention is a way to compute; keys and values are the same with and without. So a
#   state that llama_state_seq_get_data() saved, or a file by llama_state_save_file(), is restored in a
#   context of the same model, size and cache types whatever its flash_attn_type is.
# Observed (llama.cpp as shipped by llama-cpp-python 0.3.36): without flash attention values are stored
#   transposed, and the state keeps them so. A context of the other kind refuses it: the calls return 0
#   and false. Here the two kinds of state even have the same size. With flash_attn_type AUTO, the
#   default, the device decides which kind a context is, so the setting of the program that saved is
#   not all there is to know. After the refusal the target sequence is empty, also when it held tokens.
# Output (accepted: the logits of the next token equal those of the context that saved, to 1e-3):
#   llama-cpp-python 0.3.36
#   saved with flash off, restored with flash off: accepted
#   saved with flash off, restored with flash on: refused, 0 positions left of 5
#   saved with flash off, restored with flash auto: refused, 0 positions left of 5
#   saved with flash on, restored with flash off: refused, 0 positions left of 5
#   saved with flash on, restored with flash on: accepted
#   saved with flash on, restored with flash auto: accepted
#   file of a context with flash off, loaded with flash on: refused
# Why it matters: a prompt cache on disk that is keyed by model, tokens and cache types serves nothing
#   after the setting changes, or on a machine whose device decides otherwise, and every lookup reads
#   the whole file first. Keep the resolved setting in the key, and expect the target to be emptied.
#
# llama-cpp-python is built from source when no wheel is at hand: several minutes and a C++ compiler.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    'llama-cpp-python==0.3.36' 'gguf==0.19.0' 'numpy==2.4.6'
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import ctypes
from importlib.metadata import version

import gguf
import llama_cpp.llama_cpp as llama
import numpy as np

VOCAB, WIDTH, FEED_FORWARD, HEADS = 64, 32, 64, 2
TOKENS, OTHERS = [1, 2, 3, 4, 5, 6, 7, 8], [11, 12, 13, 14, 15]
SETTINGS = {"off": 0, "on": 1, "auto": -1}  # enum llama_flash_attn_type
BYTES = ctypes.POINTER(ctypes.c_uint8)


def write_model(path):
    """A llama of two layers with random F32 weights and no tokenizer."""
    writer, rng = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_block_count(2)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("no_vocab")
    shapes = {"token_embd": (VOCAB, WIDTH), "output": (VOCAB, WIDTH), "output_norm": (WIDTH,)}
    for i in range(2):
        shapes |= {f"blk.{i}.attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
        shapes |= {f"blk.{i}.ffn_{name}": (FEED_FORWARD, WIDTH) for name in ("gate", "up")}
        shapes |= {f"blk.{i}.ffn_down": (WIDTH, FEED_FORWARD), f"blk.{i}.attn_norm": (WIDTH,)}
        shapes |= {f"blk.{i}.ffn_norm": (WIDTH,)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(0, 0.5, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Context:
    """One sequence, with flash attention or without."""

    def __init__(self, setting):
        params = llama.llama_context_default_params()
        params.n_ctx, params.flash_attn_type = 256, SETTINGS[setting]
        params.n_threads = params.n_threads_batch = 1
        self.handle = llama.llama_init_from_model(model, params)
        self.memory = llama.llama_get_memory(self.handle)

    def decode(self, tokens):
        """Logits of the last of these tokens."""
        array = (ctypes.c_int32 * len(tokens))(*tokens)  # which the batch only points at
        batch = llama.llama_batch_get_one(array, len(tokens))
        assert llama.llama_decode(self.handle, batch) == 0
        return np.ctypeslib.as_array(llama.llama_get_logits_ith(self.handle, -1), shape=(VOCAB,)).copy()

    def save(self):
        state = np.empty(llama.llama_state_seq_get_size(self.handle, 0), dtype=np.uint8)
        n = llama.llama_state_seq_get_data(self.handle, state.ctypes.data_as(BYTES), len(state), 0)
        assert n == len(state)
        return state

    def restore(self, state):
        return llama.llama_state_seq_set_data(self.handle, state.ctypes.data_as(BYTES), len(state), 0) > 0

    def n_positions(self):
        return llama.llama_memory_seq_pos_max(self.memory, 0) + 1


def outcome(source, target):
    """What a context that holds other tokens makes of a state, and whether it goes on as the source does."""
    saving, loading = Context(source), Context(target)
    saving.decode(TOKENS)
    state = saving.save()
    loading.decode(OTHERS)
    held = loading.n_positions()
    if not loading.restore(state):
        return f"refused, {loading.n_positions()} positions left of {held}"
    difference = np.abs(loading.decode([9]) - saving.decode([9])).max()
    return "accepted" if difference < 1e-3 else f"accepted, but logits differ by {difference:.3g}"


def file_outcome(source, target):
    saving, loading = Context(source), Context(target)
    saving.decode(TOKENS)
    tokens, found = (ctypes.c_int32 * len(TOKENS))(*TOKENS), (ctypes.c_int32 * 64)()
    assert llama.llama_state_save_file(saving.handle, b"state.bin", tokens, len(TOKENS))
    n = ctypes.c_size_t()
    return "accepted" if llama.llama_state_load_file(loading.handle, b"state.bin", found, 64, ctypes.byref(n)) else "refused"


silent = llama.llama_log_callback(lambda level, text, data: None)
llama.llama_log_set(silent, None)
write_model("model.gguf")
params = llama.llama_model_default_params()
model = llama.llama_model_load_from_file(b"model.gguf", params)
print("llama-cpp-python", version("llama-cpp-python"))
expected = {
    ("off", "off"): "accepted",
    ("off", "on"): "refused, 0 positions left of 5",
    ("off", "auto"): "refused, 0 positions left of 5",
    ("on", "off"): "refused, 0 positions left of 5",
    ("on", "on"): "accepted",
    ("on", "auto"): "accepted",
}
found = {pair: outcome(*pair) for pair in expected}
for (source, target), text in found.items():
    print(f"saved with flash {source}, restored with flash {target}: {text}")
of_file = file_outcome("off", "on")
print(f"file of a context with flash off, loaded with flash on: {of_file}")
assert found == expected and of_file == "refused", "llama.cpp behaves otherwise now"
PYTHON
