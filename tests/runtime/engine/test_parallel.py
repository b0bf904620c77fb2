"""Tests of how many sequences a batch gets: limited by questions, memory or measured gain, and reported with the
reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from granite4v.clip_projector import count_tokens
from granite4v.runtime.engine.kv_cache import MIN_ANSWER, SEQUENCE_STEP
from granite4v.runtime.engine.parallel import (
    MEASURED_FROM,
    MOST_SCORES,
    PAGE_PX,
    TEXT_TOKENS,
    USUAL_PARALLEL,
    Workload,
    choose_width,
    fastest,
    kv_bytes_per_token,
    most_cells,
    needs_flash,
)
from granite4v.runtime.llama.files import ModelFiles
from tests.toy.checkpoint import PRESETS

N_CTX = 100_000
MUCH = 1 << 40  # bytes
# seconds of a decode step by its number of sequences: a 4B model on two cores, 1,500 tokens in each sequence
SECONDS = {1: 0.083, 4: 0.243, 8: 0.410, 12: 0.510, 16: 0.570}


@pytest.fixture
def files(make_model: Callable[..., Path]) -> Iterator[ModelFiles]:
    with ModelFiles.open(make_model(PRESETS["tiny"])) as files:
        yield files


def unknown(most: int) -> Mapping[int, float]:
    return {}


def never(most: int) -> Mapping[int, float]:
    raise AssertionError("measured for a short batch")


def bytes_for(files: ModelFiles, n: int, n_answer: int) -> int:
    """Returns the bytes that must be available for `n` sequences."""
    assert files.vision_config is not None
    n_page = max(count_tokens(size, files.vision_config) for size in (PAGE_PX, PAGE_PX[::-1]))
    n_steps = math.ceil((n_page + TEXT_TOKENS + n_answer) / SEQUENCE_STEP)
    return 4 * n * n_steps * SEQUENCE_STEP * kv_bytes_per_token(files)


@pytest.mark.parametrize(("n_answer", "max_tokens"), [(100, 100), (MIN_ANSWER, 9000), (MIN_ANSWER, None)])
def test_as_many_as_memory_has_room_for(files: ModelFiles, n_answer: int, max_tokens: int | None) -> None:
    available = bytes_for(files, 5, n_answer)
    for bytes_, expected in ((available, 5), (available - 4, 4), (0, 1)):
        width = choose_width(files, Workload(None, max_tokens), N_CTX, unknown, available=bytes_)
        assert width.n == expected and "as many as memory has room for" in width.reason
    assert most_cells(files, available) == int(1.3 * (available // 4 // kv_bytes_per_token(files)))


def test_a_small_context_bounds_what_a_sequence_takes(files: ModelFiles) -> None:
    assert choose_width(files, Workload(), 50, unknown, available=4 * 7 * 50 * kv_bytes_per_token(files)).n == 7


def test_no_more_than_there_are_questions(files: ModelFiles) -> None:
    width = choose_width(files, Workload(3, 100), N_CTX, never, available=MUCH)
    assert width.n == 3 and width.reason.startswith("one for each question, up to ")
    assert choose_width(files, Workload(0, 100), N_CTX, never, available=MUCH).n == 1
    assert choose_width(files, Workload(MEASURED_FROM - 1, 100), N_CTX, never, available=MUCH).n == USUAL_PARALLEL


def test_as_many_as_are_worth_while(files: ModelFiles) -> None:
    asked: list[int] = []

    def seconds(most: int) -> Mapping[int, float]:
        asked.append(most)
        return {n: taken for n, taken in SECONDS.items() if n <= most}

    width = choose_width(files, Workload(MEASURED_FROM, 100), N_CTX, seconds, available=MUCH)
    assert asked == [MEASURED_FROM] and width.n == 16
    assert width.reason.startswith("2.3 times the tokens a second of one, up to ")
    tight = choose_width(files, Workload(None, 100), N_CTX, lambda _: SECONDS, available=bytes_for(files, 10, 100))
    assert tight.n == 10 and tight.reason.startswith(
        "as many as memory has room for, 1.8 times the tokens a second of "
    )
    flat = choose_width(files, Workload(None, 100), N_CTX, lambda _: {1: 1.0, 4: 2.0, 8: 3.9, 16: 7.9}, available=MUCH)
    assert flat.n == 4 and flat.reason.startswith("2.0 times the tokens a second of one, ")


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (SECONDS, 16),
        ({1: 1.0, 2: 2.0, 4: 4.0}, 1),
        ({1: 1.0, 4: 2.0, 8: 3.8}, 4),  # 5% more tokens a second are not worth twice the memory
        ({1: 1.0, 4: 2.0, 8: 3.6}, 8),
        ({1: 1.0, 4: 2.0, 8: 8.0}, 4),
        ({1: 1.0}, 1),
    ],
)
def test_the_smallest_of_about_the_best(seconds: Mapping[int, float], expected: int) -> None:
    assert fastest(seconds) == expected


def test_a_quantized_cache_has_room_for_more(files: ModelFiles) -> None:
    """A Q8_0 block of llama.cpp holds 32 values in 34 bytes."""
    half, quantized = kv_bytes_per_token(files), kv_bytes_per_token(files, "q8_0")
    assert quantized * 64 == half * 34
    available = bytes_for(files, 8, 100)
    for cache_type, expected in (("f16", 8), ("q8_0", 15)):
        assert choose_width(files, Workload(None, 100), N_CTX, unknown, cache_type, available).n == expected
    assert most_cells(files, available, "q8_0") == pytest.approx(most_cells(files, available) * 64 / 34, rel=1e-3)


def test_flash_attention_where_scores_take_too_much_memory(make_model: Callable[..., Path]) -> None:
    spec = PRESETS["tiny"]
    n_cells = MOST_SCORES // (4 * 512 * spec.text_heads)
    with ModelFiles.open(make_model(spec)) as files:
        assert not needs_flash(files, n_cells, 512, "cpu", "f16")
        assert needs_flash(files, n_cells + 1, 512, "cpu", "f16")
        assert not needs_flash(files, n_cells + 1, 256, "cpu", "f16")
        assert needs_flash(files, n_cells, 512, "cpu", "q8_0")
