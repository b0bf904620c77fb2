#!/usr/bin/env bash
# safetensors: the NumPy writer stores a transposed or strided array with its elements out of order
#
# Expected: saving an array and loading it gives an equal array, however the array lies in memory.
#   The PyTorch writer of the same package refuses tensors that are not contiguous.
# Observed (safetensors 0.8.0, NumPy 2.4.6): safetensors.numpy.save() and save_file() write the
#   array's memory from its start as if it were C-contiguous, under the shape of the view. A
#   transpose, a Fortran-ordered array and a slice with a step come back with the right shape and
#   type and the elements in the wrong places. No error, no warning.
# Output:
#   safetensors 0.8.0, NumPy 2.4.6
#   contiguous: equal
#   transpose:  [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]] read back as [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
#   Fortran:    [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]] read back as [[0.0, 3.0, 1.0], [4.0, 2.0, 5.0]]
#   step:       [[0.0, 2.0], [3.0, 5.0]] read back as [[0.0, 1.0], [2.0, 3.0]]
# Why it matters: converters transpose weights (Conv1D to Linear, experts from (in, out) to (out, in))
#   right before saving. The file has every name, shape and type that is expected and loads anywhere;
#   only the model is wrong. Pass arrays through np.ascontiguousarray() first.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'safetensors==0.8.0' 'numpy==2.4.6'
"$work/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import numpy as np
from safetensors.numpy import load, save

print(f"safetensors {version('safetensors')}, NumPy {np.__version__}")
array = np.arange(6, dtype=np.float32).reshape(2, 3)
assert np.array_equal(load(save({"a": array}))["a"], array)
print("contiguous: equal")
for label, view in (
    ("transpose: ", array.T),
    ("Fortran:   ", np.asfortranarray(array)),
    ("step:      ", array[:, ::2]),
):
    back = load(save({"a": view}))["a"]
    assert back.shape == view.shape and back.dtype == view.dtype
    assert not np.array_equal(back, view)
    in_memory = view.ravel(order="K") if label != "step:      " else array.ravel()[: view.size]
    assert np.array_equal(back.ravel(), in_memory)
    print(f"{label} {view.tolist()} read back as {back.tolist()}")
    assert np.array_equal(load(save({"a": np.ascontiguousarray(view)}))["a"], view)
PYTHON
