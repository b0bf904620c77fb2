"""Where weights go: taken from measurements, written as patterns that match exactly, and equal in value."""

from __future__ import annotations

import math
import re
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
from granite4v.ggml.kernels import PLAIN
from granite4v.runtime.llama.placement import Placement, choose_placement, tensor_patterns
from tests.helpers.pictures import text_picture
from tests.toy.spec import PRESETS

REPACK = "CPU_REPACK"


def test_patterns_match_these_tensors_and_no_others() -> None:
    parts = ("attn_q", "attn_k", "ffn_down", "ffn_up")
    every = [f"blk.{i}.{part}.weight" for i in range(13) for part in parts]
    chosen = tuple(n for n in every if "ffn_down" not in n or n.startswith(("blk.1.", "blk.11.")))
    patterns = tensor_patterns(chosen)
    assert len(patterns) == 2
    others = ["token_embd.weight", "output.weight", "blk.1.attn_q.weight.lora_a", "blk.1.attn_q_norm.weight"]
    matched = [name for name in [*every, *others] if any(re.search(pattern, name) for pattern in patterns)]
    assert sorted(matched) == sorted(chosen)


def test_a_tensor_outside_the_blocks_has_no_pattern() -> None:
    with pytest.raises(ValueError, match="'token_embd.weight' is not a block weight"):
        tensor_patterns(("token_embd.weight",))


@pytest.fixture(scope="module")
def backend() -> Any:
    backend = Backend("cpu", 2)
    yield backend
    backend.close()


def tensors(*infos: tuple[str, tuple[int, ...], str]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, shape, kind, 0, 0) for name, shape, kind in infos}


def pretend(monkeypatch: pytest.MonkeyPatch, repack_s: dict[str, float]) -> None:
    """Lets small files be measured, with these seconds of CPU_REPACK for each type; plain kernels take one."""

    def times(backend: Backend, wanted: list[Trial], *_: Any, **__: Any) -> dict[str, dict[str, dict[int, float]]]:
        found: dict[str, dict[str, dict[int, float]]] = {trial.type_name: {} for trial in wanted}
        for kind, name, n in wanted:
            found[kind].setdefault(name, {})[n] = 1.0 if name == PLAIN else repack_s.get(kind, math.inf)
        return found

    monkeypatch.setattr(autotune, "SMALL", 0)
    monkeypatch.setattr(autotune, "times", times)


def test_placement_follows_the_measurement(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    extra = [buffer_type_name(buffer_type) for buffer_type in backend.extra_buffer_types()]
    if REPACK not in extra:
        pytest.skip("this ggml has no repack buffer type")
    pretend(monkeypatch, {"Q4_0": 0.5, "Q4_K": 0.99})
    placement = choose_placement(
        tensors(
            ("blk.0.attn_q.weight", (256, 256), "Q4_0"),
            ("blk.1.attn_q.weight", (250, 256), "Q4_0"),  # rows do not come in the eights that repacking takes
            ("blk.0.ffn_up.weight", (512, 256), "Q4_K"),
            ("blk.0.ffn_down.weight", (256, 512), "F16"),
            ("blk.0.attn_norm.weight", (256,), "F32"),
            ("token_embd.weight", (400, 256), "Q4_0"),
        ),
        backend,
    )
    assert placement.tensors == {REPACK: ("blk.0.attn_q.weight",)}
    assert placement.overrides()[0].pattern == rb"^blk\.(0)\.(attn_q)\.weight$"


def test_nothing_to_place_is_no_override() -> None:
    assert Placement().overrides() is None


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
            assert bool(placed) == (repack_s < 1) and model.settings["mmap"] == (repack_s > 1)
    # Both round activations to 8 bits, each in its own way: 3-4% on random weights. Wrong weights give 140%.
    assert np.linalg.norm(found[0] - found[1]) < 0.1 * np.linalg.norm(found[0])
    assert found[0].argmax() == found[1].argmax()


def test_a_real_measurement_is_kept_for_the_next_time(
    make_model: Callable[..., Path], backend: Backend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GRANITE4V_CACHE", str(tmp_path))
    monkeypatch.setattr(autotune, "SMALL", 0)
    with GgufFile.open(make_model(PRESETS["tiny-wide"], "Q4_0", "F32") / "text-Q4_0.gguf") as file:
        first = choose_placement(file.tensors, backend)
        monkeypatch.setattr(autotune, "run_main", lambda *_, **__: pytest.fail("measured again"))
        assert choose_placement(file.tensors, backend).tensors == first.tensors


def test_exact_mode_places_nothing(make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {"Q4_0": 0.1})
    with granite4v.load(make_model(PRESETS["tiny-wide"], "Q4_0", "F32"), device="cpu", exact=True) as model:
        model.logits("x")
        assert model.settings["text_buffer_types"] == {}
