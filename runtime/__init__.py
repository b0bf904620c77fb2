"""Turns messages and images into answers: chat template, tokens, llama.cpp's decode loop, sampling.

Importing this package loads no library and reads no file. Each name is imported on first use, because the page reader
process imports the package too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from granite4v.lazy import exports

if TYPE_CHECKING:
    from granite4v.runtime.answer import Answer, Timings, TokenLogprob
    from granite4v.runtime.engine.sampler import Sampling
    from granite4v.runtime.engine.stream import Stream
    from granite4v.runtime.model import Model
    from granite4v.runtime.options import GenerationOptions

__all__ = ["Answer", "GenerationOptions", "Model", "Sampling", "Stream", "Timings", "TokenLogprob"]

__getattr__, __dir__ = exports(
    __name__,
    {
        "answer": ("Answer", "Timings", "TokenLogprob"),
        "engine.sampler": ("Sampling",),
        "engine.stream": ("Stream",),
        "model": ("Model",),
        "options": ("GenerationOptions",),
    },
)
