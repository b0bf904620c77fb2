"""Document-understanding vision-language models on laptops and CPU-only servers.

    import granite4v

    with granite4v.load("out/") as model:
        answer = model.generate("<tables_json>", images=["page.png"])
        print(answer.text)

Each public name is imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from granite4v.lazy import exports

if TYPE_CHECKING:
    from granite4v.clip_projector import Image, ImageFeatures, Video, load_image, load_video
    from granite4v.default_model import DocumentReader, extract, load
    from granite4v.errors import (
        AnswerError,
        ArgumentError,
        CheckpointError,
        ConstraintError,
        ContextOverflowError,
        DeviceError,
        DocumentError,
        Granite4vError,
        HubError,
        ImageError,
        ImageWarning,
        ModelFileError,
        OutputError,
        PageStoreWarning,
        PasswordError,
        PromptError,
        SchemaError,
        SpeedWarning,
    )
    from granite4v.runtime import Answer, GenerationOptions, Model, Sampling, Stream, Timings, TokenLogprob
    from granite4v.runtime.confidence import Confidence, confidence
    from granite4v.runtime.engine.page_store import PageStore
    from granite4v.runtime.extract import Record
    from granite4v.runtime.extract.data_frame import read_results
    from granite4v.runtime.extract.export import export_results
    from granite4v.runtime.formats.task_grammar import grammar_for

    __version__: str

__all__ = [
    "Answer",
    "AnswerError",
    "ArgumentError",
    "CheckpointError",
    "Confidence",
    "ConstraintError",
    "ContextOverflowError",
    "DeviceError",
    "DocumentError",
    "DocumentReader",
    "GenerationOptions",
    "Granite4vError",
    "HubError",
    "Image",
    "ImageError",
    "ImageFeatures",
    "ImageWarning",
    "Model",
    "ModelFileError",
    "OutputError",
    "PageStore",
    "PageStoreWarning",
    "PasswordError",
    "PromptError",
    "Record",
    "Sampling",
    "SchemaError",
    "SpeedWarning",
    "Stream",
    "Timings",
    "TokenLogprob",
    "Video",
    "__version__",
    "confidence",
    "export_results",
    "extract",
    "grammar_for",
    "load",
    "load_image",
    "load_video",
    "read_results",
]

_find, _ = exports(
    __name__,
    {
        "clip_projector": ("Image", "ImageFeatures", "Video", "load_image", "load_video"),
        "default_model": ("DocumentReader", "extract", "load"),
        "errors": (
            "AnswerError",
            "ArgumentError",
            "CheckpointError",
            "ConstraintError",
            "ContextOverflowError",
            "DeviceError",
            "DocumentError",
            "Granite4vError",
            "HubError",
            "ImageError",
            "ImageWarning",
            "ModelFileError",
            "OutputError",
            "PageStoreWarning",
            "PasswordError",
            "PromptError",
            "SchemaError",
            "SpeedWarning",
        ),
        "runtime": ("Answer", "GenerationOptions", "Model", "Sampling", "Stream", "Timings", "TokenLogprob"),
        "runtime.confidence": ("Confidence", "confidence"),
        "runtime.engine.page_store": ("PageStore",),
        "runtime.extract": ("Record",),
        "runtime.extract.data_frame": ("read_results",),
        "runtime.extract.export": ("export_results",),
        "runtime.formats.task_grammar": ("grammar_for",),
    },
)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("granite4v")
    return _find(name)


def __dir__() -> list[str]:
    return sorted(__all__)
