"""Tests of pages from the store, on a fake context: answers are the same as without any cache, and a page is found only
for the same prompt prefix, adapter state and model."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import granite4v
from granite4v import PageStore, PageStoreWarning
from granite4v.errors import ModelFileError
from granite4v.runtime.engine.cached_sequence import Batch
from granite4v.runtime.engine.stored_pages import StoredPages, image_ends
from granite4v.runtime.engine.stream import Channel
from granite4v.runtime.prompt.spans import ImageSpan, TextSpan
from tests.helpers.fake_context import FakeContext, FakeEngine, expected, read

START = TextSpan((1, 2, 3))
PAGE, OTHER = ImageSpan(0, 40, b"a page"), ImageSpan(0, 40, b"other")


class Identity:
    """The identity of a model; `name` stands for everything that its bits depend on."""

    def __init__(self, name: str = "model", error: ModelFileError | None = None) -> None:
        self.name, self.error = name, error

    def prepare(self, announce: Callable[[str], None], check: Callable[[], None]) -> None:
        if self.error is not None:
            raise self.error

    def __call__(self, adapter: bool, least_rows: int) -> dict[str, Any]:
        return {"name": self.name}

    def of_images(self) -> dict[str, Any]:
        return {"images": self.name}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "pages"


@pytest.fixture
def engine(folder: Path) -> Iterator[Callable[..., FakeEngine]]:
    """Returns a function that makes engines on one store, after everything that earlier ones stored is written."""
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
    timings = ask(later, START, PAGE, TextSpan((5, 6)))  # now from the KV cache
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
    assert ask(engine(), START, PAGE, OTHER, TextSpan((6,))).n_stored == 83  # stored by the previous request


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
    """llama.cpp makes copies at the next decode, so none may be pending when cells are restored; `FakeContext` checks
    this."""
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
    assert ask(engine(), START, PAGE, TextSpan((9,))).n_stored == 43  # it was stored again


def test_a_page_is_read_while_its_context_is_made(
    engine: Callable[..., FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(engine(), START, PAGE, TextSpan((7, 8)))
    later, is_reading, are_together = engine(), threading.Event(), []
    load, make = PageStore.load, FakeContext.__init__

    def slow_load(store: PageStore, key: str) -> np.ndarray | None:
        is_reading.set()
        return load(store, key)

    def slow_make(context: FakeContext, *arguments: Any) -> None:
        are_together.append(is_reading.wait(10))
        make(context, *arguments)

    monkeypatch.setattr(PageStore, "load", slow_load)
    monkeypatch.setattr(FakeContext, "__init__", slow_make)
    assert ask(later, START, PAGE, TextSpan((9,))).n_stored == 43
    assert are_together == [True]


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
    """A prompt that reuses part of a batch has rows that were computed in other batches than its plan has."""
    monkeypatch.setattr("granite4v.runtime.engine.cached_sequence.MAX_RECOMPUTED", 0)
    one = engine()
    ask(one, TextSpan((1, 2, 3, 4)))
    ask(one, TextSpan((1, 2, 3, 5)), PAGE, TextSpan((7,)))
    engine()
    assert not folder.exists()


def test_random_requests_to_engines_that_come_and_go(engine: Callable[..., FakeEngine]) -> None:
    """Each answer is that of its own page, whether from memory, from the store or newly computed."""
    chosen = random.Random(0)
    n_stored = 0
    for _ in range(40):
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


def test_a_reader_hears_of_a_stored_page(engine: Callable[..., FakeEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(Channel, "report", lambda self, stage, done, total: told.append(stage))
    ask(engine(), START, PAGE, TextSpan((7, 8)))
    assert "stored" not in told
    ask(engine(), START, PAGE, TextSpan((9,)))
    assert told.count("stored") == 1


def test_image_ends() -> None:
    image = [(b"a", i) for i in range(6)]
    plan = [Batch(tuple(keys)) for keys in ([1, 2], image[:4], image[4:], [3], [(b"b", 0)], [(b"b", 0)], [4])]
    assert image_ends(plan) == [3, 5, 6]
    assert image_ends(plan[:2]) == [2] and image_ends(plan[:1]) == []
