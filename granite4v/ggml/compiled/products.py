"""The weight types with compiled products, for CPUs with AVX-512 VNNI."""

from __future__ import annotations

from granite4v.ggml.compiled import columns, float_products
from granite4v.ggml.compiled.writer import llvm
from granite4v.ggml.cpu_features import cpu_features

QUANTIZED = columns.KINDS
KINDS = (*QUANTIZED, float_products.KIND)
MOST_FLOAT_ROWS = float_products.MOST_ROWS  # activation rows with F16 weights; with quantized ones there is no limit


def is_available() -> bool:
    """Whether this CPU has the instructions: AVX-512 and its VNNI."""
    return {"avx512", "avx512_vnni"} <= {*cpu_features()}


def multiplies(kind: str, n_rows: int = 1) -> bool:
    """Whether weights of a type have a compiled product with `n_rows` activation rows, as far as that is known before
    anything is compiled."""
    fits = kind in QUANTIZED or (kind == float_products.KIND and n_rows <= MOST_FLOAT_ROWS)
    return fits and is_available() and llvm() is not None


def step(kind: str) -> int:
    """Rows of weights must have a multiple of this length."""
    return columns.step(kind) if kind in QUANTIZED else float_products.STEP
