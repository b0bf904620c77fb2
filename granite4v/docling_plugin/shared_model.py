"""Shares one loaded model among all stages of a process that have the same options."""

from __future__ import annotations

import functools
import logging
import os
import threading
import weakref
from typing import Any

from docling.datamodel.accelerator_options import AcceleratorOptions

from granite4v.choices import Device
from granite4v.default_model import load
from granite4v.docling_plugin.options import ModelOptions
from granite4v.errors import ArgumentError
from granite4v.runtime.engine.parallel import Workload
from granite4v.runtime.model import Model

# a model lives as long as a stage that uses it; the key contains the process id, since a forked process cannot use the
# models that it inherits
_models: weakref.WeakValueDictionary[tuple[Any, ...], Model] = weakref.WeakValueDictionary()
_loading = threading.Lock()


def shared_model(options: ModelOptions, accelerator: AcceleratorOptions) -> Model:
    """Returns the model for these options; loads it unless a stage of this process uses it already. Never close it: it
    is freed with the last stage that refers to it. Raises what `granite4v.load` raises, and ArgumentError for a device
    that granite4v does not support."""
    settings: dict[str, Any] = {
        "path": options.model,
        "mmproj": options.mmproj,
        "n_ctx": options.n_ctx,
        "n_threads": options.n_threads or _chosen_threads(accelerator),
        "n_parallel": options.n_parallel,
        "device": _device(accelerator.device),
        "vision_compute": options.vision_compute,
        "cache_type": options.cache_type,
    }
    if options.model is None:
        tell_of_nano()
    key = (os.getpid(), *settings.values())
    with _loading:
        model = _models.get(key)
        if model is None:
            model = _models[key] = load(**settings, workload=Workload(None, options.max_tokens))
        return model


@functools.cache
def tell_of_nano() -> None:
    """Warns once per process that the embedded model is used, as the command line does."""
    logging.getLogger("granite4v").warning(
        "no model given: using the embedded 'nano', a small model trained on synthetic documents; give a real one with "
        "model='DIR' in the options"
    )


def _chosen_threads(accelerator: AcceleratorOptions) -> int | None:
    """The number of threads set by argument or environment; None for docling's default, which is four on any
    machine."""
    return accelerator.num_threads if "num_threads" in accelerator.model_fields_set else None


def _device(name: str) -> Device:
    """Converts docling's device, a string or string enum, to granite4v's. Raises ArgumentError for any other device."""
    if name.startswith("cuda"):
        return "cuda"
    devices: dict[str, Device] = {"auto": "auto", "cpu": "cpu", "mps": "metal"}
    if name not in devices:
        raise ArgumentError(
            f"accelerator_options.device is {name!r:.40}; granite4v computes on auto, cpu, cuda or mps."
        )
    return devices[name]
