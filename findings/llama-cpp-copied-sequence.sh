#!/usr/bin/env bash
# llama.cpp: a copied sequence is not there yet when it is saved, and what is restored is copied over
#
# Expected: after llama_memory_seq_cp(memory, 0, 1, -1, -1), sequence 1 is sequence 0. Saving it with
#   llama_state_seq_get_data() gives the same text, and restoring either of the two with
#   llama_state_seq_set_data() leaves the other alone. With one unified buffer it is so.
# Observed (llama.cpp as shipped by llama-cpp-python 0.3.36, kv_unified = false, the default): the copy
#   changes the table of positions at once, but the keys and values move only in the next
#   llama_decode(), of any sequence. Until then
#   - a state saved from the target has the source's positions and the bytes the target's buffer
#     held before: zeros, or the text of a sequence that was removed from it long ago.
#   - a state restored into the target is overwritten by the pending copy; a state restored into the
#     source is what the copy then takes.
#   All calls succeed with the expected positions and sizes. Decoding the target itself is right, so a
#   test that continues the copy does not find it.
# Output (which of two texts a sequence turns out to hold, from the logits of its next token):
#   llama-cpp-python 0.3.36
#   one buffer:
#     copy 0 (first) to 1 (empty): state saved from 1 holds first; after a decode, first
#     copy 0 (first) to 1 (held second): state saved from 1 holds first; after a decode, first
#     copy 0 (first) to 1, restore second into 1: 0 holds first, 1 holds second
#     copy 0 (first) to 1, restore second into 0: 0 holds second, 1 holds first
#   separate buffers:
#     copy 0 (first) to 1 (empty): state saved from 1 holds neither; after a decode, first
#     copy 0 (first) to 1 (held second): state saved from 1 holds second; after a decode, first
#     copy 0 (first) to 1, restore second into 1: 0 holds first, 1 holds first
#     copy 0 (first) to 1, restore second into 0: 0 holds second, 1 holds second
# Why it matters: a program that copies a shared prefix to a new sequence, and saves and restores
#   sequences to make room before it decodes, continues one request from another's document, fluently.
#   Save from the source, and restore only after a decode has carried the copy out.
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
FIRST, SECOND = [1, 2, 3, 4, 5, 6], [11, 12, 13, 14, 15, 16]
BYTES = ctypes.POINTER(ctypes.c_uint8)


def write_model(path):
    """A llama of one layer with random F32 weights and no tokenizer."""
    writer, rng = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_block_count(1)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("no_vocab")
    shapes = {"token_embd": (VOCAB, WIDTH), "output": (VOCAB, WIDTH), "output_norm": (WIDTH,)}
    shapes |= {f"blk.0.attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
    shapes |= {f"blk.0.ffn_{name}": (FEED_FORWARD, WIDTH) for name in ("gate", "up")}
    shapes |= {"blk.0.ffn_down": (WIDTH, FEED_FORWARD), "blk.0.attn_norm": (WIDTH,), "blk.0.ffn_norm": (WIDTH,)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(0, 0.5, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Context:
    """Four sequences, each with its own buffer unless `unified`."""

    def __init__(self, unified):
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = 1024, 4, unified
        params.n_threads = params.n_threads_batch = 1
        self.handle = llama.llama_init_from_model(model, params)
        assert self.handle
        self.memory = llama.llama_get_memory(self.handle)

    def decode(self, sequence, tokens, position=0):
        """Appends tokens of one sequence; the logits after the last."""
        batch = llama.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position + i, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, i == len(tokens) - 1
        assert llama.llama_decode(self.handle, batch) == 0
        llama.llama_batch_free(batch)
        return np.ctypeslib.as_array(llama.llama_get_logits_ith(self.handle, -1), (VOCAB,)).copy()

    def copy(self, source, target):
        llama.llama_memory_seq_cp(self.memory, source, target, -1, -1)
        assert llama.llama_memory_seq_pos_max(self.memory, target) == len(FIRST) - 1

    def save(self, sequence):
        data = np.empty(llama.llama_state_seq_get_size(self.handle, sequence), np.uint8)
        size = llama.llama_state_seq_get_data(self.handle, data.ctypes.data_as(BYTES), data.size, sequence)
        assert size == data.size
        return data

    def restore(self, sequence, data):
        assert llama.llama_state_seq_set_data(self.handle, data.ctypes.data_as(BYTES), data.size, sequence) == data.size

    def after(self, sequence):
        """Logits after one more token, which tell what the sequence holds."""
        return self.decode(sequence, [9], len(FIRST))

    def text(self, sequence):
        logits = self.after(sequence)
        close = [name for name, expected in KNOWN.items() if abs(logits - expected).max() < 0.05]
        return close[0] if close else "neither"


def saved(unified, held, *, decode_first):
    """The text of the state saved from sequence 1 after sequence 0 was copied there."""
    context = Context(unified)
    if held:
        context.decode(1, held)
        assert llama.llama_memory_seq_rm(context.memory, 1, -1, -1)
    context.decode(0, FIRST)
    context.copy(0, 1)
    if decode_first:
        context.decode(2, [0])
    context.restore(3, context.save(1))
    text = context.text(3)
    assert context.text(1) == "first"
    return text


def restored(unified, into):
    """The texts of sequences 0 and 1 after a copy from 0 to 1 and a restore into one of them."""
    context = Context(unified)
    context.decode(3, SECOND)
    state = context.save(3)
    context.decode(0, FIRST)
    context.copy(0, 1)
    context.restore(into, state)
    return context.text(0), context.text(1)


print("llama-cpp-python", version("llama-cpp-python"))
quiet = llama.llama_log_callback(lambda *_: None)
llama.llama_log_set(quiet, None)
write_model("model.gguf")
model = llama.llama_model_load_from_file(b"model.gguf", llama.llama_model_default_params())
assert model and not llama.llama_context_default_params().kv_unified
KNOWN = {}
for name, tokens in (("first", FIRST), ("second", SECOND)):
    context = Context(False)
    context.decode(0, tokens)
    KNOWN[name] = context.after(0)
assert abs(KNOWN["first"] - KNOWN["second"]).max() > 1
for label, unified, from_empty, from_used, after_restores in (
    ("one buffer", True, "first", "first", [("first", "second"), ("second", "first")]),
    ("separate buffers", False, "neither", "second", [("first", "first"), ("second", "second")]),
):
    print(f"{label}:")
    for before, held, expected in (("empty", None, from_empty), ("held second", SECOND, from_used)):
        early, late = (saved(unified, held, decode_first=decoded) for decoded in (False, True))
        print(f"  copy 0 (first) to 1 ({before}): state saved from 1 holds {early}; after a decode, {late}")
        assert (early, late) == (expected, "first")
    for into, expected in zip((1, 0), after_restores):
        texts = restored(unified, into)
        print(f"  copy 0 (first) to 1, restore second into {into}: 0 holds {texts[0]}, 1 holds {texts[1]}")
        assert texts == expected
PYTHON
