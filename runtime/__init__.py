"""From messages and images to answers: chat template, tokens, llama.cpp's decode loop, sampling.

Importing this package loads no library and reads no file, and nothing is imported until a name is used: the process
that reads pages lives in here, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from granite4v.runtime.answer import Answer, Timings
    from granite4v.runtime.engine.sampler import Sampling
    from granite4v.runtime.engine.stream import Stream
    from granite4v.runtime.model import Model
    from granite4v.runtime.options import GenerationOptions

__all__ = ["Answer", "GenerationOptions", "Model", "Sampling", "Stream", "Timings"]

_HOMES = {
    "Answer": "answer",
    "GenerationOptions": "options",
    "Model": "model",
    "Sampling": "engine.sampler",
    "Stream": "engine.stream",
    "Timings": "answer",
}


def __getattr__(name: str) -> Any:
    """Finds a public name in the module it lives in, on first use (PEP 562)."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'granite4v.runtime' has no attribute {name!r}")
    return getattr(importlib.import_module(f"granite4v.runtime.{_HOMES[name]}"), name)
