"""Tests of what a cached sequence holds, and how much of it a prompt can reuse."""

from __future__ import annotations

from typing import Any

from granite4v.runtime.engine.cached_sequence import MAX_RECOMPUTED, Batch, CachedSequence

# --- bookkeeping ---


def batches(*groups: Any) -> list[Batch]:
    return [Batch(tuple(group)) for group in groups]


def cached(*groups: Any) -> CachedSequence:
    return CachedSequence(0, batches(*groups))


def test_nothing_cached_nothing_reused() -> None:
    assert cached().reusable(batches("abc")) == 0


def test_whole_batches_that_were_computed_alike_are_reused() -> None:
    assert cached("abc", "xyz").reusable(batches("abc", "xqz")) == 3
    assert cached("abc", "xyz", "k").reusable(batches("abc", "xyz", "q")) == 6


def test_the_last_batch_is_always_computed_again() -> None:
    assert cached("abc", "xyz", "answer").reusable(batches("abc", "xyz")) == 3
    assert cached("abc").reusable(batches("abc")) == 0


def test_batches_cut_differently_are_computed_again_when_that_is_cheap() -> None:
    assert cached("abc", "d", "e", "f").reusable(batches("abc", "defgh")) == 3


def test_a_long_common_run_is_reused_to_its_last_token() -> None:
    long = list(range(MAX_RECOMPUTED + 10))
    assert cached("abc", *([t] for t in long)).reusable(batches("abc", [*long, "q"])) == 3 + len(long)
    assert cached("abc", long).reusable(batches("abc", [*long[:-1], "q", "r"])) == 3 + len(long) - 1
    assert cached(long).reusable(batches(long[:-1])) == len(long) - 2  # the last token is recomputed for its logits


def test_pictures_are_known_by_their_content() -> None:
    first, second = [(b"digest 1", i) for i in range(4)], [(b"digest 2", i) for i in range(4)]
    assert cached("abc", first, "q").reusable(batches("abc", second, "q")) == 3
    assert cached("abc", first, "q").reusable(batches("abc", first, "q")) == 7


def test_a_difference_in_front_makes_everything_behind_it_unusable() -> None:
    assert cached("abc", "xyz").reusable(batches("abd", "xyz")) == 0


def test_a_prefix_has_the_first_part_of_a_batch() -> None:
    assert cached("abc", "xyz").prefix(4) == batches("abc", "x")
