"""Where on a page the letters of an answer stand, and what leads the eye from one text of the page to the next."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from documents import Document
    from truth import Form


@dataclass(frozen=True)
class Text:
    """A text of the page: its first glyph, its last one, and its letters without spaces."""

    first: int
    last: int
    letters: str

    @property
    def last_but_colon(self) -> int:
        return self.last - int(len(self.letters) > 1 and self.letters[-1] == ":")


def texts_of(document: Document) -> list[Text]:
    """All texts in the order in which they were drawn."""
    import numpy as np
    from drawing import ENDING, START

    page = "".join(map(chr, document.glyphs.code.tolist()))
    starts = np.flatnonzero(np.isin(document.glyphs.gap, (START, START + ENDING))).tolist()
    return [Text(start, end - 1, page[start:end]) for start, end in zip(starts, [*starts[1:], len(page)], strict=True)]


# what an answer says one after the other: a position in it, and the text there
Told = list[tuple[int, Text]]


def told(document: Document, answer: str) -> tuple[Told, dict[int, int]]:
    """The values of a form, or the labels and values of a chart's rows, as far as the answer tells them.

    With them, by first glyph: which glyph leads to a text, where that is not the one that was written last. A value is
    found by its label, a chart's label by the label before.
    """
    from truth import Chart, Form

    if isinstance(document.truth, Form):
        return _told_fields(document.truth, texts_of(document), answer)
    if isinstance(document.truth, Chart):
        return _told_rows(chart_rows(document), answer)
    return [], {}


def _told_fields(form: Form, texts: list[Text], answer: str) -> tuple[Told, dict[int, int]]:
    found: Told = []
    led: dict[int, int] = {}
    is_json = answer.startswith("{")
    for name, value in form.fields:
        if not value or (not is_json and (found or answer != value)):
            continue
        for label, text in itertools.pairwise(texts):
            plain = "".join(char for char in label.letters.lower() if char.isalnum())
            if plain == name.replace("_", "") and text.letters == value.replace(" ", ""):
                start = f'"{name}": "'
                at = answer.find(start + json.dumps(value)[1:-1]) + len(start) if is_json else 0
                found.append((at, text))
                led[text.first] = label.last_but_colon
                break
    return found, led


def _told_rows(rows: list[list[Text]], answer: str) -> tuple[Told, dict[int, int]]:
    if not rows or answer.count("\n") != len(rows):  # no CSV
        return [], {}
    found: Told = []
    led: dict[int, int] = {}
    at = answer.find("\n")
    for row in rows:
        for text in row:
            place = re.compile(" ?".join(map(re.escape, text.letters))).search(answer, at)
            if place is None:
                return [], {}
            found.append((place.start(), text))
            at = place.end()
    for one, other in itertools.pairwise(rows):
        led[other[0].first] = one[0].last
    return found, led


def chart_rows(document: Document) -> list[list[Text]]:
    """Label and values of each row of a bar or line chart; none of a pie chart, whose label and value are one text."""
    from truth import Chart

    chart = document.truth
    assert isinstance(chart, Chart)
    texts, rows = texts_of(document), []
    for label, values in zip(chart.labels, chart.values, strict=True):
        wanted = [text.replace(" ", "") for text in (label, *values)]
        n = len(values)
        for i, text in enumerate(texts):
            if text.letters == wanted[0]:
                around = (texts[max(0, i - n) : i], texts[i + 1 : i + 1 + n])
                row = next((part for part in around if [value.letters for value in part] == wanted[1:]), None)
                if row is not None:
                    rows.append([text, *row])
                    break
    return rows if len(rows) == len(chart.labels) else []


def glyphs_of_answer(document: Document, answer: str, known: Told) -> list[tuple[int, int]]:
    """(character of the answer, glyph of the page) wherever a word of the answer stands on the page.

    What is not `known`, by `told`, is looked for: a word that stands there more than once is taken to be the next one
    after the last that was found.
    """
    found = [] if known and answer.startswith("{") else _searched(document, answer[: known[0][0]] if known else answer)
    for at, text in known:
        for i in range(text.first, text.last + 1):
            at += int(answer[at] == " ")
            found.append((at, i))
            at += 1
    return found


def _searched(document: Document, answer: str) -> list[tuple[int, int]]:
    page = "".join(map(chr, document.glyphs.code.tolist()))
    found, after = [], 0
    words = []
    for word in re.finditer(r"[^\s<>\"|]+", answer):
        if word.group() in page:
            words.append((word.start(), word.group()))
        else:
            words += [(word.start() + part.start(), part.group()) for part in re.finditer("[^,]+", word.group())]
    for start, text in words:
        at = page.find(text, after)
        at = at if at >= 0 else page.find(text)
        if (len(text) > 1 and at >= 0) or at == after:
            found += [(start + i, at + i) for i in range(len(text))]
            after = at + len(text)
    return found


def links_of(document: Document, shown: list[int]) -> list[tuple[int, int]]:
    """Pairs of image tokens, of `shown`, the one further down or right first: where one text ends and the next begins.

    Of a chart: from each label to its values and to the next label. Of all else: in the order in which texts were
    drawn, where that goes down or right.
    """
    from truth import Chart

    links = []
    rows = chart_rows(document) if isinstance(document.truth, Chart) else []
    if rows:
        ways = [pair for row in rows for pair in itertools.pairwise(row)]
        ways += [(one[0], other[0]) for one, other in itertools.pairwise(rows)]
        for one, other in ways:
            end, start = shown[one.last_but_colon], shown[other.first]
            if min(end, start) >= 0 and end != start:
                links.append((max(end, start), min(end, start)))
        return list(dict(links).items())  # a head has one place to look at
    for one, other in itertools.pairwise(texts_of(document)):
        end, start = shown[one.last_but_colon], shown[other.first]
        if 0 <= end < start:
            links.append((start, end))
    return links
