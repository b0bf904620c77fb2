"""Chooses how attention and decode steps are computed: with flash attention or without, and by which kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from granite4v.choices import CacheType
from granite4v.ggml.backend import find_device, is_cpu
from granite4v.ggml.compiled.nodes import NodeKernels
from granite4v.runtime.engine.parallel import exact_kernels, needs_flash, node_kernels
from granite4v.runtime.llama.context import node_callback
from granite4v.runtime.llama.files import ModelFiles


@dataclass(frozen=True)
class Attention:
    """How one model's attention is computed. `kernels`: the compiled kernels; ggml computes the rest. `has_tiles`:
    whether ggml computes many rows of attention in tiles, and few rows slowly."""

    cache_type: str
    flash: bool
    kernels: NodeKernels
    has_tiles: bool

    @classmethod
    def chosen(
        cls,
        files: ModelFiles,
        device: str,
        cache_type: CacheType,
        n_cells: int,
        n_ubatch: int,
        prefers_flash: bool | None,
    ) -> Attention:
        """Chooses for a model. `prefers_flash`: set for a batch, where the memory of empty cells is given back, which
        the transposed values of attention without flash prevent. None: float32 without flash attention, for comparing
        values with transformers."""
        if prefers_flash is None:
            return cls("f32", flash=False, kernels=exact_kernels(device), has_tiles=False)
        kernels = node_kernels(files, device, cache_type)
        has_kernel = kernels.attention is not None
        flash = prefers_flash or has_kernel or needs_flash(files, n_cells, n_ubatch, device, cache_type)
        return cls(cache_type, flash, kernels, flash and not has_kernel and is_cpu(find_device(device)))

    @property
    def settings(self) -> dict[str, Any]:
        """The choice as plain data; each entry changes values."""
        found: dict[str, Any] = {"cache_type": self.cache_type, "flash_attention": self.flash}
        return {**found, "compiled": self.kernels.description} if self.kernels else found

    @property
    def node_callback(self) -> Any:
        """The context's node callback for the compiled kernels."""
        return node_callback(self.kernels)
