"""Tests of the memory of the KV cache: unused cells take none, and no computed value depends on that."""

from __future__ import annotations

import ctypes
import mmap
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from granite4v.runtime.llama.context import BatchRows, LlamaContext
from granite4v.runtime.llama.kv_pages import KvPages, cpu_buffers
from granite4v.runtime.llama.model import LlamaModel
from tests.toy.spec import PRESETS

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages are given back on Linux only")
N_SEQUENCES, N_CELLS, N_UBATCH = 16, 8192, 512
PAGE = mmap.PAGESIZE


@pytest.fixture(scope="module")
def toy(make_model: Callable[..., Path]) -> Iterator[LlamaModel]:
    (path,) = make_model(PRESETS["tiny"], "F16", "F16").glob("text-*.gguf")
    with LlamaModel(path) as model:
        yield model


@pytest.fixture(params=[True, False])
def exact(request: pytest.FixtureRequest) -> bool:
    """Both layouts: without flash attention llama.cpp stores values transposed."""
    return bool(request.param)


def context_of(model: LlamaModel, exact: bool = False) -> LlamaContext:
    return LlamaContext(model, N_CELLS, N_UBATCH, 1, n_seq_max=N_SEQUENCES, exact=exact)


def anonymous_mb() -> float:
    # from the page tables, because the counters of /proc/self/status may lag behind
    found = re.search(r"\nAnonymous:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def append(context: LlamaContext, sequence: int, start: int, n: int, seed: int = 0) -> np.ndarray:
    tokens = np.random.default_rng((seed, start, n)).integers(0, 200, n).astype(np.int32)
    context.decode(BatchRows.of(tokens, start, sequence, output=True))
    return context.logits(-1)


def fill(context: LlamaContext, sequence: int, n: int) -> None:
    for start in range(0, n, N_UBATCH):
        append(context, sequence, start, min(N_UBATCH, n - start))


def test_memory_follows_what_is_held(toy: LlamaModel) -> None:
    with cpu_buffers() as buffers:
        context = context_of(toy)
    cache_mb = max(size for _, size in buffers) / 1e6
    whole = cache_mb / N_SEQUENCES
    assert cache_mb > 32
    with context:
        fill(context, 0, N_CELLS // 2)  # llama.cpp's compute buffers are in memory now
        before = anonymous_mb()
        fill(context, 3, N_CELLS // 2)
        filled = anonymous_mb() - before
        context.copy(3, 5, N_CELLS // 4)
        append(context, 5, N_CELLS // 4, 1)
        copied = anonymous_mb() - before
        for number in (3, 5):
            context.truncate(number, 0)
        emptied = anonymous_mb() - before
    assert 0.4 * whole < filled < 0.7 * whole  # half of a sequence
    assert 0.2 * whole < copied - filled < 0.4 * whole  # a quarter
    assert emptied < 0.1 * whole


PEAK = """
import re, sys
from pathlib import Path
from granite4v.runtime.llama.context import LlamaContext
from granite4v.runtime.llama.model import LlamaModel
def peak_kb():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
with LlamaModel(Path(sys.argv[1])) as model:
    LlamaContext(model, 256, 512, 1, n_seq_max=16).close()
    before = peak_kb()
    LlamaContext(model, 1 << 17, 512, 1, n_seq_max=16).close()
    print((peak_kb() - before) * 1024)
"""


def test_a_cache_is_never_in_memory_as_a_whole(toy: LlamaModel) -> None:
    """Not even while llama.cpp clears it."""
    with cpu_buffers() as buffers, LlamaContext(toy, 1 << 17, N_UBATCH, 1, n_seq_max=16):
        pass
    cache = max(size for _, size in buffers)
    assert cache > 400_000_000
    done = subprocess.run([sys.executable, "-c", PEAK, str(toy.path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 0.75 * cache


def test_a_sequence_that_was_filled_from_elsewhere_is_known(toy: LlamaModel) -> None:
    with context_of(toy) as one:
        fill(one, 2, 3000)
        state = one.state(2)
    with context_of(toy) as other:
        other.restore(4, state)
        append(other, 4, 3000, 200)
        before = anonymous_mb()
        other.truncate(4, 0)
        assert before - anonymous_mb() > 0.8 * len(state) / 1e6


def test_nothing_that_is_computed_depends_on_it(toy: LlamaModel, exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [run_at_random(context_of(toy, exact), seed) for seed in range(1 if exact else 3)]
    monkeypatch.setattr(KvPages, "among", classmethod(lambda *_: None))
    for seed, logits in enumerate(found):
        np.testing.assert_array_equal(logits, run_at_random(context_of(toy, exact), seed))


def run_at_random(context: LlamaContext, seed: int) -> np.ndarray:
    """Extends, cuts, copies and moves sequences at random; returns the logits of everything decoded."""
    rng, held, logits = random.Random(seed), [0] * N_SEQUENCES, []
    with context:
        for step in range(60):
            number, other = rng.sample(range(N_SEQUENCES), 2)
            action = rng.choice(["append"] * 4 + ["cut", "copy", "restore"])
            if action == "append":
                n = rng.choice([1, 7, 300, N_UBATCH])
                logits.append(append(context, number, held[number], n, step))
                held[number] += n
            elif action == "cut":
                held[number] = rng.choice([0, held[number] // 2, max(0, held[number] - 3)])
                context.truncate(number, held[number])
            elif held[other] and action == "copy":
                held[number] = rng.randint(1, held[other])
                context.copy(other, number, held[number])
                logits.append(append(context, number, held[number], 1, step))  # the copy is made now
                held[number] += 1
            elif held[other]:
                state = context.state(other)
                context.truncate(number, 0)
                context.restore(number, state)
                held[number] = held[other]
        for number in range(N_SEQUENCES):
            logits.append(append(context, number, held[number], 2))
    return np.stack(logits)


@pytest.mark.parametrize("n_used", [0, 1, 700, 1023, 1024])
def test_pages_of_one_sequence_go_and_no_others(n_used: int) -> None:
    """The cache has 3 tensors of 2 sequences of 1,024 cells of 24 bytes, and does not begin at a page boundary."""
    n_tensors, n_sequences, n_cells, n_bytes, offset = 3, 2, 1024, 24, 64
    size = n_tensors * n_sequences * n_cells * n_bytes
    region = mmap.mmap(-1, size + 2 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    everything = np.frombuffer(region, dtype=np.uint8)
    everything[:] = 1
    pages = KvPages(everything.ctypes.data + offset, n_tensors, n_sequences, n_cells, n_bytes)
    pages.give_back(1, n_used)
    cells = everything[offset : offset + size].reshape(n_tensors, n_sequences, n_cells, n_bytes)
    assert cells[:, 0].all() and cells[:, 1, :n_used].all()
    assert everything[:offset].all() and everything[offset + size :].all()
    unused = cells[:, 1, n_used:].reshape(n_tensors, -1)
    assert ((unused == 0).sum(axis=1) >= unused.shape[1] - 2 * PAGE).all()
    assert n_used > 1000 or not unused.all(axis=1).any()


def test_another_layout_is_noticed() -> None:
    """Cells of a sequence are elsewhere than expected, or another number of them is in memory than was used."""
    region = mmap.mmap(-1, 64 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = ctypes.addressof(ctypes.c_char.from_buffer(region))
    pages = KvPages(start, n_tensors=2, n_sequences=2, n_cells=512, n_bytes=32 * PAGE // 1024)
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(64 * PAGE), mmap.MADV_NOHUGEPAGE)
    for first in (0, 32):
        ctypes.memset(start + first * PAGE, 1, 4 * PAGE)  # 128 cells of the first sequence, in both tensors
    assert pages.is_as_expected([128, 0])
    assert not pages.is_as_expected([128, 128]) and not pages.is_as_expected([0, 0])
    ctypes.memset(start + 12 * PAGE, 1, PAGE)  # cell 384
    assert not pages.is_as_expected([128, 0])


def test_buffers_are_seen_inside_the_block_alone(toy: LlamaModel) -> None:
    with cpu_buffers() as buffers, LlamaContext(toy, 256, 8, 1):
        pass
    n = len(buffers)
    assert n > 0 and all(start and size for start, size in buffers)
    LlamaContext(toy, 256, 8, 1).close()
    assert len(buffers) == n
