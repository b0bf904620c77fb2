"""Tests that a stored page is never found for another image, prompt, adapter state, file or arithmetic."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import granite4v
from granite4v import PageStore
from granite4v.converter import Options, convert
from granite4v.ggml.compiled.nodes import NodeKernels
from granite4v.runtime.engine import page_identity
from tests.helpers.pictures import noise_picture
from tests.toy.checkpoint import AdapterSpec, write_adapter
from tests.toy.spec import PRESETS

ONE = noise_picture((150, 100), 1)


@pytest.fixture
def store(tmp_path: Path) -> PageStore:
    return PageStore(tmp_path / "pages")


def load(path: Path, store: PageStore | None, **options: Any) -> granite4v.Model:
    return granite4v.load(path, **{"device": "cpu", "n_threads": 1, "exact": False, "page_store": store, **options})


def n_stored(path: Path, store: PageStore, images: Any = (ONE,), **options: Any) -> int:
    """Loads a model, asks it one question and returns how many positions came from the store."""
    asked = {name: options.pop(name) for name in ("lora", "prompt") if name in options}
    with load(path, store, **options) as model:
        prompt = asked.pop("prompt", "What is this?")
        return model.generate(prompt, list(images), max_tokens=2, **asked).timings.n_stored


@pytest.fixture(scope="module")
def with_lora(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    adapter = write_adapter(tmp_path_factory.mktemp("adapter"), PRESETS["tiny"], AdapterSpec())
    out = tmp_path_factory.mktemp("separate") / "model"
    options = Options(text_type="F16", vision_type="F16", lora="separate", adapter=str(adapter))
    convert(make_checkpoint(PRESETS["tiny"]), out, options)
    return out


def test_one_changed_pixel_never_hits(make_model: Callable[..., Path], store: PageStore) -> None:
    path = make_model(PRESETS["tiny"], "F16")
    changed = ONE.copy()
    red, green, blue = changed.getpixel((149, 99))
    changed.putpixel((149, 99), (red, green, blue ^ 1))
    assert n_stored(path, store) == 0
    assert n_stored(path, store, [changed]) == 0
    assert n_stored(path, store, [ONE.rotate(180)]) == 0
    assert n_stored(path, store, [ONE.copy()]) > 0


def test_the_file_that_pixels_came_from_does_not_matter(
    make_model: Callable[..., Path], store: PageStore, tmp_path: Path
) -> None:
    path = make_model(PRESETS["tiny"], "F16")
    for name in ("page.png", "page.bmp", "page.tiff"):
        ONE.save(tmp_path / name)
    assert n_stored(path, store, [tmp_path / "page.png"]) == 0
    assert n_stored(path, store, [tmp_path / "page.bmp"]) > 0
    assert n_stored(path, store, [(tmp_path / "page.tiff").read_bytes()]) > 0


def test_another_adapter_state_never_hits(with_lora: Path, store: PageStore) -> None:
    assert n_stored(with_lora, store, lora=True) == 0
    assert n_stored(with_lora, store, lora=False) == 0
    for lora in (True, False):
        with load(with_lora, None) as alone, load(with_lora, store) as model:
            logits = model.logits("What is this?", [ONE], lora=lora)
            np.testing.assert_array_equal(logits, alone.logits("What is this?", [ONE], lora=lora))
            assert not model.engine.vision_is_open
        assert n_stored(with_lora, store, lora=lora) > 0


def test_another_template_prefix_never_hits(make_model: Callable[..., Path], store: PageStore) -> None:
    path = make_model(PRESETS["tiny"], "F16")
    assert n_stored(path, store) == 0

    def told(system: str) -> Any:
        return [
            {"role": "system", "content": system},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
        ]

    assert n_stored(path, store, prompt=told("Be brief.")) == 0
    assert n_stored(path, store, prompt=told("Be brief!")) == 0
    assert n_stored(path, store, prompt=told("Be brief.")) > 0
    assert n_stored(path, store, prompt="Another question?") > 0  # the question comes after the image


def test_other_weights_or_another_way_to_compute_never_hits(
    make_model: Callable[..., Path], store: PageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = PRESETS["tiny"]
    path = make_model(spec, "F16")
    assert n_stored(path, store) == 0 and n_stored(path, store) > 0
    others: list[tuple[Path, dict[str, Any]]] = [
        (make_model(spec, "F32"), {}),
        (make_model(spec, "F16", "F16"), {}),
        (make_model(replace(spec, seed=1), "F16"), {}),
        (path, {"exact": True}),
        (path, {"n_threads": 2}),
        (path, {"vision_compute": "Q8_0"}),
    ]
    for other, options in others:
        assert n_stored(other, store, **options) == 0, options
    assert n_stored(path, store, exact=True) > 0
    is_compiled = bool(NodeKernels.available((16, 2), ["F16"]))
    has_angles = bool(NodeKernels.available(rotary=True))
    monkeypatch.setattr("granite4v.ggml.compiled.nodes.llvm", lambda: None)
    assert (n_stored(path, store) == 0) == is_compiled
    assert (n_stored(path, store, exact=True) == 0) == has_angles
    monkeypatch.setattr("granite4v.runtime.engine.parallel.MOST_SCORES", 0)  # flash attention
    assert n_stored(path, store) == 0
    monkeypatch.undo()
    monkeypatch.setattr("granite4v.runtime.engine.engine.N_UBATCH", 64)  # other batch sizes
    assert n_stored(path, store) == 0
    monkeypatch.undo()
    monkeypatch.setattr(page_identity, "PREPROCESSING", 0)
    assert n_stored(path, store) == 0
    monkeypatch.undo()
    monkeypatch.setattr(page_identity, "build_id", lambda: "another build")
    assert n_stored(path, store) == 0


def test_files_that_changed_in_place_are_other_files(
    make_model: Callable[..., Path], store: PageStore, tmp_path: Path
) -> None:
    source = make_model(PRESETS["tiny"], "F16")
    path = tmp_path / "model"
    path.mkdir()
    for file in source.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    assert n_stored(path, store) == 0 and n_stored(path, store) > 0
    (vision,) = path.glob("mmproj*")
    data = bytearray(vision.read_bytes())
    data[-3] ^= 1  # a bit of the last weight
    vision.write_bytes(data)
    assert n_stored(path, store) == 0


@pytest.mark.parametrize("role", ["text", "mmproj"])
@pytest.mark.parametrize("stage", ["before the first question", "after it"])
def test_a_file_that_is_replaced_under_a_loaded_model(
    make_model: Callable[..., Path], store: PageStore, tmp_path: Path, role: str, stage: str
) -> None:
    """What the loaded model computes is not stored under the identity of the new file."""
    path = tmp_path / "model"
    shutil.copytree(make_model(PRESETS["tiny"], "F16"), path)
    (name,) = (file.name for file in path.glob(f"{role}*.gguf"))
    with load(path, store) as model:
        if stage == "after it":
            model.generate("What is this?", [ONE], max_tokens=2)
        else:  # loads the text weights, but not the encoder's
            model.generate("Hello", max_tokens=1)
        data = bytearray((path / name).read_bytes())
        data[-3] ^= 1  # a bit of the last weight
        (tmp_path / "new").write_bytes(data)
        (tmp_path / "new").replace(path / name)
        with pytest.warns(granite4v.PageStoreWarning, match=rf"not stored: .*{name}' has changed since") as said:
            for turn in (0, 90, 180):
                model.generate("What is this?", [ONE.rotate(turn + 5)], max_tokens=2)
        assert len(said) == 1
    assert len(store.entries()) == (stage == "after it")
    with load(path, None) as alone, load(path, store) as later:
        expected = alone.logits("What is this?", [ONE])
        np.testing.assert_array_equal(later.logits("What is this?", [ONE]), expected)
    assert n_stored(path, store, [ONE.rotate(5)]) == 0
