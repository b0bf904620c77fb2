"""Tests of copies of weights: found in llama.cpp, used for the right batches, equal in value, and freed."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from granite4v.errors import DeviceError
from granite4v.ggml.backend import Arena, Backend, buffer_type_name
from granite4v.ggml.compiled.nodes import NodeKernels
from granite4v.ggml.compiled.products import MOST_FLOAT_ROWS
from granite4v.ggml.gguf_file import GgufFile
from granite4v.runtime.llama.context import BatchRows, LlamaContext
from granite4v.runtime.llama.model import LlamaModel
from granite4v.runtime.llama.placement import Copy, Placement
from granite4v.runtime.llama.weight_copies import MAX_FEW_ROWS, open_model, weight_tensors
from tests.toy.spec import PRESETS

KERNELS = NodeKernels.available((64, 2), ["Q8_0"])
MANY = MAX_FEW_ROWS + 1


@pytest.fixture(scope="module")
def path(make_model: Callable[..., Path]) -> Path:
    return make_model(PRESETS["tiny-wide"], "Q4_0", "F32") / "text-Q4_0.gguf"


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    backend = Backend("cpu", 1)
    yield backend
    backend.close()


def blocks(path: Path) -> list[str]:
    with GgufFile.open(path) as file:
        return [name for name, info in file.tensors.items() if name.startswith("blk.") and len(info.shape) == 2]


def plain_copies(path: Path, backend: Backend, **forms: bool) -> Placement:
    return Placement(tuple(Copy(name, "CPU", backend.buffer_type, **forms) for name in blocks(path)))


def logits(model: LlamaModel) -> np.ndarray:
    """Returns the logits of a prompt of many rows and of two single rows after it."""
    rng, found = np.random.default_rng(0), []
    with LlamaContext(model, 256, 128, 1) as context:
        position = 0
        for n in (MANY, 1, 1):
            tokens = rng.integers(0, model.n_vocab, n).astype(np.int32)
            context.decode(BatchRows.of(tokens, position, 0, output=True), is_prompt=n > 1)
            found.append(context.logits(-1))
            position += n
    return np.stack(found)


def test_every_multiplied_weight_is_found(path: Path) -> None:
    with LlamaModel(path) as model, GgufFile.open(path) as file:
        found = weight_tensors(model)
        assert found.keys() >= set(blocks(path)) | {"token_embd.weight"}
        for name, tensor in found.items():
            assert tuple(n for n in reversed(tensor.contents.ne) if n > 1) == file.tensors[name].shape
        assert weight_tensors(model).keys() == found.keys()  # the first call changed nothing


def test_copies_as_they_are_change_no_bit(path: Path, backend: Backend) -> None:
    with LlamaModel(path) as model:
        expected = logits(model)
    for forms in ({}, {"many": False}, {"few": False}):
        with open_model(path, plain_copies(path, backend, **forms), n_threads=2) as model:
            assert (logits(model) == expected).all(), forms


@pytest.mark.parametrize("many", [True, False])
@pytest.mark.parametrize("few", [True, False])
def test_a_batch_is_multiplied_in_the_form_for_its_rows(path: Path, backend: Backend, many: bool, few: bool) -> None:
    with open_model(path, plain_copies(path, backend, many=many, few=few)) as model:
        tensor = weight_tensors(model)["blk.0.attn_q.weight"]

        def where(n_rows: int) -> int:
            with model.multiplying(n_rows):
                return int(tensor.contents.data)

        places = {n: where(n) for n in (MANY, 1, MAX_FEW_ROWS, 500, 1)}
        assert places[MANY] == places[500] and places[1] == places[MAX_FEW_ROWS]
        assert (places[MANY] == places[1]) == (many == few)


def test_rearranged_copies_of_a_few_rows_leave_the_prompt_as_it_is(path: Path, backend: Backend) -> None:
    repack = [each for each in backend.extra_buffer_types() if buffer_type_name(each) == "CPU_REPACK"]
    if not repack or not backend.multiplies(repack[0], "Q4_0", 256, 256):
        pytest.skip("this CPU does not repack Q4_0")
    with LlamaModel(path) as model:
        plain = logits(model)
    copies = tuple(Copy(name, "CPU_REPACK", repack[0], many=False) for name in blocks(path))
    with open_model(path, Placement(copies)) as model:
        mixed = logits(model)
    assert (mixed[0] == plain[0]).all()
    assert np.linalg.norm(mixed[1:] - plain[1:]) < 0.1 * np.linalg.norm(plain[1:])  # wrong weights give 140%


def test_widened_copies_are_for_prompts_and_more_exact(make_model: Callable[..., Path], backend: Backend) -> None:
    """Q8_0 rounds the rows of a prompt to 8-bit integers, bfloat16 rounds them and the weights to eight bits each."""
    path = make_model(PRESETS["tiny-wide"], "Q8_0", "F32") / "text-Q8_0.gguf"
    copies = tuple(
        Copy(name, kernel, backend.buffer_type, few=widened is None, is_plain=widened is None, widened=widened)
        for kernel, widened in (("CPU", None), ("bfloat16", "BF16"))
        for name in blocks(path)
    )

    tokens = np.random.default_rng(1).integers(0, 200, MOST_FLOAT_ROWS + 1).astype(np.int32)
    one, short, prompt = (BatchRows.of(tokens[:n], 0, 0, output=True) for n in (1, MANY, MOST_FLOAT_ROWS + 1))
    step = dataclasses.replace(short, outputs=np.ones(MANY, dtype=bool))  # drafts, of which all logits are wanted

    def run(placement: Placement) -> np.ndarray:
        with open_model(path, placement, n_threads=2) as model, LlamaContext(model, 256, 128, 1) as context:
            found = []
            for _ in range(2):  # switches the weights back and forth
                for rows in (one, short, step, prompt):
                    context.decode(rows, is_prompt=rows is not step)
                    found.append(context.logits(-1))
                    context.truncate(0, 0)
            assert all((found[i] == found[i + 4]).all() for i in range(4))
            return np.stack(found[:4])

    exact = Placement(tuple(Copy(name, "float32", backend.buffer_type, widened="F32") for name in blocks(path)))
    plain, widened, (*_, expected) = run(Placement()), run(Placement(copies)), run(exact)
    assert (plain[:3] == widened[:3]).all()  # a single row, a short prompt, and a decode step of many
    errors = [float(np.linalg.norm(found[3] - expected)) for found in (plain, widened)]
    assert 0 < errors[1] < errors[0] < 0.1 * np.linalg.norm(expected)


def test_a_weight_that_llama_cpp_does_not_multiply_is_left_alone(path: Path, backend: Backend) -> None:
    with open_model(path, Placement((Copy("blk.99.attn_q.weight", "CPU", backend.buffer_type),))) as model:
        assert np.isfinite(logits(model)).all()


def test_after_closing_nothing_refers_to_the_copies(path: Path, backend: Backend) -> None:
    for _ in range(3):
        model = open_model(path, plain_copies(path, backend))
        context = LlamaContext(model, 64, 32, 1)
        context.decode(BatchRows.of(np.zeros(1, np.int32), 0, 0, output=True))
        context.close()
        model.close()
        model.close()
        del model  # and one that is never closed
        open_model(path, plain_copies(path, backend))


class InterruptedOnce(Copy):
    """A copy that raises KeyboardInterrupt once, at the `after`-th read of `many`, while weights are switched."""

    def __getattribute__(self, name: str) -> Any:
        if name == "many" and "after" in self.__dict__:
            left = self.__dict__["after"] = self.__dict__["after"] - 1
            if left == 0:
                raise KeyboardInterrupt
        return super().__getattribute__(name)


def test_an_interrupt_while_weights_are_switched_leaves_no_mixture(path: Path, backend: Backend) -> None:
    names = blocks(path)
    last = InterruptedOnce(names[-1], "CPU", backend.buffer_type, many=False)
    copies = (*plain_copies(path, backend, many=False).copies[:-1], last)
    with open_model(path, Placement(copies)) as model:
        tensor = weight_tensors(model)[names[0]]
        with model.multiplying(1):
            few = int(tensor.contents.data)
        last.__dict__["after"] = 1
        with pytest.raises(KeyboardInterrupt), model.multiplying(MANY):
            pass
        with model.multiplying(1):
            assert tensor.contents.data == few


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages of a mapping are counted on Linux only")
def test_a_copied_weight_takes_no_mapped_memory(path: Path, backend: Backend) -> None:
    """Fewer pages of the file stay in memory; those that the prefill read are dropped."""
    with LlamaModel(path) as model:
        logits(model)
        before = resident(path)
    with open_model(path, plain_copies(path, backend, many=False)) as model:
        logits(model)
        after = resident(path)
    with GgufFile.open(path) as file:
        copied = sum(file.tensors[name].nbytes for name in blocks(path))
    assert before >= copied and after < before - 0.5 * copied, (before, after, copied)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages of a mapping are counted on Linux only")
def test_a_step_of_many_answers_leaves_the_pages_that_the_next_one_reads(path: Path, backend: Backend) -> None:
    n = MANY + 3
    with (
        open_model(path, plain_copies(path, backend, many=False)) as model,
        LlamaContext(model, 64, 32, 1, n_seq_max=n) as context,
        GgufFile.open(path) as file,
    ):
        copied = sum(file.tensors[name].nbytes for name in blocks(path))
        context.decode(BatchRows.of(np.arange(n, dtype=np.int32), 0, 0, output=True), is_prompt=True)
        after_prompt = resident(path)
        context.truncate(0, 0)
        rows = [BatchRows.of(np.array([7], np.int32), 0, number, output=True) for number in range(n)]
        context.decode(BatchRows.joined(rows))
        assert resident(path) > after_prompt + 0.5 * copied


def resident(path: Path) -> int:
    """Returns how many bytes of a mapped file are in this process's memory."""
    found: list[Any] = re.findall(
        rf"{re.escape(str(path))}\n(?:.*\n)*?Rss:\s+(\d+) kB", Path("/proc/self/smaps").read_text()
    )
    return sum(map(int, found)) * 1024


def test_without_memory_for_copies_the_mapped_weights_are_used(
    path: Path, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LlamaModel(path) as model:
        expected = logits(model)

    def refuse(self: Arena, buffer_type: Any, *, weights: bool) -> int:
        raise DeviceError("not enough memory")

    monkeypatch.setattr(Arena, "allocate", refuse)
    with open_model(path, plain_copies(path, backend, many=True, few=True)) as model:
        assert np.array_equal(logits(model), expected)
