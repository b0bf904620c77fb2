"""Tests of which matrix products of llama.cpp's graphs are compiled, for decode steps and prompts, by their bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from granite4v.ggml.compiled.nodes import NodeKernels
from granite4v.ggml.compiled.products import MOST_ROWS
from granite4v.ggml.compiled.prompt_products import LEAST_ROWS
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


def logits(context: LlamaContext, n_rows: int, *, is_prompt: bool) -> np.ndarray:
    """Returns the logits of the last row."""
    tokens = np.random.default_rng(0).integers(0, 200, n_rows).astype(np.int32)
    context.truncate(0, 0)
    context.decode(BatchRows.of(tokens, 0, 0, output=True), is_prompt=is_prompt)
    return context.logits(-1)


def test_rows_of_steps_have_the_same_bits_and_those_of_prompts_others(context: LlamaContext) -> None:
    n = LEAST_ROWS + 4
    tokens = np.random.default_rng(1).integers(0, 200, n).astype(np.int32)
    context.truncate(0, 0)
    one_by_one = []
    for i, token in enumerate(tokens):
        context.decode(BatchRows.of(np.array([token]), i, 0, output=True))
        one_by_one.append(context.logits(-1))
    found = {}
    for is_prompt in (False, True, False, True):  # llama.cpp reuses the graph
        context.truncate(0, 0)
        context.decode(BatchRows.of(tokens, 0, 0, output=True), is_prompt=is_prompt)
        before = found.setdefault(is_prompt, context.logits(-1))
        assert (context.logits(-1) == before).all()
    assert (found[False] == one_by_one[-1]).all() and (found[True] != found[False]).any()
    assert np.linalg.norm(found[True] - found[False]) < 0.1 * np.linalg.norm(found[False])


@pytest.mark.parametrize(
    ("n_rows", "differ"), [(1, False), (LEAST_ROWS - 1, False), (LEAST_ROWS, True), (MOST_ROWS, True), (100, False)]
)
def test_prompts_of_some_rows_are_multiplied_as_such(context: LlamaContext, n_rows: int, differ: bool) -> None:
    found = [logits(context, n_rows, is_prompt=is_prompt) for is_prompt in (False, True)]
    assert (found[0] != found[1]).any() == differ
