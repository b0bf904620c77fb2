#!/usr/bin/env bash
# llvmlite: a function's alignment of the stack is left out where it is the only attribute
#
# Expected: `function.attributes.alignstack = 64`, a documented property, is written into the module.
# Observed (llvmlite 0.50.0): it is written only if the set of attributes holds another one by name,
#   'nounwind' for example; alone it is dropped without a word. What is compiled then has the stack's
#   usual 16 bytes of alignment.
# Output:
#   llvmlite 0.50.0
#   alignstack:           define void @"f"()
#   alignstack, nounwind: define void @"f"() nounwind alignstack(64)
# Why it matters: LLVM spills 64-byte registers into that stack, where every one that crosses a line of
#   the cache is read at half the speed; whether it does changes with the depth of calls.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'llvmlite==0.50.0'
"$work/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

from llvmlite import ir

print("llvmlite", version("llvmlite"))
for others in ((), ("nounwind",)):
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), ()), "f")
    for other in others:
        function.attributes.add(other)
    function.attributes.alignstack = 64
    ir.IRBuilder(function.append_basic_block()).ret_void()
    line = next(line for line in str(module).splitlines() if line.startswith("define")).strip()
    print(f"{', '.join(['alignstack', *others]) + ':':<21} {line}")
    assert ("alignstack(64)" in line) == bool(others)
PYTHON
