"""Tests of attention: what is compiled, and the rotary angles of exact contexts, which differ from llama.cpp's at far
positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from granite4v.ggml.compiled.nodes import NO_KERNELS, NodeKernels
from granite4v.runtime.engine.attention import Attention
from granite4v.runtime.llama.context import BatchRows, LlamaContext
from granite4v.runtime.llama.files import ModelFiles
from granite4v.runtime.llama.library import llama
from granite4v.runtime.llama.model import LlamaModel
from tests.toy.checkpoint import PRESETS, CheckpointSpec

needs_llvm = pytest.mark.skipif(not NodeKernels.available(rotary=True), reason="needs llvmlite")
SPECS = {
    "neighbours": PRESETS["tiny"],
    "neighbours, linear": replace(PRESETS["tiny-clip-llama"], rope_scaling=(("type", "linear"), ("factor", 4.0))),
    "halves": PRESETS["tiny-siglip-qwen2"],
}
TOKENS, FAR = np.arange(3, 43, dtype=np.int32), 30_000


def chosen(path: Path, prefers_flash: bool | None, device: str = "cpu") -> Attention:
    with ModelFiles.open(path) as files:
        return Attention.chosen(files, device, "f16", 512, 64, prefers_flash)


def context_of(model: LlamaModel, callback: Any) -> LlamaContext:
    return LlamaContext(model, FAR + 64, 64, 1, exact=True, node_callback=callback)


def logits(context: LlamaContext, tokens: np.ndarray, start: int) -> np.ndarray:
    rows = BatchRows.of(tokens, start, 0, output=True)
    rows.outputs[:] = True
    context.decode(rows)
    return np.stack([context.logits(i) for i in range(len(tokens))])


def test_what_is_compiled_depends_on_what_values_are_for(
    make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_model(PRESETS["tiny"])
    exact = chosen(path, None)
    assert (exact.cache_type, exact.flash, exact.kernels) == ("f32", False, NodeKernels.available(rotary=True))
    assert exact.kernels.most_rows is None  # a row's values do not depend on other rows
    assert exact.settings.get("compiled", "") == exact.kernels.description
    for prefers_flash in (True, False):
        assert not chosen(path, prefers_flash).kernels.rotary
    monkeypatch.setattr("granite4v.runtime.engine.parallel.is_cpu", lambda device: False)
    assert chosen(path, None).kernels == NO_KERNELS
    monkeypatch.undo()
    monkeypatch.setattr("granite4v.ggml.compiled.nodes.llvm", lambda: None)
    assert chosen(path, None).kernels == NO_KERNELS and chosen(path, None).node_callback is None


@needs_llvm
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_far_positions_are_transformers(
    spec: CheckpointSpec, load_reference: Callable[..., Any], make_model: Callable[..., Path]
) -> None:
    """Errors of logits up to 10 or 20: 2e-5 to 5e-5, as at position 0; with llama.cpp's angles 7e-4 to 8e-3."""
    places = torch.arange(FAR, FAR + len(TOKENS))[None]
    with torch.inference_mode():
        asked = torch.from_numpy(TOKENS[None].astype(np.int64))
        expected = load_reference(spec).model(input_ids=asked, position_ids=places).logits[0].numpy()
    path = make_model(spec)
    differences = []
    with LlamaModel(next(path.glob("text-*.gguf"))) as model:
        for callback in (chosen(path, None).node_callback, None):
            with context_of(model, callback) as context:
                differences.append(np.abs(logits(context, TOKENS, FAR) - expected).max())
    assert differences[0] <= 1e-4 and differences[1] > 5 * differences[0]


@needs_llvm
def test_steps_that_reuse_a_graph_have_their_own_positions(make_model: Callable[..., Path]) -> None:
    path = make_model(PRESETS["tiny"])
    with LlamaModel(path / "text-F32.gguf") as model:
        callback = chosen(path, None).node_callback
        with context_of(model, callback) as context, context_of(model, callback) as stepped:
            together = logits(context, TOKENS, FAR)
            single = [logits(stepped, TOKENS[i : i + 1], FAR + i)[0] for i in range(len(TOKENS))]
            assert llama().llama_perf_context(stepped.handle).n_reused > len(TOKENS) // 2
    np.testing.assert_allclose(single, together, rtol=0, atol=1e-4)
