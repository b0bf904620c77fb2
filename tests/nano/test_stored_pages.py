"""The embedded model answers about a stored page as it does about one that it reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import granite4v
from granite4v import PageStore
from tests.helpers.source_tree import ROOT

PAGE = ROOT / "tests" / "data" / "invoice.png"


def answers(store: PageStore | None) -> tuple[list[Any], list[np.ndarray], int]:
    """Returns tokens and logits for two tasks and a question, and how many prompt tokens the first took from the
    store."""
    prompts = ("<tables_html>", "<tables_otsl>", "What is this?")
    with granite4v.load(device="cpu", n_threads=2, page_store=store) as model:
        found = [model.generate(prompt, [PAGE], max_tokens=60) for prompt in prompts]
        logits = [model.logits(prompt, [PAGE]) for prompt in prompts]
    return [answer.tokens for answer in found], logits, found[0].timings.n_stored


def test_nano_reads_a_page_once(tmp_path: Path) -> None:
    store = PageStore(tmp_path / "pages")
    alone, first, later = answers(None), answers(store), answers(store)
    assert alone[0] == first[0] == later[0]
    for one, two, three in zip(alone[1], first[1], later[1], strict=True):
        np.testing.assert_array_equal(two, one)
        np.testing.assert_array_equal(three, one)
    assert (alone[2], first[2]) == (0, 0) and later[2] > 400
