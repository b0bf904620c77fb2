"""Pages from the store: the same bits as without any cache, found for the same request alone."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import granite4v
from granite4v import PageStore, PageStoreWarning
from granite4v.converter import Options, convert
from granite4v.errors import ModelFileError
from granite4v.runtime.engine import page_identity, page_store
from granite4v.runtime.engine.cached_sequence import Batch
from granite4v.runtime.engine.parallel import Workload
from granite4v.runtime.engine.stored_pages import StoredPages, image_ends
from granite4v.runtime.prompt.spans import ImageSpan, TextSpan
from tests.helpers.fake_context import FakeEngine, expected, read
from tests.helpers.pictures import noise_picture
from tests.helpers.source_tree import ROOT
from tests.toy.checkpoint import AdapterSpec, write_adapter
from tests.toy.spec import PRESETS

# --- on a fake context ---

START = TextSpan((1, 2, 3))
PAGE, OTHER = ImageSpan(0, 40, b"a page"), ImageSpan(0, 40, b"other")


class Identity:
    """Of one model; `name` stands for all that its bits depend on."""

    def __init__(self, name: str = "model", error: ModelFileError | None = None) -> None:
        self.name, self.error = name, error

    def prepare(self, announce: Callable[[str], None], check: Callable[[], None]) -> None:
        if self.error is not None:
            raise self.error

    def __call__(self, adapter: bool) -> dict[str, Any]:
        return {"name": self.name}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "pages"


@pytest.fixture
def engine(folder: Path) -> Iterator[Callable[..., FakeEngine]]:
    """Makes engines on one store. With `settle`, what the last one stored is written before the next one is made."""
    made: list[StoredPages] = []

    def make(identity: Identity | None = None, **options: Any) -> FakeEngine:
        for pages in made:
            pages.close()
        made.append(StoredPages(PageStore(folder), "fake", identity or Identity()))
        return FakeEngine(pages=made[-1], **options)

    yield make
    for pages in made:
        pages.close()


def ask(engine: FakeEngine, *spans: Any, **options: Any) -> Any:
    channel = engine.submit(*spans, max_tokens=12, **options)
    engine.run()
    assert read(channel) == expected(spans, 12, options.get("adapter", False))
    return channel.answer.timings


def test_a_page_is_encoded_and_prefilled_once(engine: Callable[..., FakeEngine]) -> None:
    first = engine()
    timings = ask(first, START, PAGE, TextSpan((7, 8)))
    assert (timings.n_stored, timings.n_reused, first.n_encoded) == (0, 0, 1)
    later = engine()
    timings = ask(later, START, PAGE, TextSpan((9,)))
    assert (timings.n_stored, timings.n_reused, later.n_encoded) == (43, 0, 0)
    assert later.scheduler.counters.n_prefilled == 1
    timings = ask(later, START, PAGE, TextSpan((5, 6)))  # from memory now
    assert (timings.n_stored, timings.n_reused) == (0, 43)


@pytest.mark.parametrize(
    "spans",
    [
        (START, OTHER, TextSpan((7, 8))),
        (START, ImageSpan(0, 39, b"a page"), TextSpan((7, 8))),
        (TextSpan((1, 2, 4)), PAGE, TextSpan((7, 8))),
        (TextSpan((1, 2)), PAGE, TextSpan((7, 8))),
        (PAGE, TextSpan((7, 8))),
        (START, TextSpan((7, 8))),
    ],
    ids=["pixels", "tokens of the image", "prefix", "shorter prefix", "no prefix", "no image"],
)
def test_another_beginning_is_another_page(engine: Callable[..., FakeEngine], spans: Any) -> None:
    ask(engine(), START, PAGE, TextSpan((7, 8)))
    assert ask(engine(), *spans).n_stored == 0


def test_another_adapter_state_or_model_is_another_page(engine: Callable[..., FakeEngine]) -> None:
    ask(engine(), START, PAGE, TextSpan((7, 8)))
    assert ask(engine(), START, PAGE, TextSpan((7, 8)), adapter=True).n_stored == 0
    assert ask(engine(Identity("another")), START, PAGE, TextSpan((7, 8))).n_stored == 0
    assert ask(engine(), START, PAGE, TextSpan((7, 8)), adapter=True).n_stored == 43


def test_text_alone_is_not_stored(engine: Callable[..., FakeEngine], folder: Path) -> None:
    ask(engine(), START, TextSpan(tuple(range(40))))
    engine()
    assert not folder.exists()


def test_of_several_images_the_first_and_all_are_stored(engine: Callable[..., FakeEngine], folder: Path) -> None:
    third = ImageSpan(2, 20, b"third")
    spans = (START, PAGE, OTHER, third, TextSpan((7, 8)))
    ask(engine(), *spans)
    engine()
    found = sorted((entry.description.n_tokens, entry.description.n_images) for entry in PageStore(folder).entries())
    assert found == [(43, 1), (103, 3)]
    assert ask(engine(), *spans[:-1], TextSpan((5,))).n_stored == 103
    assert ask(engine(), START, PAGE, TextSpan((5,))).n_stored == 43
    assert ask(engine(), START, PAGE, OTHER, TextSpan((5,))).n_stored == 43
    assert ask(engine(), START, PAGE, OTHER, TextSpan((6,))).n_stored == 83  # stored by the request before


def test_a_prompt_that_ends_with_its_image_computes_its_last_position(engine: Callable[..., FakeEngine]) -> None:
    ask(engine(), START, PAGE)
    later = engine()
    assert ask(later, START, PAGE).n_stored == 0
    assert ask(engine(), START, PAGE, TextSpan((4,))).n_stored == 43


def test_what_memory_has_is_not_read_from_the_store(engine: Callable[..., FakeEngine]) -> None:
    ask(engine(), START, PAGE, TextSpan((7, 8)))
    later = engine()
    channels = [later.submit(START, PAGE, TextSpan((i,)), max_tokens=5) for i in range(4)]
    later.run()
    assert [read(channel) for channel in channels] == [expected((START, PAGE, TextSpan((i,))), 5) for i in range(4)]
    assert sorted(channel.answer.timings.n_stored for channel in channels) == [0, 0, 0, 43]
    assert later.n_encoded == 0


def test_a_page_is_restored_while_another_is_copied(engine: Callable[..., FakeEngine]) -> None:
    """llama.cpp makes copies at the next decode, so they must not wait when cells are restored (`FakeContext`)."""
    ask(engine(), START, OTHER, TextSpan((7,)))
    later = engine(n_seq_max=3)
    begun = later.submit(START, PAGE, TextSpan((2,)), max_tokens=30)
    for _ in range(6):
        later.scheduler.step()
    spans = [(START, PAGE, TextSpan((3,))), (START, OTHER, TextSpan((4,)))]  # the first is copied, the second restored
    channels = [later.submit(*each, max_tokens=12) for each in spans]
    later.run()
    assert read(begun) == expected((START, PAGE, TextSpan((2,))), 30)
    assert [read(channel) for channel in channels] == [expected(each, 12) for each in spans]
    assert [channel.answer.timings.n_stored for channel in channels] == [0, 43]


def test_a_damaged_page_is_computed_again(engine: Callable[..., FakeEngine], folder: Path) -> None:
    ask(engine(), START, PAGE, TextSpan((7, 8)))
    later = engine()
    (path,) = folder.glob("*.state")
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.warns(PageStoreWarning) as said:
        timings = ask(later, START, PAGE, TextSpan((9,)))
    assert (timings.n_stored, later.n_encoded, len(said)) == (0, 1, 1)
    assert ask(engine(), START, PAGE, TextSpan((9,))).n_stored == 43  # it was written again


def test_a_state_that_the_context_refuses_is_computed_again(engine: Callable[..., FakeEngine]) -> None:
    ask(engine(), START, PAGE, TextSpan((7, 8)))
    later = engine()
    ask(later, START)
    context = later.contexts[-1]

    def refuse(sequence: int, state: np.ndarray) -> None:
        raise granite4v.DeviceError("not this one")

    context.restore = refuse  # type: ignore[method-assign]
    assert ask(later, START, PAGE, TextSpan((9,))).n_stored == 0


def test_files_that_cannot_be_read_switch_the_store_off(engine: Callable[..., FakeEngine], folder: Path) -> None:
    broken = engine(Identity(error=ModelFileError("'text.gguf' cannot be read")))
    with pytest.warns(PageStoreWarning, match=r"pages are not stored: 'text.gguf' cannot be read") as said:
        ask(broken, START, PAGE, TextSpan((7, 8)))
        ask(broken, START, OTHER, TextSpan((7, 8)))
    engine()
    assert len(said) == 1 and not folder.exists()


def test_what_was_not_prefilled_alike_is_not_stored(
    engine: Callable[..., FakeEngine], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt that goes on in the middle of a batch has rows that were computed in other batches."""
    monkeypatch.setattr("granite4v.runtime.engine.cached_sequence.MAX_RECOMPUTED", 0)
    one = engine()
    ask(one, TextSpan((1, 2, 3, 4)))
    ask(one, TextSpan((1, 2, 3, 5)), PAGE, TextSpan((7,)))
    engine()
    assert not folder.exists()


@pytest.mark.parametrize("seed", range(4))
def test_random_requests_to_engines_that_come_and_go(engine: Callable[..., FakeEngine], seed: int) -> None:
    """Every answer is that of its own page, from memory, from the store, or computed."""
    chosen = random.Random(seed)
    n_stored = 0
    for _ in range(12):
        one = engine(n_seq_max=chosen.choice((1, 2, 4)))
        asked = []
        for _ in range(8):
            sizes = [chosen.choice((20, 40)) for _ in range(chosen.randint(0, 2))]
            pages = [ImageSpan(i, n, bytes([chosen.randint(1, 3)])) for i, n in enumerate(sizes)]
            spans = (START, *pages, TextSpan((chosen.randint(4, 6), chosen.randint(4, 9))))
            adapter = chosen.random() < 0.3
            asked.append((spans, adapter, one.submit(*spans, max_tokens=9, adapter=adapter)))
            for _ in range(chosen.randint(0, 8)):
                one.scheduler.step()
            if chosen.random() < 0.2:
                asked.pop(chosen.randrange(len(asked)))[2].cancel()
        one.run()
        for spans, adapter, channel in asked:
            assert read(channel) == expected(spans, 9, adapter)
            n_stored += channel.answer.timings.n_stored
    assert n_stored > 0


def test_image_ends() -> None:
    image = [(b"a", i) for i in range(6)]
    plan = [Batch(tuple(keys)) for keys in ([1, 2], image[:4], image[4:], [3], [(b"b", 0)], [(b"b", 0)], [4])]
    assert image_ends(plan) == [3, 5, 6]
    assert image_ends(plan[:2]) == [2] and image_ends(plan[:1]) == []


# --- on real models ---

ONE, TWO = noise_picture((150, 100), 1), noise_picture((150, 100), 2)
SETTINGS: dict[str, Any] = {"device": "cpu", "n_threads": 1}


@pytest.fixture
def store(folder: Path) -> PageStore:
    return PageStore(folder)


def load(path: Path, store: PageStore | None, **options: Any) -> granite4v.Model:
    return granite4v.load(path, **{**SETTINGS, "exact": False, "page_store": store, **options})


def look(model: granite4v.Model, prompt: Any = "What is this?", images: Any = (ONE,), **options: Any) -> Any:
    """Timings, tokens and logits of one request."""
    answer = model.generate(prompt, list(images), max_tokens=8, ignore_eos=True, **options)
    return answer.timings, answer.tokens, model.logits(prompt, list(images), **options)


def n_stored(path: Path, store: PageStore, images: Any = (ONE,), **options: Any) -> int:
    """Of one question by a model of its own."""
    asked = {name: options.pop(name) for name in ("lora", "prompt") if name in options}
    with load(path, store, **options) as model:
        return int(look(model, images=images, **asked)[0].n_stored)


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
def test_the_same_bits_as_without_any_cache(make_model: Callable[..., Path], store: PageStore, kind: str) -> None:
    preset, text_type, options = KINDS[kind]
    path = make_model(PRESETS[preset], text_type)
    with load(path, None, **options) as model:
        _, tokens, logits = look(model)
        assert "stored" not in model.settings
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
        for other in ("Why?", "How many of them are there, and where?"):  # that were never asked before
            with load(path, None, **options) as alone:
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
    """Restored into one of several sequences, while others are decoded."""
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


@pytest.fixture(scope="module")
def with_lora(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    adapter = write_adapter(tmp_path_factory.mktemp("adapter"), PRESETS["tiny"], AdapterSpec())
    out = tmp_path_factory.mktemp("separate") / "model"
    options = Options(text_type="F16", vision_type="F16", lora="separate", adapter=str(adapter))
    convert(make_checkpoint(PRESETS["tiny"]), out, options)
    return out


def test_another_adapter_state_never_hits(with_lora: Path, store: PageStore) -> None:
    assert n_stored(with_lora, store, lora=True) == 0
    assert n_stored(with_lora, store, lora=False) == 0
    for lora in (True, False):
        with load(with_lora, None) as alone, load(with_lora, store) as model:
            timings, tokens, logits = look(model, lora=lora)
            assert timings.n_stored > 0 and tokens == look(alone, lora=lora)[1]
            np.testing.assert_array_equal(logits, alone.logits("What is this?", [ONE], lora=lora))


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
    assert n_stored(path, store, prompt="Another question?") > 0  # which is behind the image


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
    monkeypatch.setattr("granite4v.runtime.engine.engine.N_UBATCH", 64)  # other batches
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
    data[-3] ^= 1  # of the last weight
    vision.write_bytes(data)
    assert n_stored(path, store) == 0


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


def test_progress_tells_of_a_stored_page(make_model: Callable[..., Path], store: PageStore) -> None:
    path = make_model(PRESETS["tiny"], "F16")
    told: list[str] = []
    for is_later in (False, True):
        told.clear()
        with load(path, store) as model:
            model.generate("What?", [ONE], max_tokens=1, progress=lambda stage, done, total: told.append(stage))
        assert ("stored" in told, "encode" in told) == (is_later, not is_later)


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
