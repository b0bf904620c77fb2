"""ggml's tensor types by name, with the sizes of their blocks."""

from __future__ import annotations

from typing import NamedTuple

from granite4v.ggml.library import lib


class TensorType(NamedTuple):
    """One tensor type: its number in files, elements per block, and bytes per block."""

    id: int
    block: int
    nbytes: int


# enum ggml_type, include/ggml.h of ggml 0.25.3; a test compares this table with the library.
TYPES: dict[str, TensorType] = {
    "F32": TensorType(0, 1, 4),
    "F16": TensorType(1, 1, 2),
    "Q4_0": TensorType(2, 32, 18),
    "Q4_1": TensorType(3, 32, 20),
    "Q5_0": TensorType(6, 32, 22),
    "Q5_1": TensorType(7, 32, 24),
    "Q8_0": TensorType(8, 32, 34),
    "Q8_1": TensorType(9, 32, 36),
    "Q2_K": TensorType(10, 256, 84),
    "Q3_K": TensorType(11, 256, 110),
    "Q4_K": TensorType(12, 256, 144),
    "Q5_K": TensorType(13, 256, 176),
    "Q6_K": TensorType(14, 256, 210),
    "Q8_K": TensorType(15, 256, 292),
    "IQ2_XXS": TensorType(16, 256, 66),
    "IQ2_XS": TensorType(17, 256, 74),
    "IQ3_XXS": TensorType(18, 256, 98),
    "IQ1_S": TensorType(19, 256, 50),
    "IQ4_NL": TensorType(20, 32, 18),
    "IQ3_S": TensorType(21, 256, 110),
    "IQ2_S": TensorType(22, 256, 82),
    "IQ4_XS": TensorType(23, 256, 136),
    "I8": TensorType(24, 1, 1),
    "I16": TensorType(25, 1, 2),
    "I32": TensorType(26, 1, 4),
    "I64": TensorType(27, 1, 8),
    "F64": TensorType(28, 1, 8),
    "IQ1_M": TensorType(29, 256, 56),
    "BF16": TensorType(30, 1, 2),
    "TQ1_0": TensorType(34, 256, 54),
    "TQ2_0": TensorType(35, 256, 66),
    "MXFP4": TensorType(39, 32, 17),
    "NVFP4": TensorType(40, 64, 36),
    "Q1_0": TensorType(41, 128, 18),
    "Q2_0": TensorType(42, 64, 18),
}
TYPE_IDS: dict[str, int] = {name: kind.id for name, kind in TYPES.items()}
TYPE_NAMES: dict[int, str] = {kind.id: name for name, kind in TYPES.items()}
# Integers, doubles, and the formats that ggml quantizes activations to: no weight matrix has one of these types.
NO_WEIGHTS = frozenset({"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"})


def type_name(type_id: int) -> str:
    """Returns a type's name, 'Q4_K' for 12. Raises KeyError for a number that this ggml does not use."""
    return TYPE_NAMES[type_id]


def block_size(name: str) -> int:
    """Returns the number of elements per block of a type; a row's length must be a multiple of it."""
    return TYPES[name].block


def row_bytes(name: str, n_elements: int) -> int:
    """Returns the bytes of a row of `n_elements`. Raises ValueError unless these fill whole blocks of the type."""
    if n_elements % block_size(name):
        raise ValueError(f"a row of {n_elements} elements is not a multiple of {name}'s block of {block_size(name)}")
    return int(lib().ggml_row_size(TYPE_IDS[name], n_elements))
