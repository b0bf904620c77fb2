"""Tests of workers of a real Ray on this machine: the records are those of one process, even if workers die."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import ray.data

import granite4v
from granite4v.clip_projector.images import Image
from granite4v.errors import DeviceError, ModelFileError
from granite4v.runtime.extract import ArgumentError, State, extract
from granite4v.runtime.extract.asking import ModelAsker
from granite4v.runtime.extract.cluster import OnRay, RayModel
from granite4v.runtime.extract.cluster.worker import Assignment, Worker, versions
from granite4v.runtime.extract.options import ExtractOptions
from granite4v.runtime.extract.questions import questions
from granite4v.runtime.llama.fingerprint import model_hashes
from tests.helpers.fake_model import without_timings
from tests.helpers.pictures import text_picture
from tests.toy.spec import PRESETS

TASKS = ("tables_html", "chart2csv")
N_PAGES = 8
SETTINGS: dict[str, Any] = {"n_threads": 1, "parallel": 2, "max_tokens": 12, "device": "cpu", "n_ctx": 800}
DEADLY = "deadly"  # a file next to the model, with the digest of a page that kills the worker that reads it


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200 << 20)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def folder(make_model: Callable[..., Path]) -> Path:
    return make_model(PRESETS["tiny"], text_type="F16")


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PDF of six pages, a PNG and a BMP with the same pixels, and a broken document."""
    scans = tmp_path_factory.mktemp("scans")
    pages = [text_picture((60, 90), seed) for seed in range(N_PAGES - 1)]
    pages[0].save(scans / "a.pdf", save_all=True, append_images=pages[1:6], resolution=72)
    pages[6].save(scans / "b.png")
    pages[6].save(scans / "c.bmp")
    (scans / "d.pdf").write_bytes(b"%PDF-1.7 nothing more")
    return scans


@pytest.fixture(scope="module")
def whole(folder: Path, scans: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The records of a run in one process."""
    out = tmp_path_factory.mktemp("whole") / "out"
    list(extract(scans, TASKS, model=folder, out=out, **SETTINGS))
    return without_timings(out / "results.jsonl")


def find(name: str | Path | None, report: Callable[[str], None]) -> str | Path:
    """Resolves a model's name in a worker; this is where the tests change the worker's behaviour."""
    assert name is not None
    os.environ["WORKER_PIDS"] = str(Path(name).parent / "pids")
    with open(os.environ["WORKER_PIDS"], "a") as file:
        file.write(f"{os.getpid()}\n")
    deadly, question = Path(name).parent / DEADLY, ModelAsker.question

    def deadly_question(self: ModelAsker, page: Any, asked: Any) -> Any:
        if deadly.exists() and page.digest == deadly.read_text():
            os.kill(os.getpid(), signal.SIGKILL)
        return question(self, page, asked)

    ModelAsker.question = deadly_question  # type: ignore[method-assign]
    return name


def find_another(name: str | Path | None, report: Callable[[str], None]) -> str | Path:
    return Path(str(name)).parent / "another"


@pytest.fixture
def model(folder: Path, tmp_path: Path) -> OnRay:
    """A model on Ray, with a folder of its own."""
    (tmp_path / "model").symlink_to(folder)
    return OnRay("auto", tmp_path / "model", tmp_path / "model", find)


def start(model: OnRay, scans: Path, out: Path, **options: Any) -> Any:
    return extract(scans, TASKS, model=model, out=out, **{**SETTINGS, **options})


def test_records_are_those_of_one_process(
    cluster: None, model: OnRay, scans: Path, whole: list[dict[str, Any]], tmp_path: Path
) -> None:
    said: list[str] = []
    most: list[int] = []
    out = tmp_path / "out"
    found = list(start(model, scans, out, say=said.append, watch=lambda state: most.append(state.n_in_flight)))
    assert without_timings(out / "results.jsonl") == whole
    assert [record.key for record in found] == [(line["source"], line["page"], line["task"]) for line in whole]
    assert "reading with 2 workers on 1 node, with 1 core each" in said
    assert 2 <= max(most) <= 4 and len(set((tmp_path / "pids").read_text().split())) == 2
    assert not list(start(model, scans, out, resume=True))


def test_a_run_that_ended_early_goes_on(
    cluster: None, model: OnRay, scans: Path, folder: Path, whole: list[dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with start(model, scans, out) as run:
        next(run), next(run), next(run)
    n = len(without_timings(out / "results.jsonl"))
    assert 3 <= n < len(whole)
    assert len(list(extract(scans, TASKS, model=folder, out=out, resume=True, pages="1-3", **SETTINGS))) >= 1
    list(start(model, scans, out, resume=True))
    assert without_timings(out / "results.jsonl") == whole


def test_workers_that_are_killed_lose_nothing(
    cluster: None, model: OnRay, scans: Path, whole: list[dict[str, Any]], tmp_path: Path
) -> None:
    killed: list[int] = []

    def watch(state: State) -> None:
        pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
        if state.n_in_flight >= 2 and len(killed) < 2 and pids[-1] not in killed:
            killed.append(pids[-1])
            with contextlib.suppress(ProcessLookupError):
                os.kill(pids[-1], signal.SIGKILL)

    said: list[str] = []
    list(start(model, scans, tmp_path / "out", watch=watch, say=said.append))
    assert without_timings(tmp_path / "out/results.jsonl") == whole
    assert killed and sum("died" in line and "read again" in line for line in said) >= 1


def test_a_page_that_kills_its_worker_is_a_record(
    cluster: None, model: OnRay, scans: Path, whole: list[dict[str, Any]], tmp_path: Path
) -> None:
    deadly = whole[2 * len(TASKS)]["digest"]
    (tmp_path / DEADLY).write_text(deadly)
    out = tmp_path / "out"
    found = list(start(model, scans, out))
    dead = [record for record in found if record.error_type == "ProcessDied"]
    assert [record.key[1:] for record in dead] == [(3, task) for task in TASKS]
    assert all("died 3 times" in str(record.error) for record in dead)
    assert [record.text for record in found if record not in dead] == [
        line["text"] for line in whole if line["digest"] != deadly
    ]
    assert not list(start(model, scans, out, resume=True))
    (tmp_path / DEADLY).unlink()
    list(start(model, scans, out, resume=True, retry_failed=True))
    assert without_timings(out / "results.jsonl") == whole


def test_another_model_on_a_node_is_refused(
    cluster: None, folder: Path, make_model: Callable[..., Path], scans: Path, tmp_path: Path
) -> None:
    (tmp_path / "another").symlink_to(make_model(PRESETS["tiny"], text_type="F32"))
    (tmp_path / "model").symlink_to(folder)
    model = OnRay("auto", tmp_path / "model", tmp_path / "model", find_another)
    with pytest.raises(ModelFileError, match=r"on node '.+': '.+' is another text file than that of the process"):
        start(model, scans, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_version_on_a_node_is_refused(folder: Path) -> None:
    other = {**versions(), "llama-cpp-python": "0.0.1"}
    assignment = Assignment(folder, find_another, {}, (), ExtractOptions(**SETTINGS), None, other)
    with pytest.raises(DeviceError, match=r"llama-cpp-python .+ is installed here, but 0\.0\.1 where the run was"):
        asyncio.run(Worker(1).load(assignment))


def test_pages_on_their_way_take_a_bounded_part_of_the_object_store(cluster: None, model: OnRay) -> None:
    with RayModel(model, ExtractOptions(**SETTINGS)) as loaded:
        asked = questions(loaded, TASKS, None, None, unconstrained=True)
        asker = loaded.start(asked, model_hashes(loaded.files, print), None, print)
        assert asker.has_room
        for shade in range(2):
            pixels = np.full((3000, 3000, 3), shade, np.uint8)
            asker.sent(_Page(Image.from_pixels((3000, 3000), pixels.tobytes())))
        assert not asker.has_room


class _Page:
    def __init__(self, image: Image) -> None:
        self.image, self.digest = image, image.digest.hex()


@pytest.mark.parametrize("batch_format", ["default", "pandas", "pyarrow"])
def test_a_dataset_is_read(
    cluster: None, folder: Path, scans: Path, whole: list[dict[str, Any]], batch_format: str
) -> None:
    files = [str(path) for path in sorted(scans.iterdir())]
    paths = ray.data.from_items([{"path": path, "id": number} for number, path in enumerate([*files, None])])
    read = paths.map_batches(
        granite4v.DocumentReader,
        fn_constructor_args=(TASKS,),
        fn_constructor_kwargs={"model": folder, **SETTINGS},
        batch_format=batch_format,
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=1,
        batch_size=2,
    )
    rows = read.take_all()
    lost = [row for row in rows if row["id"] == len(files)]
    assert len(lost) == len(TASKS) and all("has no 'path'" in row["error"] for row in lost)
    found = sorted(
        (files[row["id"]], row["source"], row["page"] or 0, row["task"], row["text"]) for row in rows if row not in lost
    )
    assert found == sorted(
        (line["source"], line["source"], line["page"] or 0, line["task"], line["text"]) for line in whole
    )


def test_a_loaded_model_cannot_travel(scans: Path) -> None:
    with pytest.raises(ArgumentError, match="every node loads a model of its own"):
        granite4v.extract(scans, TASKS, model=object(), ray="auto")  # type: ignore[arg-type]
