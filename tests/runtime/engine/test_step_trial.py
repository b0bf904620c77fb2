"""Tests of measuring decode steps: once per machine and model, in a child process; the seconds are kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from granite4v.child import Ended, run_main
from granite4v.ggml import autotune
from granite4v.ggml.compiled.nodes import NO_KERNELS, NodeKernels
from granite4v.paths import cache_folder
from granite4v.runtime.engine import step_trial
from granite4v.runtime.engine.step_trial import NUMBERS, step_seconds
from granite4v.runtime.llama.files import ModelFiles
from tests.toy.spec import PRESETS


@pytest.fixture
def files(make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelFiles]:
    monkeypatch.setenv("GRANITE4V_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(autotune, "SMALL", 0)
    with ModelFiles.open(make_model(PRESETS["tiny"], "F16", "F16")) as files:
        yield files


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The arguments of the child processes that were started."""
    started: list[list[str]] = []

    def counted(module: str, arguments: list[str], *others: Any) -> Ended:
        started.append(arguments)
        return run_main(module, arguments, *others)

    monkeypatch.setattr(step_trial, "run_main", counted)
    return started


def test_measured_once_and_again_for_more(files: ModelFiles, children: list[list[str]]) -> None:
    announced: list[bool] = []
    found = step_seconds(files, 1, 3, lambda: announced.append(True))
    assert list(found) == [1, 2, 4] and all(0 < seconds < 60 for seconds in found.values())
    assert step_seconds(files, 1, 4, lambda: announced.append(True)) == found
    assert step_seconds(files, 1, 2) == found
    assert len(children) == len(announced) == 1
    assert list(step_seconds(files, 1, 5)) == [1, 2, 4, 8]
    assert len(children) == 2
    step_seconds(files, 2, 4)  # another number of threads
    assert len(children) == 3


def test_a_small_model_is_not_measured(
    files: ModelFiles, children: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autotune, "SMALL", 1 << 40)
    assert step_seconds(files, 1, 16) == {} and not children


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ("[1, 0.2]\n[4, 0.5]\n[1, 0.1]\n[4, 0.6]\n", {1: 0.1, 4: 0.5}),
        ("noise\n[1, -1]\n[2, null]\n[2]\n7\n[4, 0.5]", {4: 0.5}),
        ("", {}),
    ],
)
def test_what_a_child_prints(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch, printed: str, expected: dict[int, float]
) -> None:
    """The best of several rounds counts. What a child printed before a crash is used, and it is not started again."""
    started: list[str] = []

    def child(module: str, *_: Any) -> Ended:
        started.append(module)
        return Ended(-11, printed, "")

    monkeypatch.setattr(step_trial, "run_main", child)
    assert step_seconds(files, 1, 4) == step_seconds(files, 1, 4) == expected
    assert started == [step_trial.__name__]


def test_no_process_can_be_started(files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    def child(*_: Any) -> Ended:
        raise OSError("no memory")

    monkeypatch.setattr(step_trial, "run_main", child)
    assert step_seconds(files, 1, 4) == {}
    assert not (cache_folder() / step_trial.CACHE).exists()


@pytest.mark.parametrize("damage", [{"most": 32}, {"most": 32, "seconds": {"1": -1}}, [], {"most": "x", "seconds": {}}])
def test_a_damaged_cache_is_measured_again(files: ModelFiles, children: list[list[str]], damage: Any) -> None:
    assert list(step_seconds(files, 1, 1)) == [1]
    path = cache_folder() / step_trial.CACHE
    (key,) = json.loads(path.read_text())
    path.write_text(json.dumps({key: damage}))
    assert list(step_seconds(files, 1, 2)) == [1, 2]
    assert len(children) == 2 and json.loads(children[1][3]) == [n for n in NUMBERS if n <= 2]


@pytest.mark.skipif(not NodeKernels.available((16, 2)), reason="needs llvmlite and AVX-512")
def test_steps_with_compiled_kernels_are_measured_apart(files: ModelFiles, children: list[list[str]]) -> None:
    compiled = NodeKernels.available((16, 2), ["Q8_0"])
    for kernels in (NO_KERNELS, compiled, NO_KERNELS, compiled):
        assert list(step_seconds(files, 1, 1, kernels=kernels)) == [1]
    assert [NodeKernels.from_json(child[4]) for child in children] == [NO_KERNELS, compiled]
