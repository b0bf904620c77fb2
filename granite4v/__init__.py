"""Document-reading vision-language models on ordinary machines.

    import granite4v

    with granite4v.load("out/") as model:
        answer = model.generate("<tables_json>", images=["page.png"])
        print(answer.text)

Nothing is imported until a name is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from granite4v.clip_projector import ImageFeatures, load_image
    from granite4v.errors import (
        CheckpointError,
        ContextOverflowError,
        DeviceError,
        Granite4vError,
        ImageError,
        ImageWarning,
        ModelFileError,
        OutputError,
        PromptError,
    )
    from granite4v.runtime import Answer, AnswerStream, Model, Sampling, Timings

    __version__: str
    load = Model.load

__all__ = [
    "Answer",
    "AnswerStream",
    "CheckpointError",
    "ContextOverflowError",
    "DeviceError",
    "Granite4vError",
    "ImageError",
    "ImageFeatures",
    "ImageWarning",
    "Model",
    "ModelFileError",
    "OutputError",
    "PromptError",
    "Sampling",
    "Timings",
    "__version__",
    "load",
    "load_image",
]

_RUNTIME = ("Answer", "AnswerStream", "Model", "Sampling", "Timings")
_PICTURES = ("ImageFeatures", "load_image")


def __getattr__(name: str) -> Any:
    """Finds a public name in the room it lives in, on first use (PEP 562)."""
    import importlib

    if name == "load":
        return importlib.import_module("granite4v.runtime").Model.load
    if name == "__version__":
        from importlib.metadata import version

        return version("granite4v")
    if name not in __all__:
        raise AttributeError(f"module 'granite4v' has no attribute {name!r}")
    room = "runtime" if name in _RUNTIME else "clip_projector" if name in _PICTURES else "errors"
    return getattr(importlib.import_module(f"granite4v.{room}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
