"""Which of a text model's weights go to which buffer type, for llama.cpp's `tensor_buft_overrides`.

llama.cpp's own default puts weights into whatever special buffer type the CPU announces. On some machines that
costs speed and doubles memory, on some it crashes. Here every weight type goes where `granite4v.ggml.autotune`
measured its products to be fastest; types that gain nothing stay mapped from the file, which costs no memory of
their own.
"""

from __future__ import annotations

import ctypes
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from granite4v import gguf_keys as keys
from granite4v.ggml import autotune
from granite4v.ggml.backend import Backend
from granite4v.ggml.gguf_file import TensorInfo, n_weights

N_UBATCH = 512  # tokens computed at once; more costs memory (0.1 MB of image rows a token) and gains nothing


def _block_weight(layers: str, parts: str) -> str:
    """A regular expression for the weights of text layers; layer and part are its groups."""
    return keys.pattern_of(f"{keys.TEXT_BLOCK}.weight", i=layers, part=parts).pattern


_BLOCK_WEIGHT = re.compile(_block_weight(r"\d+", r"\w+"))


@dataclass(frozen=True)
class Placement:
    """Buffer types, by name, for the tensors that leave the mapped file: {buffer type: tensor names}."""

    tensors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    buffer_types: Mapping[str, Any] = field(default_factory=dict)

    def overrides(self) -> Any:
        """llama.cpp's `tensor_buft_overrides`, or None when everything stays mapped; the caller keeps it alive."""
        patterns = [(pattern, name) for name, names in self.tensors.items() for pattern in tensor_patterns(names)]
        if not patterns:
            return None
        rows = (_Override * (len(patterns) + 1))()
        for row, (pattern, name) in zip(rows, patterns, strict=False):
            row.pattern, row.buffer_type = pattern.encode(), self.buffer_types[name]
        return rows


class _Override(ctypes.Structure):
    """struct llama_model_tensor_buft_override"""

    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))


def choose_placement(
    tensors: Mapping[str, TensorInfo], backend: Backend, announce: Callable[[], None] | None = None
) -> Placement:
    """Where each weight of a text file goes on the CPU. Measures on the first call on a machine (see `text_kernels`).

    Only block weights leave the mapping: the token embedding is looked up, not multiplied, and llama.cpp decides by
    itself where the output head goes. A buffer type may refuse single shapes (repacking takes rows by the eight).
    """
    weights = [info for info in tensors.values() if _BLOCK_WEIGHT.fullmatch(info.name) and len(info.shape) == 2]
    kernels = autotune.text_kernels(backend, n_weights(weights), announce)
    placed: dict[str, list[str]] = defaultdict(list)
    supported: dict[tuple[str, tuple[int, ...]], bool] = {}
    for info in weights:
        kernel = kernels.get(info.type_name)
        if kernel is None:
            continue
        form = (info.type_name, info.shape)
        if form not in supported:
            n_out, n_in = info.shape
            supported[form] = backend.multiplies(kernel.buffer_type, info.type_name, n_in, n_out)
        if supported[form]:
            placed[kernel.name].append(info.name)
    buffer_types = {kernel.name: kernel.buffer_type for kernel in kernels.values()}
    return Placement({name: tuple(names) for name, names in placed.items()}, buffer_types)


def tensor_patterns(names: tuple[str, ...]) -> list[str]:
    """A few regular expressions that match exactly these block weights.

    llama.cpp compiles every pattern for every tensor, so one pattern a tensor would be slow.
    """
    layers_of: dict[str, list[int]] = defaultdict(list)
    for name in names:
        match = _BLOCK_WEIGHT.fullmatch(name)
        if match is None:
            raise ValueError(f"'{name}' is not a block weight")
        layers_of[match[2]].append(int(match[1]))
    parts_of: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for part, layers in layers_of.items():
        parts_of[tuple(sorted(layers))].append(part)
    return [
        f"^{_block_weight('|'.join(map(str, layers)), '|'.join(sorted(parts)))}$" for layers, parts in parts_of.items()
    ]
