"""Decides which of a text model's weights are copied to which buffer type, and for which batches.

llama.cpp's own default puts weights into whatever special buffer type the CPU announces. On some machines that costs
speed, on some it crashes. Here `granite4v.ggml.autotune` measures what is fastest for each weight type, separately for
the hundreds of rows of a prompt and the few of a decode step; types that gain nothing stay in the mapped file.
`weight_copies` makes the copies.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from granite4v import gguf_keys as keys
from granite4v.ggml import autotune
from granite4v.ggml.backend import Backend, buffer_type_name
from granite4v.ggml.gguf_file import TensorInfo, n_weights
from granite4v.ggml.kernels import PLAIN, Kernel
from granite4v.ggml.types import row_bytes
from granite4v.memory import available_bytes, has_large_pages

N_UBATCH = 512  # tokens computed at once; more costs memory (0.1 MB of image rows per token) and gains nothing
# Bytes that must remain available in addition to the weights: for the KV cache, intermediate results, and other
# programs.
SPARE_BYTES = 1 << 30

_BLOCK_WEIGHT = keys.pattern_of(f"{keys.TEXT_BLOCK}.weight", i=r"\d+", part=r"\w+")


@dataclass(frozen=True)
class Copy:
    """A weight, by name, that is copied to a buffer type: for batches of many rows, of a few, or both. `is_plain`: the
    copy is multiplied like the mapped weight. `widened`: the type of a copy for prompts only; the same weight may have
    another copy listed before it."""

    name: str
    kernel: str
    buffer_type: Any
    many: bool = True
    few: bool = True
    is_plain: bool = False
    widened: str | None = None


@dataclass(frozen=True)
class Placement:
    """The weights that are copied out of the mapped file; all others are read from it."""

    copies: tuple[Copy, ...] = ()

    @property
    def n_copies(self) -> dict[str, int]:
        """Number of weights in each buffer type, by its name."""
        return dict(Counter(copy.kernel for copy in self.copies))

    def arithmetic(self, *, few: bool) -> list[tuple[str, str, bool, bool]]:
        """The part of the placement that changes values: weights that another kernel multiplies, in batches of many
        rows and in those of a few. `few`: whether there are any batches of a few rows."""
        return sorted(
            (copy.name, copy.kernel, copy.many, few and copy.few)
            for copy in self.copies
            if not copy.is_plain and (copy.many or few)
        )


def choose_placement(
    tensors: Mapping[str, TensorInfo],
    backend: Backend,
    announce: Callable[[], None] | None = None,
    *,
    for_many: bool = False,
    compiled: bool = False,
) -> Placement:
    """Decides where each weight of a text file goes on the CPU. Measures on the first call on a machine (see
    `text_kernels`).

    Block weights go to the buffer types that gain speed; a buffer type may refuse single shapes (repacking takes rows
    in eights). Weights that decode steps would read from the mapped file, and the output head, are copied unchanged
    where the system has large pages: with all of them there, decoding is 10% to 14% faster. A copy needs as much memory
    as the weights, while mapped pages can be dropped at any time; so if memory is short fewer weights are copied, or
    none. A small model's weights may also be copied in bfloat16 for prompts only.

    `for_many`: decode steps have many rows as well, so nothing is rearranged for steps of a few. `compiled`: see
    `text_kernels`.
    """
    if not backend.is_cpu or sum(n_weights(tensors.values()).values()) < autotune.SMALL:
        return Placement()
    blocks = [info for info in tensors.values() if _BLOCK_WEIGHT.fullmatch(info.name) and len(info.shape) == 2]
    kernels = autotune.text_kernels(backend, n_weights(blocks), announce, compiled=compiled)
    if for_many:
        kernels = {name: (many, Kernel(PLAIN) if many.widened else many) for name, (many, _) in kernels.items()}
    faster = _faster_copies(blocks, backend, kernels)
    widened = _widened_copies(blocks, backend, kernels)
    head = tensors.get(keys.OUTPUT, tensors.get(keys.TOKEN_EMBD))
    plain = _plain_copies([*blocks, *([head] if head else [])], backend, faster)
    plain = plain if has_large_pages() else ()
    available, single = available_bytes(), (*faster, *(copy for copy in plain if copy.many))
    for copies in ((*faster, *plain, *widened), (*faster, *plain), (*single, *widened), single, faster):
        # mapped pages can be dropped when memory is short; a second copy cannot, so it needs more spare memory
        spare = SPARE_BYTES * (1 if all(copy.many for copy in copies if copy.is_plain) else 2)
        if available is None or bytes_needed(tensors, copies) + spare <= available:
            return Placement(tuple(copies))
    return Placement()


def _faster_copies(
    weights: Sequence[TensorInfo], backend: Backend, kernels: Mapping[str, tuple[Kernel, Kernel]]
) -> tuple[Copy, ...]:
    """The copies in other buffer types. `kernels`: for many rows and for a few, by weight type."""
    supported: dict[tuple[str, tuple[int, ...]], bool] = {}
    copies = []
    for info in weights:
        if info.type_name not in kernels:
            continue
        many, few = kernels[info.type_name]
        kernel = few if few.buffer_type else many
        if not kernel.buffer_type:
            continue
        form = (info.type_name, info.shape)
        if form not in supported:
            n_out, n_in = info.shape
            supported[form] = backend.multiplies(kernel.buffer_type, info.type_name, n_in, n_out)
        if supported[form]:
            copies.append(Copy(info.name, kernel.name, kernel.buffer_type, many=many == kernel, few=few == kernel))
    return tuple(copies)


def _plain_copies(weights: Sequence[TensorInfo], backend: Backend, others: Sequence[Copy]) -> tuple[Copy, ...]:
    """The unchanged copies, for steps of a few rows without another copy, and for all rows of weights without any. Many
    rows read a weight once for all of them, so they gain nothing from large pages."""
    many, few = ({copy.name for copy in others if getattr(copy, rows)} for rows in ("many", "few"))
    name, buffer_type = buffer_type_name(backend.buffer_type), backend.buffer_type
    return tuple(
        Copy(info.name, name, buffer_type, many=info.name not in many, is_plain=True)
        for info in weights
        if info.name not in few
    )


def _widened_copies(
    weights: Sequence[TensorInfo], backend: Backend, kernels: Mapping[str, tuple[Kernel, Kernel]]
) -> tuple[Copy, ...]:
    """The copies of another type, for prompts. `kernels`: for many rows and for a few, by weight type."""
    found = [(info, kernels[info.type_name][0]) for info in weights if info.type_name in kernels]
    return tuple(
        Copy(info.name, kernel.name, backend.buffer_type, few=False, widened=kernel.widened)
        for info, kernel in found
        if kernel.widened
    )


def bytes_needed(tensors: Mapping[str, TensorInfo], copies: Sequence[Copy]) -> int:
    """Bytes of the copies, and of the weights that are read from the mapped file."""
    mapped = tensors.keys() - ({copy.name for copy in copies if copy.many} & {copy.name for copy in copies if copy.few})
    return sum(_copy_bytes(copy, tensors[copy.name]) for copy in copies) + sum(tensors[name].nbytes for name in mapped)


def _copy_bytes(copy: Copy, info: TensorInfo) -> int:
    return info.nbytes if copy.widened is None else row_bytes(copy.widened, math.prod(info.shape))
