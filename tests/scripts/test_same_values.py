"""The script that compares records of several answers at once with those of one at a time reports forbidden
differences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import granite4v
from scripts.compare_records import DrawnFile
from scripts.same_values import DEFAULT, NO_DRAFTING, ONE_BY_ONE, Recorded, Side, asked, differing, judge

SAME = {"n_records": 3, "n_same": 3, "missing": [], "different": [], "other_tokens": 0}


@pytest.mark.parametrize(
    ("name", "changes", "n_problems"),
    [
        (ONE_BY_ONE, {}, 0),
        (ONE_BY_ONE, {"n_records": 0}, 1),
        (ONE_BY_ONE, {"missing": ["table a.png page 1 tables_html"]}, 1),
        (ONE_BY_ONE, {"different": [{"record": "a", "fields": ["text"], "apart": 0.039}]}, 0),
        (ONE_BY_ONE, {"different": [{"record": "a", "fields": ["text"], "apart": 0.04}]}, 1),
        (ONE_BY_ONE, {"different": [{"record": "a", "fields": ["valid"]}]}, 1),
        (ONE_BY_ONE, {"other_tokens": 1}, 0),
        (NO_DRAFTING, {"other_tokens": 1}, 1),
        (NO_DRAFTING, {"different": [{"record": "a", "fields": ["text"], "apart": 0.0}]}, 1),
    ],
)
def test_what_may_not_differ(name: str, changes: dict[str, Any], n_problems: int) -> None:
    assert len(judge({name: {**SAME, **changes}}, 0.02)) == n_problems


def test_forms_are_asked_for_beside_others(tmp_path: Path) -> None:
    schemas = [{"type": "object", "title": str(i)} for i in range(5)]
    files = [DrawnFile(tmp_path / f"form-{i}.png", "form", schema) for i, schema in enumerate(schemas)]
    calls = list(asked([*files, DrawnFile(tmp_path / "chart-9.png", "chart", None)], tmp_path / DEFAULT))
    forms = [call for call in calls if call.schema is not None]
    assert [call.schema for call in forms] == schemas and {tuple(call.tasks) for call in forms} == {("kvp",)}
    assert [Path(path).name for path in forms[4].files] == ["form-4.png", "form-0.png", "form-1.png", "form-2.png"]
    assert len(calls) == len({call.out for call in calls}) == 7


def test_where_answers_part(tmp_path: Path) -> None:
    """The last token of a real answer is changed; the reported logits are the model's."""
    Image.new("RGB", (60, 40), "white").save(tmp_path / "page.png")
    with granite4v.load(n_threads=1, device="cpu", n_parallel=1) as model:
        recorded: Any = Recorded(model)
        (record,) = granite4v.extract(tmp_path, "chart2csv", model=recorded, max_tokens=6)
        ((key, tokens),) = recorded.tokens.items()
        changed = [*tokens[:-1], tokens[-1] + 1]
        name = "x page.png page 1 chart2csv"
        base = Side({name: vars(record)}, recorded.tokens)
        found = differing(model, {"x": None}, base, Side({name: {**vars(record), "text": "other"}}, {key: changed}))
        logits = model.score("<chart2csv>", [tmp_path / "page.png"], tokens=tokens)[-1]
    (one,) = found["different"]
    pair = [logits[tokens[-1]], logits[changed[-1]]]
    assert (one["fields"], one["token"], found["other_tokens"]) == (["text"], len(tokens) - 1, 1)
    assert one["logits"] == pytest.approx(pair, abs=1e-3) and len(tokens) > 1
    assert one["apart"] == pytest.approx(abs(pair[0] - pair[1]), abs=1e-3)
