"""Finds the tokens that the tokenizer itself would write for text that must come next.

Only tokens that stay the same whatever follows are returned: the tokenizer could merge the last ones with the text
after them. For example, '"total": ' is forced and a number or a quote may follow. If there is a token ' "', the space
at the end may become part of it, so the tokens up to ':' are certain and the space is not. To find the certain tokens,
the text is cut wherever a token that reaches beyond its end could begin, and the part before the cut is encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from granite4v.runtime.grammar.token_index import Spellings, TokenIndex

Encode = Callable[[str], list[int]]
_WINDOW = 64  # tokens of context; how text is split depends on a few words at most
_MANY = 16  # following bytes; for more, the continuations are scanned instead of looking up each byte


def forced_tokens(
    index: TokenIndex, encode: Encode, generated: Sequence[int], text: bytes, following: Collection[int]
) -> list[int]:
    """The certain tokens of `text`, which follows the tokens `generated`; empty if not even the first is certain.

    `encode` treats special tokens as ordinary text and adds none. `following` are the bytes that may come after `text`.
    If the tokenizer would have split `generated` differently, `text` is encoded on its own.
    """
    generated = list(generated[_last_added(index, generated) + 1 :])
    for before in (generated[-_WINDOW:], generated, []):
        complete = index.text(before) + text
        tokens = _encode(index, encode, complete)
        if tokens is not None and tokens[: len(before)] == before:
            n_certain = _n_certain(index, encode, complete, tokens, len(before), following)
            return tokens[len(before) : n_certain]
    return []


def _last_added(index: TokenIndex, tokens: Sequence[int]) -> int:
    """The index of the last added token, -1 if there is none. No token reaches across it, so the text after it is
    split as if it were alone."""
    return next((i for i in range(len(tokens) - 1, -1, -1) if tokens[i] in index.added), -1)


def _encode(index: TokenIndex, encode: Encode, text: bytes) -> list[int] | None:
    """The tokens of a text; None if they do not spell it: it ends inside a character, or the tokenizer changes it."""
    try:
        tokens = encode(text.decode())
    except UnicodeDecodeError:
        return None
    in_range = all(token < index.n_vocab for token in tokens)
    return tokens if in_range and index.text(tokens) == text else None


def _n_certain(
    index: TokenIndex, encode: Encode, text: bytes, tokens: Sequence[int], n_before: int, following: Collection[int]
) -> int:
    """How many of the tokens stay the same whatever comes after the text; at least `n_before`."""
    if not following:
        return len(tokens)
    last = _last_added(index, tokens)
    starts = [0]
    for token in tokens:
        starts.append(starts[-1] + len(index.pieces[token]))
    n_certain = len(tokens)
    least = max(starts[n_before], len(text) - index.all.longest)
    for at in range(least, len(text)):
        if last >= 0 and starts[last] < at < starts[last + 1]:
            continue  # inside an added token, which the tokenizer finds before it splits the rest
        spellings = index.added_only if at < starts[last + 1] else index.all
        if _reaches_beyond(spellings, text[at:], following) or _cuts_space(text, at, starts[last + 1]):
            n_certain = min(n_certain, _n_common(tokens, _encode(index, encode, text[:at]) or []))
    return max(n_certain, n_before)


def _reaches_beyond(spellings: Spellings, end: bytes, following: Collection[int]) -> bool:
    """Whether a token begins with `end` and continues with one of the bytes that may follow."""
    if len(following) > _MANY:  # then one of the first continuations usually matches
        return any(rest[0] in following for rest, _ in spellings.continuations(end))
    return spellings.has_prefix(end) and any(spellings.has_prefix(end + bytes((byte,))) for byte in following)


def _cuts_space(text: bytes, at: int, after_added: int) -> bool:
    """Whether a cut at `at` leaves a last white-space character: tokenizers split a run of white space one way at the
    end of a text and another way before a word."""
    return at == len(text) - 1 and at >= after_added and text[at:].isspace()


def _n_common(one: Sequence[int], other: Sequence[int]) -> int:
    n = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        n += 1
    return n
