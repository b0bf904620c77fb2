"""Rows of steps and of prompts have the same bits where llama.cpp's graphs have compiled products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from granite4v.ggml.compiled.nodes import NodeKernels
from granite4v.runtime.llama.context import BatchRows, LlamaContext, node_callback
from granite4v.runtime.llama.model import LlamaModel
from tests.toy.spec import PRESETS

KERNELS = NodeKernels.available(kinds=["Q4_0"])
pytestmark = pytest.mark.skipif(not KERNELS, reason="needs llvmlite and AVX-512 VNNI")


@pytest.fixture(scope="module")
def context(make_model: Callable[..., Path]) -> Iterator[LlamaContext]:
    path = make_model(PRESETS["tiny-wide"], "Q4_0", "F32") / "text-Q4_0.gguf"
    callback = node_callback(KERNELS)
    with LlamaModel(path) as model, LlamaContext(model, 256, 128, 1, node_callback=callback) as context:
        yield context


@pytest.mark.parametrize("n", [5, 24, 60])
def test_rows_of_steps_and_of_prompts_have_the_same_bits(context: LlamaContext, n: int) -> None:
    tokens = np.random.default_rng(1).integers(0, 200, n).astype(np.int32)
    context.truncate(0, 0)
    one_by_one = []
    for i, token in enumerate(tokens):
        context.decode(BatchRows.of(np.array([token]), i, 0, output=True))
        one_by_one.append(context.logits(-1))
    for is_prompt in (False, True, False, True):  # llama.cpp uses the graph again
        context.truncate(0, 0)
        context.decode(BatchRows.of(tokens, 0, 0, output=True), is_prompt=is_prompt)
        assert (context.logits(-1) == one_by_one[-1]).all()
