"""Choosing kernels: the rules of the image side and the text side, and measured times that are cached and survive
crashes."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from granite4v.child import Ended
from granite4v.ggml import autotune
from granite4v.ggml.autotune import SMALL, WORTH, cache_key, fastest_kernel, fastest_pair, page_seconds, times
from granite4v.ggml.backend import Aborted, Backend
from granite4v.ggml.kernel_timing import MANY, Trial
from granite4v.ggml.kernels import ATTENTION, BFLOAT16, FLOAT32, N_OUT, ONEDNN, ONEDNN_BF16, PLAIN, Kernel, n_in
from granite4v.ggml.types import NO_WEIGHTS, TYPES, block_size
from granite4v.runtime.llama.abort import AbortFlag
from tests.helpers import faulty_kernels

REPACK = "CPU_REPACK"
BIG = 10 * SMALL
Fake = Mapping[str, Mapping[str, float]]


@pytest.fixture
def backend() -> Iterator[Backend]:
    backend = Backend("cpu", 2)
    yield backend
    backend.close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRANITE4V_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / autotune.CACHE


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ggml with two special buffer types, whatever this CPU has."""
    offered = {name: Kernel(name, buffer_type=f"type of {name}") for name in (REPACK, "AMX")}
    offered = {PLAIN: Kernel(PLAIN), FLOAT32: Kernel(FLOAT32, widened="F32"), **offered}
    monkeypatch.setattr(autotune, "available_kernels", lambda backend, kind: offered)


def times_of(measured: Fake) -> Callable[..., dict[str, dict[str, dict[int, float]]]]:
    """Returns a replacement for `times`: every number of rows takes the same time, and kernels without a value were not
    measured."""

    def fake(backend: Backend, wanted: Sequence[Trial], *_: Any, **__: Any) -> dict[str, dict[str, dict[int, float]]]:
        found: dict[str, dict[str, dict[int, float]]] = {trial.type_name: {} for trial in wanted}
        for kind, name, n in wanted:
            if name in measured.get(kind, {}):
                found[kind].setdefault(name, {})[n] = measured[kind][name]
        return found

    return fake


# --- the rules ---


def test_the_image_side_prefers_the_exact_kernel_among_equals() -> None:
    assert fastest_kernel({PLAIN: 1.00, FLOAT32: 1.03}) == FLOAT32
    assert fastest_kernel({PLAIN: 1.5, FLOAT32: 1.2, REPACK: 1.0, "AMX": math.inf}) == REPACK
    assert fastest_kernel({PLAIN: 0.5, FLOAT32: 1.0}) == PLAIN
    assert fastest_kernel({PLAIN: math.inf, FLOAT32: 1.0}) == FLOAT32
    assert fastest_kernel({PLAIN: math.inf, "AMX": math.inf}) == PLAIN
    assert fastest_kernel({REPACK: 1.0}) == PLAIN  # nothing to compare it with
    assert fastest_kernel({}) == PLAIN


Rows = dict[int, float]


def rows(many: float, few: float) -> Rows:
    return {MANY: many, 4: 4 * few, 1: few}


def test_a_page_is_prefilled_and_then_decoded() -> None:
    """1,200 rows in batches of 512; 150 tokens alone and 150 in batches of four."""
    measured = {PLAIN: {MANY: 0.512, 1: 1e-3, 4: 4e-3}, REPACK: {MANY: 1.024, 1: 0.5e-3, 4: 1e-3}, "AMX": {MANY: 0.1}}
    assert page_seconds(measured, PLAIN, PLAIN) == pytest.approx(1.2 + 0.15 + 0.15)
    assert page_seconds(measured, REPACK, REPACK) == pytest.approx(2.4 + 0.075 + 0.0375)
    assert page_seconds(measured, PLAIN, REPACK) == pytest.approx(1.2 + 0.075 + 0.0375)
    assert page_seconds(measured, "AMX", PLAIN) == pytest.approx(0.234375 + 0.15 + 0.15)
    assert page_seconds(measured, "AMX", "AMX") == page_seconds(measured, "unknown", PLAIN) == math.inf


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        ({PLAIN: rows(1, 0.01), REPACK: rows(0.5, 0.005)}, (REPACK, REPACK)),
        ({PLAIN: rows(1, 0.01), REPACK: rows(2, 0.005)}, (PLAIN, REPACK)),
        ({PLAIN: rows(1, 0.01), REPACK: rows(0.5, 0.02)}, (REPACK, PLAIN)),
        ({PLAIN: rows(1, 0.01), REPACK: rows(WORTH + 0.01, 0.01 * WORTH + 1e-4)}, (PLAIN, PLAIN)),  # not worth it
        ({PLAIN: rows(1, 0.01), REPACK: rows(1.5, 0.02)}, (PLAIN, PLAIN)),
        # another program made many rows five times as slow: the gain for few rows still shows
        ({PLAIN: rows(5, 0.01), REPACK: rows(10, 0.009)}, (PLAIN, REPACK)),
        ({PLAIN: rows(1, 0.01), REPACK: rows(math.inf, math.inf)}, (PLAIN, PLAIN)),  # its kernel crashed
        ({PLAIN: rows(1, 0.01), REPACK: rows(2, 0.006), "AMX": rows(0.2, 0.02)}, ("AMX", PLAIN)),  # one copy, not two
        ({PLAIN: rows(1, 0.01), REPACK: rows(0.6, 0.006), "AMX": rows(math.inf, 0.001)}, (PLAIN, "AMX")),
        ({PLAIN: rows(math.inf, math.inf), REPACK: rows(1, 0.01)}, (REPACK, REPACK)),
        ({PLAIN: rows(1, 0.01), FLOAT32: rows(0.1, 0.001)}, (PLAIN, PLAIN)),  # not one of llama.cpp's kernels
        ({PLAIN: {MANY: 1.0}, REPACK: rows(0.1, 0.001)}, (PLAIN, PLAIN)),  # nothing to compare it with
        ({PLAIN: rows(1, 0.01)}, (PLAIN, PLAIN)),
        ({}, (PLAIN, PLAIN)),
    ],
)
def test_the_text_side_takes_the_fastest_pair_if_it_is_worth_it(
    measured: dict[str, Rows], expected: tuple[str, str]
) -> None:
    assert fastest_pair(measured, (REPACK, "AMX")) == expected


@pytest.mark.usefixtures("kernels")
def test_both_sides_choose_from_the_same_times(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {
        "Q4_0": {PLAIN: 1.0, FLOAT32: 1.0, REPACK: 0.5, "AMX": math.inf},
        "F16": {PLAIN: 1.0, FLOAT32: 0.5, REPACK: 3.0, "AMX": math.inf},
        "Q8_0": {PLAIN: 1.0, FLOAT32: 2.0, REPACK: 0.95},
    }
    monkeypatch.setattr(autotune, "times", times_of(measured))
    n_weights = {**dict.fromkeys(measured, BIG), "F32": BIG}
    vision, text = autotune.vision_kernels(backend, n_weights), autotune.text_kernels(backend, n_weights)
    assert {kind: kernel.name for kind, kernel in vision.items()} == {"Q4_0": REPACK, "F16": FLOAT32, "Q8_0": REPACK}
    assert {kind: (many.name, few.name) for kind, (many, few) in text.items()} == {"Q4_0": (REPACK, REPACK)}
    assert vision["F16"].widened == "F32" and vision["F16"].buffer_type is None
    assert text["Q4_0"][0].buffer_type == f"type of {REPACK}"


@pytest.mark.usefixtures("kernels")
def test_prefill_and_decoding_may_use_two_kernels(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    by_rows = {"Q4_K": {PLAIN: rows(1.0, 0.01), REPACK: rows(1.9, 0.006)}}
    monkeypatch.setattr(autotune, "times", lambda *_, **__: by_rows)
    many, few = autotune.text_kernels(backend, {"Q4_K": BIG})["Q4_K"]
    assert (many.name, many.buffer_type, few.name, few.buffer_type) == (PLAIN, None, REPACK, f"type of {REPACK}")


@pytest.mark.usefixtures("kernels")
def test_a_small_model_is_widened_for_prompts_alone(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "prompt_kernels", lambda _: {BFLOAT16: Kernel(BFLOAT16, widened="BF16")})
    asked: list[Trial] = []
    measured = {"Q8_0": {PLAIN: 1.0, BFLOAT16: 0.5, FLOAT32: 0.1, REPACK: 1.0}}

    def fake(backend: Backend, wanted: Sequence[Trial], *rest: Any) -> Any:
        asked.extend(wanted)
        return times_of(measured)(backend, wanted)

    monkeypatch.setattr(autotune, "times", fake)
    many, few = autotune.text_kernels(backend, {"Q8_0": BIG})["Q8_0"]
    assert (many.name, many.widened, few.name) == (BFLOAT16, "BF16", PLAIN)
    assert [trial.n_rows for trial in asked if trial.kernel == BFLOAT16] == [MANY]
    asked.clear()
    assert autotune.text_kernels(backend, {"Q8_0": autotune.MOST_WIDENED // 2 + 1}) == {}
    assert BFLOAT16 not in {trial.kernel for trial in asked} and asked


@pytest.mark.usefixtures("kernels")
def test_a_small_file_is_multiplied_as_it_is(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the cache contains: the results must not depend on it."""
    monkeypatch.setattr(autotune, "times", times_of({"F16": {PLAIN: 1.0, REPACK: 0.1}}))
    for choose in (autotune.vision_kernels, autotune.text_kernels):
        assert choose(backend, {"F16": SMALL - 1}) == {}
        assert "F16" in choose(backend, {"F16": SMALL})


@pytest.mark.usefixtures("kernels")
def test_a_type_of_few_weights_is_not_measured(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[str] = []
    fake = times_of({"F16": {PLAIN: 1.0}, "Q8_0": {PLAIN: 1.0}})
    monkeypatch.setattr(
        autotune,
        "times",
        lambda backend, trials, *rest, **more: wanted.extend(t.type_name for t in trials) or fake(backend, trials),
    )
    autotune.vision_kernels(backend, {"F16": BIG // 100, "Q8_0": BIG, "F32": BIG // 10})
    assert "Q8_0" in wanted and "F16" not in wanted


def test_exact_weights_are_not_rounded_unless_that_is_asked_for(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered = {
        PLAIN: Kernel(PLAIN),
        ONEDNN: Kernel(ONEDNN, arithmetic="F32"),
        ONEDNN_BF16: Kernel(ONEDNN_BF16, arithmetic="BF16"),
    }
    monkeypatch.setattr(autotune, "available_kernels", lambda *_: dict(offered))
    by_name = {PLAIN: 3.0, ONEDNN: 2.0, ONEDNN_BF16: 1.0}
    monkeypatch.setattr(autotune, "times", times_of(dict.fromkeys(("F32", "F16", "BF16", "Q8_0", ATTENTION), by_name)))

    def chosen(rounding: bool, *types: str) -> list[str]:
        kernels = autotune.vision_kernels(backend, dict.fromkeys(types, BIG), rounding=rounding)
        assert list(kernels) == [*sorted(types), ATTENTION]
        return [kernel.name for kernel in kernels.values()]

    assert chosen(False, "F32") == chosen(False, "F16") == [ONEDNN, ONEDNN]
    assert chosen(False, "BF16") == chosen(False, "Q8_0") == [ONEDNN_BF16, ONEDNN_BF16]
    assert chosen(False, "BF16", "F16") == [ONEDNN_BF16, ONEDNN, ONEDNN]
    assert chosen(True, "F16", "F32") == [ONEDNN_BF16, ONEDNN_BF16, ONEDNN_BF16]


def test_rates_tell_a_crash_from_what_is_not_known(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, kernels: None
) -> None:
    monkeypatch.setattr(autotune, "times", times_of({"F16": {PLAIN: 0.02, "AMX": math.inf}, "Q6_K": {}}))
    flop = 2 * 1152 * N_OUT * MANY
    assert autotune.rates(backend, ["F16", "Q6_K"]) == {
        "F16": {PLAIN: pytest.approx(flop / 0.02 / 1e9), "AMX": None},
        "Q6_K": {},
    }


# --- measuring ---


def trials(*names: str, kind: str = "Q4_0", rows: Sequence[int] = (MANY,)) -> list[Trial]:
    return [Trial(kind, name, n) for n in rows for name in names]


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[[], list[int]]]:
    """Replaces what the kernels do in the child. Returns a function that lists the process ids of the children so
    far."""

    def replace(**does: float | str) -> Callable[[], list[int]]:
        log = tmp_path / "children"
        log.write_text("")
        monkeypatch.setenv("FAULTY_KERNELS", json.dumps(does))
        monkeypatch.setenv("FAULTY_KERNELS_LOG", str(log))
        monkeypatch.setattr(autotune, "kernel_timing", SimpleNamespace(__name__=faulty_kernels.__name__))
        return lambda: [int(line) for line in log.read_text().split()]

    return replace


def test_one_child_measures_all(backend: Backend, cache: Path, faulty: Any) -> None:
    children = faulty(plain=2.0, AMX=1.0)
    wanted = trials(PLAIN, "AMX", rows=(MANY, 1)) + trials(PLAIN, kind="F16")
    found = times(backend, wanted, 60.0)
    assert found == {
        "Q4_0": {PLAIN: {MANY: 2.0 * MANY, 1: 2.0}, "AMX": {MANY: MANY, 1: 1.0}},
        "F16": {PLAIN: {MANY: 2.0 * MANY}},
    }
    assert len(children()) == 1
    assert times(backend, wanted, 60.0) == found and len(children()) == 1  # from the cache
    assert times(backend, [*wanted, Trial("F16", "AMX", 1)], 60.0)["F16"]["AMX"] == {1: 1.0} and len(children()) == 2


def test_a_kernel_that_ends_its_process_counts_as_crashed_and_the_others_are_measured(
    backend: Backend, cache: Path, faulty: Any
) -> None:
    children = faulty(plain=2.0, AMX="abort", CPU_REPACK=1.0, VNNI="abort")
    wanted = trials(PLAIN, "AMX", REPACK, "VNNI", rows=(MANY, 1))
    expected = {
        PLAIN: {MANY: 2.0 * MANY, 1: 2.0},
        "AMX": {MANY: math.inf, 1: math.inf},  # one crash is enough
        REPACK: {MANY: MANY, 1: 1.0},
        "VNNI": {MANY: math.inf, 1: math.inf},
    }
    assert times(backend, wanted, 60.0) == {"Q4_0": expected}
    assert len(children()) == 3
    assert times(backend, wanted, 60.0) == {"Q4_0": expected} and len(children()) == 3  # not tried again


def test_the_budget_ends_a_kernel_that_hangs(backend: Backend, cache: Path, faulty: Any) -> None:
    children = faulty(plain=2.0, AMX="hang", CPU_REPACK=1.0)
    announced: list[int] = []
    start = time.monotonic()
    found = times(backend, trials(PLAIN, "AMX", REPACK), 4.0, lambda: announced.append(1))
    assert time.monotonic() - start < 30  # a hanging kernel sleeps for 60
    assert found == {"Q4_0": {PLAIN: {MANY: 2.0 * MANY}}} and announced == [1]
    assert not is_alive(children()[0])
    assert set(json.loads(cache.read_text())[cache_key(2)]) == {f"Q4_0 plain {MANY}"}  # the others next time


def test_aborting_ends_the_measurement(cache: Path, faulty: Any) -> None:
    children, flag = faulty(plain="hang"), AbortFlag()
    backend = Backend("cpu", 1, (flag.callback_address, flag.data_address))

    def abort() -> None:
        while not children():
            time.sleep(0.02)
        flag.raise_()

    thread = threading.Thread(target=abort)
    thread.start()
    try:
        with pytest.raises(Aborted):
            times(backend, trials(PLAIN), 50.0)
    finally:
        thread.join()
        backend.close()
    assert not is_alive(children()[0]) and not cache.exists()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("ended", "expected"),
    [
        (Ended(-int(signal.SIGKILL), "[0]\n[0, 1.0]\n[1]\n", ""), {PLAIN: 1.0}),  # killed by the out-of-memory killer
        (Ended(1, "[0]\n[0, 1.0]\n[1]\n", "MemoryError"), {PLAIN: 1.0}),
        (Ended(0, "[0]\n[0, 1.0]\n[1]\n[1, null]\n", ""), {PLAIN: 1.0}),
        (Ended(0, "[0]\n[0, 3.0]\n[1]\n[1, 2.0]\n[0]\n[0, 1.0]\n[1]\n[1, 2.5]\n", ""), {PLAIN: 1.0, "AMX": 2.0}),
        (Ended(0, "", ""), {}),
        (Ended(0, 'noise\n[0, "fast"]\n[0, -1]\n[7, 1.0]\n{}\n[0, true]\n[]\n', ""), {}),
        (Ended(0xC0000005, "[0]\n[0, 1.0]\n[1]\n", ""), {PLAIN: 1.0, "AMX": math.inf}),  # Windows
    ],
)
def test_what_a_child_says(
    backend: Backend, cache: Path, monkeypatch: pytest.MonkeyPatch, ended: Ended, expected: dict[str, float]
) -> None:
    monkeypatch.setattr(autotune, "run_main", lambda *_, **__: ended)
    found = times(backend, trials(PLAIN, "AMX"), 60.0)["Q4_0"]
    assert {name: rows[MANY] for name, rows in found.items()} == expected


def test_without_a_child_nothing_is_known(backend: Backend, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> Ended:
        raise OSError("no memory")

    monkeypatch.setattr(autotune, "run_main", refuse)
    assert times(backend, trials(PLAIN), 60.0) == {"Q4_0": {}}
    assert autotune.vision_kernels(backend, {"Q4_0": BIG}) == {} == autotune.text_kernels(backend, {"Q4_0": BIG})


def test_a_real_child_measures(backend: Backend, cache: Path) -> None:
    found = times(backend, [*trials(PLAIN, rows=(MANY, 4, 1)), *trials(FLOAT32, kind="F16")], 60.0)
    assert set(found["Q4_0"][PLAIN]) == {MANY, 4, 1} and 0 < found["F16"][FLOAT32][MANY] < 60
    assert found["Q4_0"][PLAIN][1] < found["Q4_0"][PLAIN][MANY]  # seconds of one matrix, not of all


def test_damaged_caches_are_measured_again(backend: Backend, cache: Path, faulty: Any) -> None:
    faulty(plain=1.0)
    key, name, rows = cache_key(2), f"Q4_0 plain {MANY}", {PLAIN: {MANY: float(MANY)}}
    cache.parent.mkdir()
    for damaged in ("{ damaged", "[]", {key: 5}, {key: {name: "fast"}}, {key: {name: -1.0}}, {key: {name: math.nan}}):
        cache.write_text(damaged if isinstance(damaged, str) else json.dumps(damaged))
        assert times(backend, trials(PLAIN), 60.0) == {"Q4_0": rows}
        assert json.loads(cache.read_text())[key][name] == MANY


def test_new_times_replace_old_ones_on_request(backend: Backend, cache: Path, faulty: Any) -> None:
    faulty(plain=1.0, AMX="abort")
    times(backend, trials(PLAIN, "AMX"), 60.0)
    faulty(plain=2.0, AMX=1.0)
    found = times(backend, trials(PLAIN, "AMX"), 60.0, anew=True)
    assert found == {"Q4_0": {PLAIN: {MANY: 2.0 * MANY}, "AMX": {MANY: 1.0 * MANY}}}
    assert times(backend, trials(PLAIN, "AMX"), 60.0) == found


def test_rows_are_whole_blocks_of_every_type() -> None:
    for name in TYPES.keys() - NO_WEIGHTS:
        assert n_in(name) % block_size(name) == 0, name


def test_a_second_form_in_memory_must_be_worth_it() -> None:
    """Plain weights for steps of a few rows, in addition to other ones for prompts, only if the single form is
    slower."""
    measured = {"plain": {512: 200.0, 1: 1.0, 4: 1.0}, "other": {512: 100.0, 1: 1.02, 4: 1.02}}
    assert fastest_pair(measured, ["other"]) == ("other", "other")
    measured["other"].update({1: 1.4, 4: 1.4})
    assert fastest_pair(measured, ["other"]) == ("other", "plain")
