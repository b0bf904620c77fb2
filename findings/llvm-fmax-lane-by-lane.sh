#!/usr/bin/env bash
# LLVM: the maximum of a vector goes from lane to lane on x86, unless NaNs are ruled out
#
# Expected: llvm.vector.reduce.fmax of 16 floats becomes halvings, four shuffles and four maxima of
#   registers, as the sum of a vector with 'reassoc' does. Its order cannot change the result.
# Observed (LLVM 22.1.0 as in llvmlite 0.50.0, for skylake-avx512, optimization level 3): fifteen
#   scalar maxima, each of which waits for the one before and is followed by a comparison for NaNs.
#   With the flag 'nnan' on the call there are four maxima of registers and no comparison.
# Output:
#   LLVM 22.1.0
#   reduce.fmax:       15 scalar maxima, 0 of registers, 15 comparisons for NaNs
#   reduce.fmax, nnan: 1 scalar maxima, 3 of registers, 0 comparisons for NaNs
# Why it matters: rounding activations to 8 bits and softmax take the maximum of a register again and
#   again; some 60 cycles of waiting instead of 16 were a fifth of a kernel of attention.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'llvmlite==0.50.0'
"$work/venv/bin/python" - <<'PYTHON'
import re

from llvmlite import binding

binding.initialize_all_targets()
binding.initialize_all_asmprinters()
print("LLVM", ".".join(map(str, binding.llvm_version_info)))
target = binding.Target.from_triple("x86_64-unknown-linux-gnu")


def counts(flags):
    module = binding.parse_assembly(f"""
        target triple = "x86_64-unknown-linux-gnu"
        declare float @llvm.vector.reduce.fmax.v16f32(<16 x float>)
        define float @largest(<16 x float> %x) {{
            %y = call {flags} float @llvm.vector.reduce.fmax.v16f32(<16 x float> %x)
            ret float %y
        }}""")
    machine = target.create_target_machine(cpu="skylake-avx512", features="-prefer-256-bit", opt=3)
    options = binding.create_pipeline_tuning_options(speed_level=3)
    passes = binding.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
    text = machine.emit_assembly(module)
    return [len(re.findall(pattern, text)) for pattern in (r"\bvmaxss\b", r"\bvmaxps\b", r"\bvcmpunord\w+\b")]


for name, flags in (("reduce.fmax:", ""), ("reduce.fmax, nnan:", "nnan")):
    scalar, wide, compared = counts(flags)
    print(f"{name:<18} {scalar} scalar maxima, {wide} of registers, {compared} comparisons for NaNs")
    if flags:
        assert scalar <= 1 and wide >= 3 and not compared
    else:
        assert scalar == 15 and not wide and compared == 15
PYTHON
