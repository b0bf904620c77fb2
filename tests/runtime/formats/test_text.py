"""Tests of code and prose."""

from __future__ import annotations

import pytest

from granite4v.errors import AnswerError
from granite4v.runtime.formats import TASKS, read, read_fields, salvage
from tests.helpers.tables import assert_error


def test_code_prose_and_fields() -> None:
    assert read("chart2code", "```python\nprint(1)\n```") == read("chart2code", "print(1)\n") == "print(1)"
    assert read("chart2summary", " Sales rose.\n") == "Sales rose."
    assert read("kvp", '```json\n{"a": null, "b": [1.5]}\n```') == {"a": None, "b": [1.5]}
    assert read_fields("[]") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the answer is empty; expected text."),
    ],
)  # fmt: skip
def test_an_invalid_answer_gives_what_was_found_where_and_what_was_expected(text: str, message: str) -> None:
    assert_error("chart2code", text, message)


def test_cut_code_keeps_complete_lines_and_cut_prose_everything() -> None:
    found = salvage("chart2code", "```python\nx = 1\ny = ")
    assert found is not None
    assert (found.value, found.cut) == ("x = 1", True)
    assert salvage("chart2code", "x = ") is None
    found = salvage("chart2summary", "Sales ro")
    assert found is not None
    assert (found.value, found.cut) == ("Sales ro", True)
    assert salvage("chart2summary", " ") is None
    for task in TASKS:
        assert salvage(task, "") is None


def test_a_page_loses_the_fence_around_it_alone() -> None:
    page = "# Title\n\n```python\nprint(1)\n```\n\nEnd."
    assert read("page_md", page) == page
    for name in ("markdown", "md", "Markdown"):
        assert read("page_md", f"```{name}\n{page}\n```\n") == page
    code = "```python\nprint(1)\n```"
    assert read("page_md", code) == code
    with pytest.raises(AnswerError, match="the answer is empty"):
        read("page_md", "```markdown\n\n```")
    found = salvage("page_md", "```markdown\n# Title\n\nSome te")
    assert found is not None and (found.value, found.cut) == ("# Title\n\nSome te", True)
