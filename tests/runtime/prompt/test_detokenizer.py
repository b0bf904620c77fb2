"""Tests of text streams over small decoders: a token's text depends on its neighbours, and incomplete characters are
held back."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from granite4v.runtime.prompt.detokenizer import REPLACEMENT, ByteStream, TextStream, WindowStream

# A SentencePiece-like vocabulary: a space before each word but the first, and single bytes.
PIECES = {1: b" Total", 2: b" due", 3: b":", 4: "é".encode()[:1], 5: "é".encode()[1:], 6: b"", 7: b" 12"}


def spelled(tokens: Sequence[int]) -> str:
    return b"".join(PIECES[token] for token in tokens).decode("utf-8", "replace").removeprefix(" ")


def streamed(stream: TextStream, tokens: Sequence[int]) -> list[str]:
    return [*(stream.push(token) for token in tokens), stream.flush()]


@pytest.mark.parametrize(
    ("tokens", "pieces"),
    [
        ([1, 2, 3, 7], ["Total", " due", ":", " 12", ""]),  # only the first space is removed
        ([1, 4, 5, 3], ["Total", "", "é", ":", ""]),  # two tokens for one character
        ([1, 6, 6, 2], ["Total", "", "", " due", ""]),  # special tokens have no text
        ([1, 4], ["Total", "", REPLACEMENT]),  # an answer that ends inside a character
        ([4, 1], ["", f"{REPLACEMENT} Total", ""]),  # a byte that never becomes a character
        ([], [""]),
    ],
)
def test_pieces_of_a_window(tokens: list[int], pieces: list[str]) -> None:
    found = streamed(WindowStream(spelled), tokens)
    assert found == pieces
    assert "".join(found) == spelled(tokens)


def test_the_window_stays_short() -> None:
    """A long answer must not cost more with every token."""
    lengths: list[int] = []

    def decode(tokens: Sequence[int]) -> str:
        lengths.append(len(tokens))
        return spelled(tokens)

    tokens = [1, 2, 3, 7] * 100
    assert "".join(streamed(WindowStream(decode), tokens)) == spelled(tokens)
    assert max(lengths) <= 2


def test_bytes_are_joined_to_characters() -> None:
    assert streamed(ByteStream(PIECES.__getitem__), [1, 4, 5, 6, 3]) == [" Total", "", "é", "", ":", ""]
    assert streamed(ByteStream(PIECES.__getitem__), [4]) == ["", REPLACEMENT]
    assert streamed(ByteStream(PIECES.__getitem__), [4, 3]) == ["", f"{REPLACEMENT}:", ""]
