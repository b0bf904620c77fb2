"""Tests of the placement of weights: by measurement, as far as memory allows, and without changing their values."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import granite4v
from granite4v.ggml import autotune
from granite4v.ggml.backend import Backend, buffer_type_name
from granite4v.ggml.gguf_file import GgufFile, TensorInfo
from granite4v.ggml.kernel_timing import Trial
from granite4v.ggml.kernels import BFLOAT16, COMPILED, PLAIN, Kernel
from granite4v.runtime.llama import placement
from granite4v.runtime.llama.placement import Copy, Placement, bytes_needed, choose_placement
from tests.helpers.pictures import text_picture
from tests.toy.spec import PRESETS

REPACK = "CPU_REPACK"


@pytest.fixture(scope="module")
def backend() -> Any:
    backend = Backend("cpu", 2)
    yield backend
    backend.close()


def tensors(*infos: tuple[str, tuple[int, ...], str]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, shape, kind, 0, 0) for name, shape, kind in infos}


def pretend(monkeypatch: pytest.MonkeyPatch, repack_s: dict[str, float]) -> None:
    """Fakes the measurement, for small files too: CPU_REPACK takes these seconds for each type, or forever; plain and
    compiled kernels take one."""

    def times(backend: Backend, wanted: list[Trial], *_: Any, **__: Any) -> dict[str, dict[str, dict[int, float]]]:
        found: dict[str, dict[str, dict[int, float]]] = {trial.type_name: {} for trial in wanted}
        for kind, name, n in wanted:
            found[kind].setdefault(name, {})[n] = 1.0 if name in (PLAIN, COMPILED) else repack_s.get(kind, math.inf)
        return found

    monkeypatch.setattr(autotune, "SMALL", 0)
    monkeypatch.setattr(autotune, "times", times)


WEIGHTS = tensors(
    ("blk.0.attn_q.weight", (256, 256), "Q4_0"),
    ("blk.1.attn_q.weight", (250, 256), "Q4_0"),  # repacking needs a multiple of eight rows
    ("blk.0.ffn_up.weight", (512, 256), "Q4_K"),
    ("blk.0.ffn_down.weight", (256, 512), "F16"),
    ("blk.0.attn_norm.weight", (256,), "F32"),
    ("token_embd.weight", (400, 256), "Q4_0"),
)


def names(placement: Placement, kernel: str) -> list[str]:
    return [copy.name for copy in placement.copies if copy.kernel == kernel]


def test_placement_follows_the_measurement(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    if REPACK not in [buffer_type_name(buffer_type) for buffer_type in backend.extra_buffer_types()]:
        pytest.skip("this ggml has no repack buffer type")
    pretend(monkeypatch, {"Q4_0": 0.5, "Q4_K": 0.99})
    monkeypatch.setattr(placement, "has_large_pages", lambda: False)
    found = choose_placement(WEIGHTS, backend)
    assert names(found, REPACK) == ["blk.0.attn_q.weight"] and found.n_copies == {REPACK: 1}
    assert found.copies[0].many and found.copies[0].few


def test_copies_for_a_few_rows_alone_are_not_made_where_steps_have_many(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    if REPACK not in [buffer_type_name(buffer_type) for buffer_type in backend.extra_buffer_types()]:
        pytest.skip("this ggml has no repack buffer type")
    buffer_type = next(each for each in backend.extra_buffer_types() if buffer_type_name(each) == REPACK)
    plain, repack = Kernel(PLAIN), Kernel(REPACK, buffer_type=buffer_type)
    monkeypatch.setattr(autotune, "SMALL", 0)
    monkeypatch.setattr(placement, "has_large_pages", lambda: False)
    for many, expected in ((repack, {REPACK: 1}), (plain, {})):
        monkeypatch.setattr(autotune, "text_kernels", lambda *_, many=many, **__: {"Q4_0": (many, repack)})
        assert choose_placement(WEIGHTS, backend).n_copies == {REPACK: 1}
        assert choose_placement(WEIGHTS, backend, for_many=True).n_copies == expected
    monkeypatch.setattr(placement, "has_large_pages", lambda: True)
    as_they_are = names(choose_placement(WEIGHTS, backend, for_many=True), buffer_type_name(backend.buffer_type))
    assert "blk.0.attn_q.weight" in as_they_are  # an unchanged copy, for steps of any number of rows


def test_large_pages_take_the_other_multiplied_weights(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {})
    monkeypatch.setattr(placement, "has_large_pages", lambda: True)
    plain = buffer_type_name(backend.buffer_type)
    found = choose_placement(WEIGHTS, backend)
    assert names(found, plain) == [name for name in WEIGHTS if "norm" not in name]  # the head is the token embedding
    assert all(copy.many and copy.few for copy in found.copies)
    untied = {**WEIGHTS, **tensors(("output.weight", (400, 256), "Q6_K"))}
    assert names(choose_placement(untied, backend), plain)[-1] == "output.weight"


def test_a_small_file_stays_mapped(backend: Backend) -> None:
    assert choose_placement(WEIGHTS, backend) == Placement()


def test_only_what_changes_values_is_arithmetic() -> None:
    both, few, plain = (
        Copy("b", "AMX", None),
        Copy("c", "CPU_REPACK", None, many=False),
        Copy("a", "CPU", None, is_plain=True),
    )
    found = Placement((plain, few, both))
    assert found.arithmetic(few=True) == [("b", "AMX", True, True), ("c", "CPU_REPACK", False, True)]
    assert found.arithmetic(few=False) == [("b", "AMX", True, False)]  # only batches of many rows
    assert Placement((plain,)).arithmetic(few=True) == Placement().arithmetic(few=True) == []


def test_bytes_needed_by_hand() -> None:
    def info(name: str, nbytes: int) -> TensorInfo:
        return TensorInfo(name, (1, nbytes), "Q8_0", 0, nbytes)

    every = {name: info(name, nbytes) for name, nbytes in (("a", 1), ("b", 10), ("c", 100), ("d", 1000))}
    copies = (Copy("b", "x", None), Copy("c", "x", None, many=False), Copy("d", "x", None, few=False))
    assert bytes_needed(every, ()) == 1111
    assert bytes_needed(every, copies) == 1110 + 1101  # the copies, and what is still read from the file: a, c and d


def test_what_memory_allows_is_copied(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """All copies if there is room, else those in faster buffer types, else none."""
    if REPACK not in [buffer_type_name(buffer_type) for buffer_type in backend.extra_buffer_types()]:
        pytest.skip("this ggml has no repack buffer type")
    every = {
        name: TensorInfo(name, (256, 256), kind, 0, nbytes)
        for name, kind, nbytes in (("blk.0.attn_q.weight", "Q4_0", 100), ("blk.0.attn_k.weight", "F16", 1000))
    }
    pretend(monkeypatch, {"Q4_0": 0.5})
    monkeypatch.setattr(placement, "has_large_pages", lambda: True)
    plain, spare = buffer_type_name(backend.buffer_type), placement.SPARE_BYTES
    for available, expected in (
        (None, {REPACK: 1, plain: 1}),
        (spare + 1100, {REPACK: 1, plain: 1}),
        (spare + 1099, {}),  # too little for the faster copy, too: the other weight would stay mapped
    ):
        monkeypatch.setattr(placement, "available_bytes", lambda available=available: available)
        assert choose_placement(every, backend).n_copies == expected, available


def test_a_small_model_is_widened_for_prompts_if_memory_allows(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = {"Q8_0": (Kernel(BFLOAT16, widened="BF16"), Kernel(PLAIN))}
    monkeypatch.setattr(autotune, "SMALL", 0)
    monkeypatch.setattr(autotune, "text_kernels", lambda *_, **__: kernels)
    monkeypatch.setattr(placement, "has_large_pages", lambda: True)
    name, plain = "blk.0.attn_q.weight", buffer_type_name(backend.buffer_type)
    every = {name: TensorInfo(name, (256, 256), "Q8_0", 0, 256 * 256 * 34 // 32)}
    needed = every[name].nbytes + 2 * 256 * 256  # the file is not read any more
    for spare, expected in ((needed, {BFLOAT16: 1, plain: 1}), (needed - 1, {plain: 1})):
        monkeypatch.setattr(placement, "available_bytes", lambda spare=spare: placement.SPARE_BYTES + spare)
        for for_many in (False, True):
            found = choose_placement(every, backend, for_many=for_many)
            assert found.n_copies == expected
    monkeypatch.setattr(placement, "available_bytes", lambda: None)
    copies = choose_placement(every, backend).copies
    assert [copy.widened for copy in copies] == [None, "BF16"] and not copies[1].few


def test_weights_rearranged_for_prompts_alone_are_in_large_pages_for_steps(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second copy cannot be dropped, so it needs twice the memory to spare. Copies of other weights come first."""
    repack = next((kind for kind in backend.extra_buffer_types() if buffer_type_name(kind) == REPACK), None)
    if repack is None:
        pytest.skip("this ggml has no repack buffer type")
    kernels = {"Q4_0": (Kernel(REPACK, buffer_type=repack), Kernel(PLAIN))}
    monkeypatch.setattr(autotune, "SMALL", 0)
    monkeypatch.setattr(autotune, "text_kernels", lambda *_, **__: kernels)
    monkeypatch.setattr(placement, "has_large_pages", lambda: True)
    every = {
        name: TensorInfo(name, (256, 256), kind, 0, nbytes)
        for name, kind, nbytes in (("blk.0.attn_q.weight", "Q4_0", 100), ("blk.0.attn_k.weight", "F16", 1000))
    }
    spare = placement.SPARE_BYTES
    for available, expected in (
        (None, [("Q4_0", True, False), ("Q4_0", False, True), ("F16", True, True)]),
        (2 * spare + 1200, [("Q4_0", True, False), ("Q4_0", False, True), ("F16", True, True)]),
        (2 * spare + 1199, [("Q4_0", True, False), ("F16", True, True)]),
        (spare + 1200, [("Q4_0", True, False), ("F16", True, True)]),
        (spare + 1199, []),
    ):
        monkeypatch.setattr(placement, "available_bytes", lambda available=available: available)
        copies = choose_placement(every, backend).copies
        assert [(every[copy.name].type_name, copy.many, copy.few) for copy in copies] == expected, available
        assert all(copy.is_plain == (copy.kernel != REPACK) for copy in copies)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q4_0", "IQ4_NL", "Q4_K_M"])
def test_rearranged_weights_give_the_same_answers(
    make_model: Callable[..., Path], backend: Backend, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    extra = {buffer_type_name(buffer_type): buffer_type for buffer_type in backend.extra_buffer_types()}
    base = kind.removesuffix("_M")
    if REPACK not in extra or not backend.multiplies(extra[REPACK], base, 256, 256):
        pytest.skip(f"this CPU does not repack {base}")
    if autotune.rates(backend, [base])[base].get(REPACK) is None:
        pytest.skip(f"repacked {base} crashes on this machine")
    folder, picture = make_model(PRESETS["tiny-wide"], kind, "F32"), text_picture((150, 100))
    found: list[np.ndarray] = []
    for repack_s in (2.0, 0.5):
        pretend(monkeypatch, {base: repack_s})
        with granite4v.load(folder, device="cpu") as model:
            found.append(model.logits("What is this?", [picture]))
            placed = model.settings["text_buffer_types"]
            assert (REPACK in placed) == (repack_s < 1)
    # Both round activations to 8 bits, in different ways: 3-4% on random weights. Wrong weights give 140%.
    assert np.linalg.norm(found[0] - found[1]) < 0.1 * np.linalg.norm(found[0])
    assert found[0].argmax() == found[1].argmax()


def test_a_real_measurement_is_kept_for_the_next_time(
    make_model: Callable[..., Path], backend: Backend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GRANITE4V_CACHE", str(tmp_path))
    monkeypatch.setattr(autotune, "SMALL", 0)
    monkeypatch.setattr(autotune, "BUDGET_S", 60.0)  # enough on a busy machine, too
    with GgufFile.open(make_model(PRESETS["tiny-wide"], "Q4_0", "F32") / "text-Q4_0.gguf") as file:
        first = choose_placement(file.tensors, backend)
        monkeypatch.setattr(autotune, "run_main", lambda *_, **__: pytest.fail("measured again"))
        assert choose_placement(file.tensors, backend).n_copies == first.n_copies


def test_exact_mode_places_nothing(make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {"Q4_0": 0.1})
    with granite4v.load(make_model(PRESETS["tiny-wide"], "Q4_0", "F32"), device="cpu", exact=True) as model:
        model.logits("x")
        assert model.settings["text_buffer_types"] == {}
