"""Tests of several pages in flight: order, copies, failures, early ends, and pages that are read alone."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import granite4v
from granite4v.errors import ContextOverflowError, DeviceError
from granite4v.runtime.documents import Page
from granite4v.runtime.extract import State, batch, extract
from granite4v.runtime.extract.attempts import FILE, Attempts
from tests.helpers.fake_model import FakeModel, run, without_timings
from tests.helpers.pictures import noise_picture
from tests.helpers.runs import kept
from tests.toy.spec import PRESETS

N_PAGES = 12


@pytest.fixture
def model(model: FakeModel) -> FakeModel:
    model.n_parallel = 4
    model.known += ("tables_json", "tables_otsl")
    return model


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    """Documents of one page, one for each shade from 1 to `N_PAGES`."""
    folder = tmp_path / "pages"
    folder.mkdir()
    for shade in range(1, N_PAGES + 1):
        Image.new("RGB", (20, 30), (shade,) * 3).save(folder / f"{shade:02}.png")
    return folder


def start(model: FakeModel, inputs: Any, tasks: Any = ("kvp",), **options: Any) -> Any:
    return run(model, inputs, tasks, drafting=False, **options)


def texts(records: Any) -> list[tuple[str, int | None, str, str, Any, str | None]]:
    return [(Path(r.source).name, r.page, r.task, r.text, r.copy_of, r.error) for r in records]


def test_records_come_in_order_and_are_those_of_one_at_a_time(model: FakeModel, scans: Path, tmp_path: Path) -> None:
    tasks = ("tables_html", "kvp", "chart2csv")
    states: list[int] = []
    options = {"report": True, "formats": ["csv"]}
    found = list(
        start(model, scans, tasks, out=tmp_path / "4", watch=lambda s: states.append(s.n_in_flight), **options)
    )
    alone = list(start(model, scans, tasks, out=tmp_path / "1", parallel=1, **options))
    assert texts(found) == texts(alone) and max(states) == 4
    assert without_timings(tmp_path / "4/results.jsonl") == without_timings(tmp_path / "1/results.jsonl")
    files = [sorted(path.name for path in (tmp_path / name).rglob("*")) for name in "41"]
    assert files[0] == files[1] and "a.tables_html.page3.csv" in files[0]


def test_a_failing_page_leaves_its_neighbours_alone_and_its_copies_are_read(model: FakeModel, scans: Path) -> None:
    n_failed = 0

    def fail(prompt: str, shade: int) -> None:
        nonlocal n_failed
        if shade == 20 and not n_failed:
            n_failed += 1
            raise ContextOverflowError("too long")

    model.fail = fail
    found = list(start(model, scans))
    assert [record.error is None for record in found] == [True, False, True, False, True, True]
    assert [record.value for record in found][2:] == [{"shade": 30}, None, {"shade": 20}, {"shade": 20}]
    assert found[5].copy_of is not None and Path(found[5].copy_of["source"]).name == "c.png"
    assert sorted(shade for _, shade, _ in model.asked) == [10, 20, 20, 30]


def test_what_is_finished_behind_an_unfinished_page_is_kept(model: FakeModel, pages: Path, tmp_path: Path) -> None:
    def watch(state: State) -> None:
        if len(model.streams) == 1:
            model.streams[0].is_held = True
        if len(model.streams) == 5 and sum(stream.is_done for stream in model.streams) == 3:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        list(start(model, pages, out=out, watch=watch))
    assert [Path(record.source).name for record in kept(out)] == ["02.png", "03.png", "04.png"]
    assert all(stream.is_done for stream in model.streams) and model.streams[0].is_cancelled
    model.asked.clear()
    with start(model, pages, out=out, resume=True) as going_on:
        found = [next(going_on)]
    names = [Path(record.source).name for record in kept(out)]
    assert names[:4] == ["01.png", "02.png", "03.png", "04.png"] and names == sorted(names)
    found += list(start(model, pages, out=out, resume=True))
    assert len({shade for _, shade, _ in model.asked}) == N_PAGES - 3 and len(found) + len(names) - 1 >= N_PAGES
    list(start(model, pages, out=tmp_path / "whole"))
    assert without_timings(out / "results.jsonl") == without_timings(tmp_path / "whole/results.jsonl")


def test_a_task_that_was_finished_before_an_earlier_one_keeps_its_place(
    model: FakeModel, pages: Path, tmp_path: Path
) -> None:
    def watch(state: State) -> None:
        if len(model.streams) == 1:
            model.streams[0].is_held = True
        if len(model.streams) > 1 and model.streams[1].is_done:
            raise KeyboardInterrupt

    out, tasks = tmp_path / "out", ("tables_html", "kvp")
    with pytest.raises(KeyboardInterrupt):
        list(start(model, pages, tasks, out=out, watch=watch))
    assert [record.task for record in kept(out)][:1] == ["kvp"]
    with start(model, pages, tasks, out=out, resume=True) as going_on:
        next(going_on)
    assert [record.task for record in kept(out)][:2] == ["tables_html", "kvp"]
    list(start(model, pages, tasks, out=out, resume=True))
    list(start(model, pages, tasks, out=tmp_path / "whole"))
    assert without_timings(out / "results.jsonl") == without_timings(tmp_path / "whole/results.jsonl")


@pytest.mark.parametrize("how", ["close", "error"])
def test_a_consumer_that_stops_ends_what_is_in_flight(model: FakeModel, pages: Path, tmp_path: Path, how: str) -> None:
    if how == "close":
        records = start(model, pages, out=tmp_path / "out")
        next(records)
        records.close()
    else:

        def fail(prompt: str, shade: int) -> None:
            if shade == 6:
                raise DeviceError("gone")

        model.fail = fail
        with pytest.raises(DeviceError):
            list(start(model, pages, out=tmp_path / "out"))
    assert all(stream.is_done for stream in model.streams)
    assert not (tmp_path / "out" / FILE).read_bytes()
    n = len(kept(tmp_path / "out"))
    model.fail = lambda prompt, shade: None
    assert n >= 1 and len(list(start(model, pages, out=tmp_path / "out", resume=True))) == N_PAGES - n


def test_few_pages_are_held_however_many_wait_for_the_first(
    model: FakeModel, pages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[Page] = weakref.WeakSet()
    most, read = 0, batch.open_pages

    def watched(*arguments: Any, **options: Any) -> Iterator[Any]:
        for item in read(*arguments, **options):
            alive.add(item)
            yield item
            del item

    def watch(state: State) -> None:
        nonlocal most
        most = max(most, len(alive))
        if len(model.streams) == 1:
            model.streams[0].is_held = True
        for stream in model.streams[:1]:
            stream.is_held &= sum(stream.is_done for stream in model.streams) < N_PAGES * 2 - 2

    monkeypatch.setattr(batch, "open_pages", watched)
    list(start(model, pages, ("tables_html", "kvp"), watch=watch))
    assert len(model.asked) == 2 * N_PAGES and 0 < most <= 4


def test_a_consumer_that_waits_makes_nothing_wait_behind_it(model: FakeModel, pages: Path) -> None:
    with start(model, pages) as records:
        next(records)
        assert len(model.asked) == 4


def test_a_page_that_takes_long_to_render_keeps_no_question_waiting(
    model: FakeModel, pages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = batch.open_pages
    asked: list[tuple[str, int]] = []

    def slow(*arguments: Any, waiting: Any, **options: Any) -> Iterator[Any]:
        for item in read(*arguments, **options):
            if item.source.endswith("02.png"):
                for _ in range(200):
                    waiting(item.source, 1, 0.5)
                asked.extend((prompt, shade) for prompt, shade, _ in model.asked)
            yield item

    monkeypatch.setattr(batch, "open_pages", slow)
    found = list(start(model, pages, ("tables_json", "tables_html", "tables_otsl"), parallel=2))
    assert [shade for _, shade in asked] == [1, 1, 1] and len(found) == 3 * N_PAGES


def test_suspects_are_read_alone(model: FakeModel, pages: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with start(model, pages, out=out) as first:
        next(first)
    digests = [record.digest for record in start(model, pages, ("kvp",))]
    (child := os.fork()) or _die(out / FILE, [digest for digest in digests[3:5] if digest])
    os.waitpid(child, 0)
    model.streams.clear()
    beside: dict[int, int] = {}
    asked = model.submit

    def submit(prepared: Any, options: Any, **held: Any) -> Any:
        shade = prepared.images[0].pillow.getpixel((0, 0))[0]
        beside[shade] = sum(not stream.is_done for stream in model.streams)
        return asked(prepared, options, **held)

    model.submit = submit  # type: ignore[method-assign]
    list(start(model, pages, out=out, resume=True))
    assert beside[4] == beside[5] == beside[6] == 0 and max(beside.values()) == 3
    assert not (out / FILE).read_bytes()


def _die(path: Path, digests: list[str]) -> None:
    attempts = Attempts(path)
    for digest in digests:
        attempts.begin(digest)
    os._exit(9)


@pytest.fixture(scope="module")
def toy(make_model: Callable[..., Path]) -> Iterator[granite4v.Model]:
    path = make_model(PRESETS["tiny"], text_type="F16")
    with granite4v.load(path, device="cpu", n_ctx=400, n_threads=1, n_parallel=4) as model:
        yield model


def test_with_a_model_the_answers_are_those_of_one_at_a_time(toy: granite4v.Model, tmp_path: Path) -> None:
    folder = tmp_path / "noise"
    folder.mkdir()
    for seed in range(4):
        noise_picture((150, 100), seed).save(folder / f"{seed}.png")
    tasks = ("tables_json", "tables_html", "chart2summary")
    runs = [list(extract(folder, tasks, model=toy, max_tokens=30, parallel=n)) for n in (None, 1)]
    assert texts(runs[0]) == texts(runs[1]) and len(runs[0]) == 12


@pytest.mark.parametrize(
    ("note", "parallel", "expected"),
    [
        ("2.3 times one", None, ["up to 4 answers at once (2.3 times one)"]),
        (None, None, ["up to 4 answers at once (the model was loaded for that many)"]),
        ("2.3 times one", 3, ["up to 3 answers at once (as asked for)"]),
        (None, 9, ["4 answers at once, not 9: the model was loaded for that many"]),
        ("2.3 times one", 1, []),
    ],
)
def test_it_is_said_once_how_many_answers_there_are_at_once_and_why(
    model: FakeModel, pages: Path, note: str | None, parallel: int | None, expected: list[str]
) -> None:
    said: list[str] = []
    model.parallel_note = note
    list(start(model, pages, parallel=parallel, say=said.append))
    assert [line for line in said if "at once" in line] == expected
