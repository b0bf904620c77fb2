#!/usr/bin/env bash
# llama.cpp: a file quantized to Q4_K_M says so in its metadata without holding a Q4_K tensor
#
# Expected: llama_model_quantize() to Q4_K_M stores the large matrices as Q4_K and Q6_K, or fails
#   where a type cannot hold a row. `general.file_type` says what is in the file.
# Observed (llama-cpp-python 0.3.36): a row that is no multiple of the type's block (256 for K
#   quants, 32 for the others) gets another type, tensor by tensor. Rows of 64 or 96 become
#   Q5_0 and Q8_0 and the file has no K tensor at all; rows of 272 become F16 even for a plain Q4_0.
#   The call returns 0, and general.file_type is what was asked for; only the log tells.
# Output:
#   llama-cpp-python 0.3.36, gguf 0.19.0
#   asked for Q4_K_M, rows of 64 and 96: file_type MOSTLY_Q4_K_M, matrices Q5_0, Q8_0
#   asked for Q4_K_M, rows of 256 and 288: file_type MOSTLY_Q4_K_M, matrices Q4_K, Q6_K, Q8_0
#   asked for Q4_0,   rows of 256 and 272: file_type MOSTLY_Q4_0, matrices F16, Q4_0, Q6_K
# Why it matters: size and speed estimated from the type's name are wrong, by a factor of three for F16.
#   Small test models never exercise the K-quant code that they seem to test, and widths such as the
#   4304 of SigLIP's feed-forward layers (16 x 269) stay at 16 bits. Read the tensor types, not the
#   file type.
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
import llama_cpp
import numpy as np


def write_model(path, width, ffn):
    """A random one-layer llama model with a byte-pair vocabulary of 97 tokens."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = ["<s>", "</s>", *map(chr, range(33, 127)), "Ġ"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(tokens) - 2))
    writer.add_token_merges(["a b"])
    shapes = {"token_embd": (len(tokens), width), "output": (len(tokens), width)}
    shapes |= {f"blk.0.attn_{part}": (width, width) for part in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (ffn, width), "blk.0.ffn_up": (ffn, width), "blk.0.ffn_down": (width, ffn)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(np.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(width, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@llama_cpp.llama_log_callback
def silent(level, text, user_data):
    pass


llama_cpp.llama_log_set(silent, None)
print(f"llama-cpp-python {version('llama-cpp-python')}, gguf {version('gguf')}")
for asked, width, ffn, expected in (
    ("Q4_K_M", 64, 96, ["Q5_0", "Q8_0"]),
    ("Q4_K_M", 256, 288, ["Q4_K", "Q6_K", "Q8_0"]),
    ("Q4_0", 256, 272, ["F16", "Q4_0", "Q6_K"]),
):
    write_model("plain.gguf", width, ffn)
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.nthread = 1
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{asked}")
    assert llama_cpp.llama_model_quantize(b"plain.gguf", b"quantized.gguf", ctypes.byref(parameters)) == 0
    reader = gguf.GGUFReader("quantized.gguf")
    stated = gguf.LlamaFileType(reader.get_field("general.file_type").contents()).name
    found = sorted({tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) == 2})
    print(f"asked for {asked + ',':<7} rows of {width} and {ffn}: file_type {stated}, matrices {', '.join(found)}")
    assert stated == f"MOSTLY_{asked}" and found == expected, (stated, found)
PYTHON
