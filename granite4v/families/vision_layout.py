"""How the tensors of a vision file are stored: which of them are matrices, and which widths are filled up with zeros.

For the converter, which writes files, and for the encoder, which can quantize a file's matrices in memory. Shapes are
NumPy's order.
"""

from __future__ import annotations

from granite4v import gguf_keys as keys
from granite4v.ggml.types import block_size

Shape = tuple[int, ...]

BLOCK = 32  # elements in the smallest quantized block; a width that is a multiple never falls back to F16


def tensor_kind(name: str, shape: Shape) -> str:
    """'patch', 'vector' (norms, positions and queries too: they are only added), or 'matrix'."""
    if name == keys.PATCH_EMBD_WEIGHT:
        return "patch"
    return "vector" if len(shape) < 2 or not name.endswith(".weight") or name == keys.POSITION_EMBD else "matrix"


def padded_width(width: int, block: int) -> int:
    """The next multiple of a block."""
    return -(-width // block) * block


def ffn_block(type_name: str) -> int:
    """Feed-forward widths become a multiple of this, where matrices get this type."""
    return max(BLOCK, block_size(type_name))


def ffn_padded(name: str, shape: Shape, block: int) -> Shape:
    """The shape with a feed-forward width that is a multiple of `block`.

    The first matrix and its bias get rows of zeros, and act(0) = 0 meets the second one's columns of zeros, so the
    result is exactly the same.
    """
    if name.startswith(keys.CROSS_PREFIX):  # a decoder's layer: its gate is not padded
        return shape
    part, _, suffix = name.rpartition(".")
    if part.endswith(".ffn_up"):
        return (padded_width(shape[0], block), *shape[1:])
    if part.endswith(".ffn_down") and suffix == "weight":
        return (*shape[:-1], padded_width(shape[-1], block))
    return shape


def row_padded(shape: Shape, type_name: str) -> Shape:
    """The shape in which a tensor is stored in this type: in K-quants, rows are filled up with zeros to whole blocks.

    The tower's width, 1152 in so400m, is no multiple of 256. Our runtime multiplies such rows with activations that it
    fills up alike; llama.cpp's libmtmd takes rows of the model's width only.
    """
    block = block_size(type_name)
    return (*shape[:-1], padded_width(shape[-1], block)) if block > BLOCK else shape
