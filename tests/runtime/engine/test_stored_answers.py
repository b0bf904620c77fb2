"""Tests of pages from the store on real models: the same bits as without any cache, whatever else runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import granite4v
from granite4v import PageStore, PageStoreWarning
from granite4v.runtime.engine import page_store
from granite4v.runtime.engine.parallel import Workload
from tests.helpers.pictures import noise_picture
from tests.helpers.source_tree import ROOT
from tests.toy.spec import PRESETS

ONE, TWO = noise_picture((150, 100), 1), noise_picture((150, 100), 2)
SETTINGS: dict[str, Any] = {"device": "cpu", "n_threads": 1}


@pytest.fixture
def store(tmp_path: Path) -> PageStore:
    return PageStore(tmp_path / "pages")


def load(path: Path, store: PageStore | None, **options: Any) -> granite4v.Model:
    return granite4v.load(path, **{**SETTINGS, "exact": False, "page_store": store, **options})


def look(model: granite4v.Model, prompt: Any = "What is this?", images: Any = (ONE,), **options: Any) -> Any:
    """Returns the timings, tokens and logits of one request."""
    answer = model.generate(prompt, list(images), max_tokens=8, ignore_eos=True, **options)
    return answer.timings, answer.tokens, model.logits(prompt, list(images), **options)


KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "F32": ("tiny", "F32", {}),
    "exact": ("tiny", "F32", {"exact": True}),
    "F16": ("tiny", "F16", {}),
    "Q8_0, two threads": ("tiny-wide", "Q8_0", {"n_threads": 2}),
    "Q4_K_M, q8_0 cache": ("tiny-wide", "Q4_K_M", {"cache_type": "q8_0", "exact": None}),
    "batch": ("tiny", "F16", {"workload": Workload(8)}),
    "one sequence": ("tiny", "F16", {"n_parallel": 1}),
    "another family": ("tiny-clip-llama", "F16", {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_as_without_any_cache(
    make_model: Callable[..., Path], store: PageStore, tmp_path: Path, kind: str
) -> None:
    preset, text_type, options = KINDS[kind]
    path = make_model(PRESETS[preset], text_type)
    # a batch that stores its pages computes attention as a conversation does, so conversations can go on from them
    for_batches = PageStore(tmp_path / "of another batch") if "workload" in options else None
    with load(path, for_batches, **options) as model:
        _, tokens, logits = look(model)
    with load(path, store, **options) as model:
        timings, found, values = look(model)
        assert timings.n_stored == 0 and found == tokens
        np.testing.assert_array_equal(values, logits)
    with load(path, store, **options) as model:
        timings, found, values = look(model)
        assert timings.n_stored > timings.n_image > 0 and timings.n_reused == timings.n_encoded == 0
        assert not model.engine.vision_is_open and timings.prefill_image_s == timings.encode_s == 0
        assert found == tokens
        np.testing.assert_array_equal(values, logits)
        for other in ("Why?", "How many of them are there, and where?"):  # not asked before
            with load(path, None, **{**options, "workload": None}) as alone:
                np.testing.assert_array_equal(model.logits(other, [ONE]), alone.logits(other, [ONE]))


def test_several_images_and_a_conversation(make_model: Callable[..., Path], store: PageStore) -> None:
    path = make_model(PRESETS["tiny"], "F16")
    image = {"type": "image"}
    turns = [
        {"role": "user", "content": [image, image, {"type": "text", "text": "Compare."}]},
        {"role": "assistant", "content": "They differ."},
        {"role": "user", "content": [image, {"type": "text", "text": "And this?"}]},
    ]
    images = (ONE, TWO, ONE)
    with load(path, None) as model:
        alone = look(model, turns, images)
        first = look(model, turns[:1], images[:2])
    for expected_tokens in (0, alone[0].n_image):
        with load(path, store) as model:
            timings, tokens, logits = look(model, turns, images)
            assert tokens == alone[1] and (timings.n_stored > 0) == (expected_tokens > 0)
            assert timings.n_stored >= expected_tokens
            np.testing.assert_array_equal(logits, alone[2])
            timings, tokens, logits = look(model, turns[:1], images[:2])
            assert tokens == first[1]
            np.testing.assert_array_equal(logits, first[2])


def test_side_by_side_with_other_requests(make_model: Callable[..., Path], store: PageStore) -> None:
    """Pages are restored into one of several sequences while the others are decoded."""
    path = make_model(PRESETS["tiny"], "F32")
    pictures = [noise_picture((150, 100), seed) for seed in range(6)]
    options: dict[str, Any] = {"max_tokens": 24, "ignore_eos": True, "repetition": False}
    with load(path, None) as model:
        alone = [model.generate("What?", [picture], **options).tokens for picture in pictures]
    with load(path, store) as model:
        for picture in pictures[::2]:
            model.generate("What?", [picture], **options)
    with load(path, store) as model:
        streams = [model.stream("What?", [picture], **options) for picture in (*pictures, *pictures)]
        answers = [stream.result() for stream in streams]
        assert [answer.tokens for answer in answers] == alone + alone
        assert sum(answer.timings.n_stored > 0 for answer in answers) >= 3
        assert sum(answer.timings.n_encoded for answer in answers) == 3


def test_closing_at_once_still_stores(make_model: Callable[..., Path], store: PageStore) -> None:
    path = make_model(PRESETS["tiny"], "F16")
    with load(path, store) as model:
        model.generate("What?", [ONE], max_tokens=1)
    assert len(store.entries()) == 1
    with load(path, store) as model:
        stream = model.stream("What?", [TWO], max_tokens=400, ignore_eos=True)
        next(stream)
        begin = time.monotonic()
    assert time.monotonic() - begin < 20 and len(store.entries()) == 2
    assert all(problem is None for _, problem in store.verify())


def test_true_is_the_users_own_store(make_model: Callable[..., Path], tmp_path: Path) -> None:
    path = make_model(PRESETS["tiny"], "F16")
    for page_store_option in (None, False):
        with granite4v.load(path, page_store=page_store_option, **SETTINGS) as model:
            assert look(model)[0].n_stored == 0
    assert not (tmp_path / "own-page-store").exists()
    for is_later in (False, True):
        with granite4v.load(path, page_store=True, **SETTINGS) as model:
            assert (look(model)[0].n_stored > 0) == is_later
    assert len(PageStore().entries()) == 1 and PageStore().folder == tmp_path / "own-page-store"


def test_a_store_that_cannot_be_written_costs_a_warning(
    make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_model(PRESETS["tiny"], "F16")
    (tmp_path / "file").touch()
    with load(path, None) as model:
        expected_tokens = look(model)[1]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with load(path, PageStore(tmp_path / "file" / "pages")) as model:
            assert look(model)[1] == expected_tokens
            look(model, images=(TWO,))
    assert [each.category for each in said] == [PageStoreWarning]


def test_a_cache_type_that_does_not_go_with_exact(make_model: Callable[..., Path]) -> None:
    path = make_model(PRESETS["tiny"])
    with pytest.raises(ValueError, match="exact=True computes with a float32 KV cache"):
        granite4v.load(path, exact=True, cache_type="q8_0")
    with pytest.raises(ValueError, match="'q4' ?; expected one of"):
        granite4v.load(path, cache_type="q4")  # type: ignore[arg-type]
    with granite4v.load(path, **SETTINGS) as model:
        assert model.settings["cache_type"] == "f32"
    with granite4v.load(path, cache_type="f16", **SETTINGS) as model:
        assert model.settings["cache_type"] == "f16"
    with granite4v.load(path, cache_type="q8_0", **SETTINGS) as model, pytest.raises(granite4v.DeviceError, match="32"):
        model.generate("Heads of 16 are no multiple of a block.", max_tokens=1)


# --- several processes ---

ASK = """
import json, sys, granite4v
from PIL import Image
folder, store, image = sys.argv[1:]
with granite4v.load(folder, device="cpu", n_threads=1, exact=False, page_store=granite4v.PageStore(store)) as model:
    answer = model.generate("What is this?", [Image.open(image)], max_tokens=8, ignore_eos=True)
    logits = model.logits("What is this?", [Image.open(image)])
print(json.dumps([answer.timings.n_stored, answer.tokens, logits.tobytes().hex()]))
"""


def test_processes_share_pages(make_model: Callable[..., Path], store: PageStore, tmp_path: Path) -> None:
    path = make_model(PRESETS["tiny"], "F16")
    ONE.save(tmp_path / "page.png")
    with load(path, None) as model:
        _, tokens, logits = look(model)

    def begin() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", ASK, str(path), str(store.folder), str(tmp_path / "page.png")]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    for is_stored in (False, True):
        processes = [begin(), begin()]
        for process in processes:
            found = json.loads(process.communicate(timeout=120)[0])
            assert found[0] > 0 or not is_stored
            assert found[1:] == [tokens, logits.tobytes().hex()]
    assert len(store.entries()) == 1 and all(problem is None for _, problem in store.verify())
    assert {path.name for path in store.folder.iterdir()} == {store.entries()[0].path.name, page_store.LOCK}
    assert os.listdir(store.folder)
