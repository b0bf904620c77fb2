"""Tests of the log-probabilities of a loaded model's answers, compared with logits that are scored one by one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

import granite4v
from granite4v.runtime import formats
from granite4v.runtime.options import GenerationOptions
from tests.helpers.pictures import text_picture
from tests.toy.spec import PRESETS

PICTURE = text_picture((150, 100))


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path]) -> Iterator[granite4v.Model]:
    with granite4v.load(make_model(PRESETS["tiny"]), device="cpu", exact=True) as model:
        yield model


@pytest.mark.parametrize("drafting", [False, True])
def test_logprobs_are_those_of_the_scored_logits(model: granite4v.Model, drafting: bool) -> None:
    """The reference scores the same tokens one by one, as if they were the answer; numpy takes the log-softmax."""
    settings: dict[str, Any] = {"max_tokens": 30, "temperature": 1.2, "seed": 5, "drafting": drafting}
    answer = model.generate("Hello", [PICTURE], logprobs=4, **settings)
    assert answer.logprobs is not None and len(answer.logprobs) == len(answer.tokens) == 30
    rows = model.score("Hello", [PICTURE], tokens=answer.tokens).astype(np.longdouble)
    rows -= rows.max(axis=1, keepdims=True)
    expected = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
    for entry, token, row in zip(answer.logprobs, answer.tokens, expected, strict=True):
        assert (entry.token, entry.forced, entry.utf8) == (token, False, model.token_bytes(token))
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
        best = np.sort(row)[::-1][:4]
        assert [value for _, value in entry.top] == pytest.approx(best.tolist(), abs=1e-4)
        assert [float(row[one]) for one, _ in entry.top] == pytest.approx(best.tolist(), abs=1e-4)
    assert model.generate("Hello", [PICTURE], **settings).tokens == answer.tokens


def test_logprobs_of_a_table_give_the_confidence_of_its_cells(model: granite4v.Model) -> None:
    answer = model.generate(
        "Hello", [PICTURE], constraint=granite4v.grammar_for("tables_html"), logprobs=0, max_tokens=200
    )
    found, (table, *_) = granite4v.confidence(answer, "tables_html"), formats.salvage("tables_html", answer.text).value
    assert (0, 0, 0) in found and len([key for key in found if key[0] == 0]) <= len(table.cells)
    assert all(0 <= one.least <= one.mean <= 1 for one in found.values())


@pytest.mark.parametrize("drafting", [False, True])
def test_of_a_trained_model_in_half_precision(drafting: bool) -> None:
    """Under a grammar, with forced tokens decoded in one batch: the others have the model's own probabilities."""
    picture = PIL.Image.open(Path("tests/data/invoice.png")).convert("RGB").crop((130, 540, 1600, 900))
    with granite4v.load() as nano:
        for task in ("tables_html", "tables_json"):
            constraint = granite4v.grammar_for(task)
            answer = nano.generate(f"<{task}>", [picture], constraint=constraint, logprobs=1, drafting=drafting)
            assert answer.logprobs is not None and len(answer.tokens) > 10
            rows = nano.score(f"<{task}>", [picture], tokens=answer.tokens).astype(np.longdouble)
            rows -= rows.max(axis=1, keepdims=True)
            expected = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
            free = [(i, entry) for i, entry in enumerate(answer.logprobs) if not entry.forced]
            assert len(free) == len(answer.tokens) - answer.timings.n_forced > 5
            for i, entry in free:  # rows of one batch round differently than rows alone
                assert np.exp(entry.logprob) == pytest.approx(float(np.exp(expected[i, entry.token])), abs=0.02)
                assert entry.top[0][1] == pytest.approx(float(expected[i].max()), abs=0.05)


@pytest.mark.parametrize("logprobs", [-1, 21, 1.5, True])
def test_logprobs_out_of_range_are_refused(logprobs: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="logprobs"):
        GenerationOptions(logprobs=logprobs)


def test_logprobs_are_json_data(model: granite4v.Model) -> None:
    answer = model.generate("Hello", [PICTURE], max_tokens=3, logprobs=1)
    assert answer.logprobs is not None
    data = json.loads(json.dumps(answer.as_dict()))["logprobs"]
    assert [bytes(entry["utf8"]) for entry in data] == [entry.utf8 for entry in answer.logprobs]
    assert [(one["logprob"], one["top"][0][1]) for one in data] == [(e.logprob, e.top[0][1]) for e in answer.logprobs]
