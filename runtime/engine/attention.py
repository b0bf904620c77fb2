"""How attention is computed: with flash attention or without, and by whose kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from granite4v.choices import CacheType
from granite4v.ggml import few_rows_attention
from granite4v.ggml.backend import find_device, is_cpu
from granite4v.runtime.engine.parallel import attention_kernel, needs_flash
from granite4v.runtime.llama.context import attention_callback
from granite4v.runtime.llama.files import ModelFiles


@dataclass(frozen=True)
class Attention:
    """Of one model. `kernel`: the numbers of a head and the heads that share keys, where flash attention of a few rows
    is compiled for them; None: ggml computes it. `has_tiles`: whether ggml takes many rows of it in tiles."""

    cache_type: str
    flash: bool
    kernel: tuple[int, int] | None
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
        float32, without it."""
        if prefers_flash is None:
            return cls("f32", flash=False, kernel=None, has_tiles=False)
        flash = prefers_flash or needs_flash(files, n_cells, n_ubatch, device, cache_type)
        kernel = attention_kernel(files, device, cache_type) if flash else None
        return cls(cache_type, flash, kernel, flash and is_cpu(find_device(device)))

    @property
    def settings(self) -> dict[str, Any]:
        """What was chosen, as plain data; all of it changes values."""
        found: dict[str, Any] = {"cache_type": self.cache_type, "flash_attention": self.flash}
        return found if self.kernel is None else {**found, "attention_kernel": few_rows_attention.version()}

    @property
    def node_callback(self) -> Any:
        """What a context is given for the kernel."""
        return None if self.kernel is None else attention_callback(*self.kernel)
