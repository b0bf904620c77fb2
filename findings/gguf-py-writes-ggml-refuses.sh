#!/usr/bin/env bash
# gguf-py and ggml, from one repository, disagree about which metadata can be in a GGUF file
#
# Expected: what the `gguf` package writes, ggml reads. The GGUF specification allows arrays of
#   arrays and empty strings and arrays, and the two implementations are maintained together.
# Observed (gguf 0.19.0, ggml as shipped by llama-cpp-python 0.3.36):
#   - GGUFWriter.add_array() writes a list of lists as a nested array, as the specification has it.
#     gguf's own reader takes it, but contents() returns one flat list. ggml refuses the whole file.
#   - an empty string or an empty list is dropped: the key is not in the file, though 0 and False
#     under the same call sequence are. "Empty" and "absent" cannot be told apart after writing.
# Output:
#   gguf 0.19.0, llama-cpp-python 0.3.36
#   [[384, 768], [768, 384]]: gguf reads [384, 768, 768, 384], ggml refuses the file
#   [384, 768, 768, 384]: gguf reads [384, 768, 768, 384], ggml opens the file
#   of "", [], 0, False written: 0, False are in the file
# Why it matters: image grid pinpoints and layer maps are lists of pairs; a converter that is tested
#   by reading its files back with the same package passes, and no llama.cpp program opens them. An
#   empty chat template or an empty list of special layers, meant as "none", turns into "use the
#   default". Flatten pairs, and write a count or a flag beside lists that may be empty.
#
# llama-cpp-python is built from source when no wheel is at hand: several minutes and a C++ compiler.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    'gguf==0.19.0' 'llama-cpp-python==0.3.36' 'numpy==2.4.6'
cd "$work"
"$work/venv/bin/python" - 2>ggml.log <<'PYTHON'
import platform
from ctypes import CDLL, Structure, c_bool, c_char_p, c_void_p
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import gguf

suffix = ".dylib" if platform.system() == "Darwin" else ".so"
ggml = CDLL(str(Path(find_spec("llama_cpp").origin).parent / "lib" / f"libggml-base{suffix}"))


class InitParams(Structure):
    _fields_ = [("no_alloc", c_bool), ("ctx", c_void_p)]


ggml.gguf_init_from_file.restype, ggml.gguf_init_from_file.argtypes = c_void_p, [c_char_p, InitParams]
ggml.gguf_free.restype, ggml.gguf_free.argtypes = None, [c_void_p]


def write(path, fill):
    writer = gguf.GGUFWriter(path, "example")
    fill(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf.GGUFReader(path)


def ggml_opens(path):
    handle = ggml.gguf_init_from_file(path.encode(), InitParams(True, None))
    if handle:
        ggml.gguf_free(handle)
    return bool(handle)


print(f"gguf {version('gguf')}, llama-cpp-python {version('llama-cpp-python')}")
nested, flat = [[384, 768], [768, 384]], [384, 768, 768, 384]
for pinpoints, opens in ((nested, False), (flat, True)):
    field = write("pinpoints.gguf", lambda writer, value=pinpoints: writer.add_array("pinpoints", value)).fields["pinpoints"]
    assert field.contents() == flat
    depth = field.types.count(gguf.GGUFValueType.ARRAY)
    assert depth == (2 if pinpoints is nested else 1)
    assert ggml_opens("pinpoints.gguf") is opens
    print(f"{pinpoints}: gguf reads {field.contents()}, ggml {'opens' if opens else 'refuses'} the file")


def falsy(writer):
    writer.add_string("a string", "")
    writer.add_array("a list", [])
    writer.add_uint32("a number", 0)
    writer.add_bool("a flag", False)


kept = [name for name in write("falsy.gguf", falsy).fields if name.startswith("a ")]
assert kept == ["a number", "a flag"], kept
assert ggml_opens("falsy.gguf")
print('of "", [], 0, False written: 0, False are in the file')
PYTHON
grep -q "key 'pinpoints' has invalid GGUF type" ggml.log
