"""How attention and decode steps are computed: with flash attention or without, and by whose kernels."""

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
    """Of one model. `kernels`: what is compiled; the rest is computed by ggml. `has_tiles`: whether ggml takes many
    rows of attention in tiles, and few of them slowly."""

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
        """`prefers_flash`: for a batch, which gives the memory of cells back; transposed values prevent that. None: in
        float32 and without it, for comparing values with transformers."""
        if prefers_flash is None:
            return cls("f32", flash=False, kernels=exact_kernels(device), has_tiles=False)
        kernels = node_kernels(files, device, cache_type)
        has_kernel = kernels.attention is not None
        flash = prefers_flash or has_kernel or needs_flash(files, n_cells, n_ubatch, device, cache_type)
        return cls(cache_type, flash, kernels, flash and not has_kernel and is_cpu(find_device(device)))

    @property
    def settings(self) -> dict[str, Any]:
        """What was chosen, as plain data; all of it changes values."""
        found: dict[str, Any] = {"cache_type": self.cache_type, "flash_attention": self.flash}
        return {**found, "compiled": self.kernels.description} if self.kernels else found

    @property
    def node_callback(self) -> Any:
        """What a context is given for the kernels."""
        return node_callback(self.kernels)
