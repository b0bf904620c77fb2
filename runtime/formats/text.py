"""Prose, pages as Markdown, and the code of a chart. None of them has a grammar."""

from __future__ import annotations

import re

from granite4v.errors import AnswerError
from granite4v.runtime.formats.wrapping import unfence

# docling's exact prompt for models that write pages as Markdown (its vlm_model_specs)
PAGE_PROMPT = "Convert this page to markdown. Do not miss any text and only output the bare markdown!"
_PAGE_FENCE = re.compile(r"\s*```(markdown|md)[ \t]*\r?\n", re.IGNORECASE)


def read_prose(text: str) -> str:
    """The text without white space around it. Raises AnswerError for an empty one."""
    if not text.strip():
        raise AnswerError("the answer is empty; expected text.")
    return text.strip()


def salvage_prose(text: str) -> tuple[str | None, bool]:
    """The whole text, and False: prose has no end mark, so complete and truncated prose look the same."""
    return text.strip() or None, False


def read_code(text: str) -> str:
    """The code, without a Markdown fence around it. Raises AnswerError for an empty one."""
    return read_prose(unfence(text, "python").text)


def salvage_code(text: str) -> tuple[str | None, bool]:
    """The lines that end with a line break, and whether they are the complete answer."""
    body = unfence(text, "python")
    lines = body.text if body.closed else body.text[: body.text.rfind("\n") + 1]
    return lines.strip() or None, body.closed


def read_page(text: str) -> str:
    """The Markdown, without a fence around all of it; code blocks of the page are kept. Raises AnswerError for an empty
    answer."""
    return read_prose(_page(text))


def salvage_page(text: str) -> tuple[str | None, bool]:
    """See `salvage_prose`."""
    return salvage_prose(_page(text))


def _page(text: str) -> str:
    opening = _PAGE_FENCE.match(text)
    return text if opening is None else text[opening.end() :].rstrip().removesuffix("```")
