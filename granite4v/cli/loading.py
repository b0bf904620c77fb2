"""Groups of options that several commands share, and loading of the model.

typer does not support groups of options: a command declares a parameter of one of the classes here, and `grouped` turns
each field of the class into an option.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from granite4v.cli import options
from granite4v.cli.progress import Progress

if TYPE_CHECKING:
    from granite4v.runtime import Model


@dataclass(frozen=True)
class ModelOptions:
    """Which model to load, and how to run it."""

    model: options.ModelOption = None
    mmproj: options.MmprojOption = None
    ctx_size: options.ContextOption = None
    threads: options.ThreadsOption = None
    device: options.DeviceOption = "auto"
    vision_compute: options.VisionComputeOption = "file"
    cache_type: options.CacheTypeOption = None

    def find(self, *, quiet: bool = False) -> str | Path:
        """Finds the path of the model; see `options.model_path`."""
        return options.model_path(self.model, quiet=quiet)

    def settings(self) -> dict[str, Any]:
        """All options but the model, as keyword arguments for `Model.load`."""
        return {
            "n_ctx": self.ctx_size,
            "n_threads": self.threads,
            "device": self.device,
            "mmproj": self.mmproj,
            "vision_compute": self.vision_compute,
            "cache_type": self.cache_type,
        }

    def load(self, path: str | Path, progress: Progress, **more: Any) -> Model:
        """Loads the model at a path, and prints its notes and warnings. `more`: further arguments of `Model.load`."""
        from granite4v.runtime import Model

        loaded = Model.load(path, **self.settings(), **more)
        if loaded.vision_note is not None:
            progress.note(f"note: {loaded.vision_note}")
        for warning in loaded.warnings:
            progress.note(f"warning: {warning}")
        return loaded


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen."""

    temperature: options.TemperatureOption = 0.0
    top_k: options.TopKOption = 0
    top_p: options.TopPOption = 1.0
    seed: options.SeedOption = None


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Wraps a command: parameters that are dataclasses are replaced by one parameter for each of their fields."""
    signature = inspect.signature(command, eval_str=True)
    groups = {name: each.annotation for name, each in signature.parameters.items() if _is_group(each.annotation)}

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in dataclasses.fields(group)})
        command(**given)

    flat = [one for each in signature.parameters.values() for one in _parameters(each)]
    run.__signature__ = signature.replace(parameters=flat)  # type: ignore[attr-defined]  # typer reads it
    return run


def _is_group(annotation: Any) -> bool:
    return isinstance(annotation, type) and dataclasses.is_dataclass(annotation)


def _parameters(parameter: inspect.Parameter) -> list[inspect.Parameter]:
    if not _is_group(parameter.annotation):
        return [parameter]
    types = get_type_hints(parameter.annotation, include_extras=True)
    return [
        parameter.replace(name=field.name, default=field.default, annotation=types[field.name])
        for field in dataclasses.fields(parameter.annotation)
    ]
