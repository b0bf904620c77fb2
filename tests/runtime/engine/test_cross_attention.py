"""Tests of which images the rows of a prompt attend to."""

from __future__ import annotations

from granite4v.families.base import CrossAttentionConfig
from granite4v.runtime.engine.cross_attention import layers_by_place, sight
from granite4v.runtime.prompt.spans import ImageSpan, TextSpan

A, B, C = (ImageSpan(i, 1, name) for i, name in enumerate((b"a", b"b", b"c")))
TEXT = TextSpan((5, 6, 7))


def seen(*spans: ImageSpan | TextSpan, rule: str = "original") -> list[str]:
    """Returns the names of the images that each position of the prompt and the first of the answer attend to; '!' marks
    `before_first`."""
    n = sum(span.n_tokens for span in spans)
    sights = [sight(spans, position, rule) for position in range(n + 1)]  # type: ignore[arg-type]
    return ["".join(image.digest.decode() for image in s.images) + "!" * s.before_first for s in sights]


def test_the_last_image_and_its_neighbours() -> None:
    assert seen(TEXT) == ["", "", "", ""]
    assert seen(A) == ["a", "a"]
    assert seen(TEXT, A, TEXT) == ["", "", "", "a", "a", "a", "a", "a"]
    assert seen(A, B, TEXT, C) == ["a", "ab", "ab", "ab", "ab", "c", "c"]
    assert seen(A, TEXT, B, C) == ["a", "a", "a", "a", "b", "bc", "bc"]


def test_by_transformers_rule_rows_before_the_first_see_all() -> None:
    assert seen(TEXT, A, TEXT, B, rule="transformers") == ["ab!", "ab!", "ab!", "a", "a", "a", "a", "b", "b"]
    assert seen(TEXT, rule="transformers") == ["!", "!", "!", "!"]


def test_layers_stand_between_those_of_the_text_file() -> None:
    def places(*layers: int) -> dict[int, tuple[int, ...]]:
        return layers_by_place(CrossAttentionConfig(layers, 8, 8, 2, 1, 4, 1e-5))

    assert places(1, 3, 4, 8) == {1: (1,), 2: (3, 4), 5: (8,)}
    assert places(0, 1, 4) == {0: (0, 1), 2: (4,)}
