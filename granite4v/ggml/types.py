"""ggml's tensor types by name, and the sizes of their blocks."""

from __future__ import annotations

from granite4v.ggml.library import lib

# enum ggml_type, include/ggml.h; a test compares the names with the library's.
TYPE_IDS: dict[str, int] = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 6,
    "Q5_1": 7,
    "Q8_0": 8,
    "Q2_K": 10,
    "Q3_K": 11,
    "Q4_K": 12,
    "Q5_K": 13,
    "Q6_K": 14,
    "IQ4_NL": 20,
    "IQ4_XS": 23,
    "I8": 24,
    "I16": 25,
    "I32": 26,
    "I64": 27,
    "F64": 28,
    "BF16": 30,
}


def type_name(type_id: int) -> str:
    """'Q4_K' for 12; types that we never write get ggml's own spelling in capitals."""
    for name, known in TYPE_IDS.items():
        if known == type_id:
            return name
    return str(lib().ggml_type_name(type_id).decode()).upper()


def block_size(name: str) -> int:
    """Elements in one block of the type; a row must be a multiple of it."""
    return int(lib().ggml_blck_size(TYPE_IDS[name]))


def row_bytes(name: str, n_elements: int) -> int:
    """Bytes of a row of `n_elements`; ValueError when they are not whole blocks."""
    if n_elements % block_size(name):
        raise ValueError(f"a row of {n_elements} elements is not a multiple of {name}'s block of {block_size(name)}")
    return int(lib().ggml_row_size(TYPE_IDS[name], n_elements))
