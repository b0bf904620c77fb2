#!/usr/bin/env bash
# llama.cpp: which sequence ids are in a batch decides how often the whole model is run
#
# Expected: llama_decode() of a batch with one token for each of four sequences is one pass over the
#   model. Sequence ids are labels; any four of them, in any order, cost the same. With one unified
#   buffer it is so.
# Observed (llama.cpp as shipped by llama-cpp-python 0.3.36, kv_unified = false, the default): rows are
#   put into one pass only if each one's id is one more than the id of the row taken before it. Ids
#   0, 1, 2, 3 run the model once; 0, 2, 4, 6 and 3, 2, 1, 0 run it four times. A sequence with two
#   tokens beside sequences with one makes another pass. Results are the same to rounding, every call
#   succeeds, and no warning is logged.
# Output (runs of the model in one llama_decode, counted through cb_eval):
#   llama-cpp-python 0.3.36
#   sequence ids of the rows: one buffer, separate buffers
#   [0, 1, 2, 3]: 1, 1
#   [4, 5, 6, 7]: 1, 1
#   [0, 1, 4, 5]: 1, 2
#   [7, 0, 1, 2]: 1, 2
#   [0, 2, 4, 6]: 1, 4
#   [3, 2, 1, 0]: 1, 4
#   [0, 0, 1, 1]: 1, 1
#   [0, 0, 1, 2]: 1, 2
# Why it matters: batching pays because weights are read once for all rows. In a server whose requests
#   end at different times the ids in use get gaps, and batches of many run as slowly as one by one,
#   with nothing to see but the clock; a benchmark that starts n sequences 0..n-1 together never
#   shows it. Hand out the lowest free id, sort rows by id, and give each sequence as many tokens.
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
import platform
from importlib.metadata import version
from pathlib import Path

import gguf
import llama_cpp.llama_cpp as llama
import numpy as np

VOCAB, WIDTH, FEED_FORWARD, HEADS = 64, 32, 64, 2
suffix = ".dylib" if platform.system() == "Darwin" else ".so"
ggml = ctypes.CDLL(str(Path(llama.__file__).parent / "lib" / f"libggml-base{suffix}"))
ggml.ggml_get_name.restype, ggml.ggml_get_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
n_runs = 0


@llama.ggml_backend_sched_eval_callback
def count(node, ask, _):
    """llama.cpp asks about each node of a graph that it is going to compute; the logits are one node a graph."""
    global n_runs
    n_runs += ask and ggml.ggml_get_name(node) == b"result_output"
    return False


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


def decoded(unified, ids):
    """Runs of the model for one batch with a row for each id, and the rows' logits."""
    global n_runs
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_seq_max, params.kv_unified, params.cb_eval = 2048, 8, unified, count
    params.n_threads = params.n_threads_batch = 1
    context = llama.llama_init_from_model(model, params)
    assert context
    batch = llama.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, sequence in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i] = 5 + i, ids[:i].count(sequence), 1
        batch.seq_id[i][0], batch.logits[i] = sequence, True
    n_runs = 0
    log.clear()
    assert llama.llama_decode(context, batch) == 0
    assert not [text for level, text in log if level in (3, 4)]  # GGML_LOG_LEVEL_WARN and _ERROR
    rows = [np.ctypeslib.as_array(llama.llama_get_logits_ith(context, i), (VOCAB,)).copy() for i in range(len(ids))]
    llama.llama_batch_free(batch)
    llama.llama_free(context)
    return n_runs, np.stack(rows)


print("llama-cpp-python", version("llama-cpp-python"))
log = []
keep = llama.llama_log_callback(lambda level, text, _: log.append((level, text)))
llama.llama_log_set(keep, None)
write_model("model.gguf")
model = llama.llama_model_load_from_file(b"model.gguf", llama.llama_model_default_params())
assert model and not llama.llama_context_default_params().kv_unified
print("sequence ids of the rows: one buffer, separate buffers")
for ids, expected in (
    ([0, 1, 2, 3], 1),
    ([4, 5, 6, 7], 1),
    ([0, 1, 4, 5], 2),
    ([7, 0, 1, 2], 2),
    ([0, 2, 4, 6], 4),
    ([3, 2, 1, 0], 4),
    ([0, 0, 1, 1], 1),
    ([0, 0, 1, 2], 2),
):
    (unified_runs, unified), (separate_runs, separate) = (decoded(kind, ids) for kind in (True, False))
    print(f"{ids}: {unified_runs}, {separate_runs}")
    assert (unified_runs, separate_runs) == (1, expected)
    assert np.allclose(unified, separate, atol=0.05)
PYTHON
