"""From messages and images to answers: chat template, tokens, llama.cpp's decode loop, sampling.

Importing this package loads no library and reads no file, and nothing is imported until a name is used: the process
that reads pages lives in here, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from granite4v.runtime.engine.generate import Answer, Timings
    from granite4v.runtime.engine.sampler import Sampling
    from granite4v.runtime.model import AnswerStream, Model

__all__ = ["Answer", "AnswerStream", "Model", "Sampling", "Timings"]

_HOMES = {
    "Answer": "engine.generate",
    "Timings": "engine.generate",
    "AnswerStream": "model",
    "Model": "model",
    "Sampling": "engine.sampler",
}


def __getattr__(name: str) -> Any:
    """Finds a public name in the module it lives in, on first use (PEP 562)."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'granite4v.runtime' has no attribute {name!r}")
    return getattr(importlib.import_module(f"granite4v.runtime.{_HOMES[name]}"), name)
