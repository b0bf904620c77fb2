"""One model for all stages with the same options, as long as one of them lives."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from docling.datamodel.accelerator_options import AcceleratorDevice, AcceleratorOptions

from granite4v.docling_plugin import (
    Granite4vPictureModel,
    Granite4vPictureOptions,
    Granite4vTableModel,
    Granite4vTableOptions,
)
from granite4v.docling_plugin.shared_model import shared_model
from granite4v.errors import ModelFileError

ON_CPU = AcceleratorOptions(device=AcceleratorDevice.CPU)


def loaded(accelerator: AcceleratorOptions = ON_CPU, **options: Any) -> Any:
    return shared_model(Granite4vTableOptions(**{"n_parallel": 2, **options}), accelerator)


def test_stages_with_the_same_options_share_a_model() -> None:
    tables = Granite4vTableModel(True, None, Granite4vTableOptions(n_parallel=2), ON_CPU)
    pictures = Granite4vPictureModel(
        enabled=True,
        enable_remote_services=False,
        artifacts_path=None,
        options=Granite4vPictureOptions(n_parallel=2),
        accelerator_options=ON_CPU,
    )
    model = loaded()
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: id(loaded()), range(8))) == {id(model)}
    assert loaded(n_parallel=3) is not model
    assert loaded(scale=1.0, max_tokens=5) is model  # options that do not concern the model
    gone = weakref.ref(model)
    del model, tables
    gc.collect()
    assert gone() is not None
    del pictures
    gc.collect()
    assert gone() is None


def test_docling_tells_threads_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("DOCLING_NUM_THREADS", raising=False)
    assert loaded(AcceleratorOptions(num_threads=1, device="cpu")).n_threads == 1
    assert loaded(AcceleratorOptions(num_threads=1, device="cpu"), n_threads=2).n_threads == 2
    assert loaded(AcceleratorOptions(device="cpu")) is loaded(AcceleratorOptions(device=AcceleratorDevice.CPU))
    with pytest.raises(ValueError, match=r"device is .*xpu.*; granite4v computes on auto, cpu, cuda or mps"):
        loaded(AcceleratorOptions(device="xpu"))


def test_a_model_that_is_not_there_is_an_error_every_time() -> None:
    for _ in range(2):
        with pytest.raises(ModelFileError, match="does not exist"):
            loaded(model="not a model")
