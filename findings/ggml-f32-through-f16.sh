#!/usr/bin/env bash
# ggml: GELU and 2-D convolution of F32 tensors go through 16-bit floats on the CPU
#
# Expected: an operation with F32 inputs and an F32 result computes in F32, with errors near 1e-7.
# Observed (ggml as shipped by llama-cpp-python 0.3.36, CPU backend):
#   - ggml_gelu and ggml_gelu_quick look their result up in a table of 65,536 F16 values: every
#     output is an F16 number, off by up to 2e-3 and 4e-3 on [-6, 6]. ggml_gelu_erf and ggml_silu,
#     called the same way, compute in F32.
#   - ggml_conv_2d rounds both the image patches and the F32 kernel to F16 before the product. The
#     same product as ggml_mul_mat over patches cut out beforehand stays in F32.
# Output:
#   llama-cpp-python 0.3.36
#   ggml_gelu:       largest error 2.0e-03, every result is an F16 number
#   ggml_gelu_quick: largest error 3.8e-03, every result is an F16 number
#   ggml_gelu_erf:   largest error 4.4e-07
#   ggml_silu:       largest error 5.5e-07
#   ggml_conv_2d:    relative error 2.8e-04, 8.2e-08 against operands rounded to F16
#   ggml_mul_mat:    relative error 1.1e-07
# Why it matters: a vision tower ported to ggml with F32 weights does not agree with its PyTorch
#   original to better than about 4e-4, which looks like a bug in the port and hides real ones. Write
#   GELU from elementary operations and the patch embedding as a matrix product to compare at 1e-6.
#
# llama-cpp-python is built from source when no wheel is at hand: several minutes and a C++ compiler.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'llama-cpp-python==0.3.36' 'numpy==2.4.6'
"$work/venv/bin/python" - <<'PYTHON'
import ctypes
import math
import platform
from ctypes import CDLL, POINTER, Structure, c_bool, c_float, c_int, c_int64, c_size_t, c_void_p
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np

libraries = Path(find_spec("llama_cpp").origin).parent / "lib"
suffix = ".dylib" if platform.system() == "Darwin" else ".so"
base = CDLL(str(libraries / f"libggml-base{suffix}"))
cpu = CDLL(str(libraries / f"libggml-cpu{suffix}"))


class InitParams(Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


def declared(library, name, result, *arguments):
    function = getattr(library, name)
    function.restype, function.argtypes = result, arguments
    return function


init = declared(base, "ggml_init", c_void_p, InitParams)
free = declared(base, "ggml_free", None, c_void_p)
new_tensor = declared(base, "ggml_new_tensor_4d", c_void_p, c_void_p, c_int, *[c_int64] * 4)
data_of = declared(base, "ggml_get_data", c_void_p, c_void_p)
new_graph = declared(base, "ggml_new_graph", c_void_p, c_void_p)
expand = declared(base, "ggml_build_forward_expand", None, c_void_p, c_void_p)
compute = declared(cpu, "ggml_graph_compute_with_ctx", c_int, c_void_p, c_void_p, c_int)
F32 = 0


def run(operation, shape, *arrays):
    """Result of one ggml operation on F32 arrays, on one CPU thread."""
    context = init(InitParams(16 << 20, None, False))
    tensors = []
    for array in arrays:
        extents = [*array.shape[::-1], 1, 1, 1][:4]
        tensors.append(new_tensor(context, F32, *extents))
        array = np.ascontiguousarray(array, dtype=np.float32)
        ctypes.memmove(data_of(tensors[-1]), array.ctypes.data, array.nbytes)
    result = operation(context, *tensors)
    graph = new_graph(context)
    expand(graph, result)
    assert compute(context, graph, 1) == 0
    values = np.ctypeslib.as_array(ctypes.cast(data_of(result), POINTER(c_float)), shape).copy()
    free(context)
    return values


def to_f16(values):
    return values.astype(np.float16).astype(np.float64)


print("llama-cpp-python", version("llama-cpp-python"))
x = np.linspace(-6, 6, 4001, dtype=np.float32)
wide = x.astype(np.float64)
exact = {
    "ggml_gelu": 0.5 * wide * (1 + np.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))),
    "ggml_gelu_quick": wide / (1 + np.exp(-1.702 * wide)),
    "ggml_gelu_erf": 0.5 * wide * (1 + np.vectorize(math.erf)(wide / math.sqrt(2))),
    "ggml_silu": wide / (1 + np.exp(-wide)),
}
for name, reference in exact.items():
    result = run(declared(base, name, c_void_p, c_void_p, c_void_p), x.shape, x)
    error = np.abs(result - reference).max()
    is_f16 = np.array_equal(result, to_f16(result))
    print(f"{name + ':':<16} largest error {error:.1e}" + (", every result is an F16 number" if is_f16 else ""))
    if name in ("ggml_gelu", "ggml_gelu_quick"):
        assert is_f16 and error > 1e-3
    else:
        assert not is_f16 and error < 2e-6

random = np.random.default_rng(0)
image = random.standard_normal((1, 3, 28, 28)).astype(np.float32)
kernel = random.standard_normal((8, 3, 14, 14)).astype(np.float32)
patches = image.reshape(3, 2, 14, 2, 14).transpose(1, 3, 0, 2, 4).reshape(4, -1)
rows = kernel.reshape(8, -1)


def relative(result, reference):
    return np.linalg.norm(result - reference) / np.linalg.norm(reference)


reference = rows.astype(np.float64) @ patches.astype(np.float64).T
rounded = to_f16(rows) @ to_f16(patches).T
conv_2d = declared(base, "ggml_conv_2d", c_void_p, c_void_p, c_void_p, c_void_p, *[c_int] * 6)
convolved = run(lambda c, a, b: conv_2d(c, a, b, 14, 14, 0, 0, 1, 1), (8, 4), kernel, image)
error, to_rounded = relative(convolved, reference), relative(convolved, rounded)
print(f"ggml_conv_2d:    relative error {error:.1e}, {to_rounded:.1e} against operands rounded to F16")
assert error > 1e-4 and to_rounded < 1e-6
product = run(declared(base, "ggml_mul_mat", c_void_p, c_void_p, c_void_p, c_void_p), (4, 8), rows, patches).T
error = relative(product, reference)
print(f"ggml_mul_mat:    relative error {error:.1e}")
assert error < 1e-6
PYTHON
