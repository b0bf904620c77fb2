"""Decides how the tensors of a vision file are stored: which are matrices, and which widths are padded with zeros.

Used by the converter, which writes files, and by the encoder, which can quantize a file's matrices in memory. Shapes
are in NumPy's order.
"""

from __future__ import annotations

from granite4v import gguf_keys as keys
from granite4v.ggml.types import block_size

Shape = tuple[int, ...]

BLOCK = 32  # elements of the smallest quantized block; a width that is a multiple of it never falls back to F16


def tensor_kind(name: str, shape: Shape) -> str:
    """Returns 'patch', 'vector' or 'matrix'. Vectors include norms, positions and queries, which are never multiplied
    as matrices."""
    if name == keys.PATCH_EMBD_WEIGHT:
        return "patch"
    return "vector" if len(shape) < 2 or not name.endswith(".weight") or name == keys.POSITION_EMBD else "matrix"


def padded_width(width: int, block: int) -> int:
    """Rounds a width up to a multiple of the block size."""
    return -(-width // block) * block


def ffn_block(type_name: str) -> int:
    """The multiple to which feed-forward widths are padded if matrices get this type."""
    return max(BLOCK, block_size(type_name))


def ffn_padded(name: str, shape: Shape, block: int) -> Shape:
    """Pads the feed-forward width of a shape to a multiple of `block`; returns other shapes unchanged.

    The first matrix and its bias get rows of zeros. Since act(0) = 0, and the second matrix gets columns of zeros, the
    result is exactly the same.
    """
    if name.startswith(keys.CROSS_PREFIX):  # a decoder layer, whose gate matrix would not be padded
        return shape
    part, _, suffix = name.rpartition(".")
    if part.endswith(".ffn_up"):
        return (padded_width(shape[0], block), *shape[1:])
    if part.endswith(".ffn_down") and suffix == "weight":
        return (*shape[:-1], padded_width(shape[-1], block))
    return shape


def row_padded(shape: Shape, type_name: str) -> Shape:
    """The stored shape of a tensor of this type: for K-quants, rows are padded with zeros to whole blocks.

    The tower's width, 1152 in so400m, is no multiple of 256. Our runtime pads the activations in the same way;
    llama.cpp's libmtmd accepts only rows of the model's width.
    """
    block = block_size(type_name)
    return (*shape[:-1], padded_width(shape[-1], block)) if block > BLOCK else shape
