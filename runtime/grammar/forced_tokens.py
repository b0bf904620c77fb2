"""Text that must come, as the tokens that the tokenizer itself would write for it.

Only tokens are given out that stay the same whatever follows. The last ones may not: a tokenizer could join them with
the text behind them. Which they are is found with the vocabulary and the tokenizer, by cutting the text where a
token could begin that reaches beyond its end.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from granite4v.runtime.grammar.token_index import Lexicon, Spellings

Encode = Callable[[str], list[int]]
_WINDOW = 64  # tokens; how text is split depends on a few words at most
_MANY = 16  # bytes


def canonical_tokens(
    lexicon: Lexicon, encode: Encode, said: Sequence[int], text: bytes, following: Collection[int]
) -> list[int]:
    """The tokens of `text` behind `said` that are certain; none when not even the first one is.

    `encode` spells out special tokens and adds nothing. `following` are the bytes that may come behind `text`. Where
    the tokenizer would have written `said` in another way, `text` is taken by itself.
    """
    said = list(said[_last_added(lexicon, said) + 1 :])
    for before in (said[-_WINDOW:], said, []):
        whole = lexicon.text(before) + text
        tokens = _encode(lexicon, encode, whole)
        if tokens is not None and tokens[: len(before)] == before:
            n_certain = _n_certain(lexicon, encode, whole, tokens, len(before), following)
            return tokens[len(before) : n_certain]
    return []


def _last_added(lexicon: Lexicon, tokens: Sequence[int]) -> int:
    """No token reaches from one side of an added token to the other, and those that were said stay."""
    return next((i for i in range(len(tokens) - 1, -1, -1) if tokens[i] in lexicon.added), -1)


def _encode(lexicon: Lexicon, encode: Encode, text: bytes) -> list[int] | None:
    """None where tokens do not spell the text: it is cut within a character, or the tokenizer changes it."""
    try:
        tokens = encode(text.decode())
    except UnicodeDecodeError:
        return None
    in_range = all(token < lexicon.n_vocab for token in tokens)
    return tokens if in_range and lexicon.text(tokens) == text else None


def _n_certain(
    lexicon: Lexicon, encode: Encode, text: bytes, tokens: Sequence[int], n_before: int, following: Collection[int]
) -> int:
    """How many of the tokens stay as they are whatever comes behind the text, at least `n_before`."""
    if not following:
        return len(tokens)
    last = _last_added(lexicon, tokens)
    starts = [0]
    for token in tokens:
        starts.append(starts[-1] + len(lexicon.pieces[token]))
    n_certain = len(tokens)
    least = max(starts[n_before], len(text) - lexicon.all.longest)
    for at in range(least, len(text)):
        if last >= 0 and starts[last] < at < starts[last + 1]:
            continue  # inside an added token, which was found first
        spellings = lexicon.added_alone if at < starts[last + 1] else lexicon.all
        if _reaches_beyond(spellings, text[at:], following) or _cuts_space(text, at, starts[last + 1]):
            n_certain = min(n_certain, _n_common(tokens, _encode(lexicon, encode, text[:at]) or []))
    return max(n_certain, n_before)


def _reaches_beyond(spellings: Spellings, end: bytes, following: Collection[int]) -> bool:
    """Whether a token begins with `end` and goes on with one of the bytes that may follow."""
    if len(following) > _MANY:  # then one of the first tokens will do
        return any(rest[0] in following for rest, _ in spellings.beyond(end))
    return spellings.begins(end) and any(spellings.begins(end + bytes((byte,))) for byte in following)


def _cuts_space(text: bytes, at: int, behind_added: int) -> bool:
    """Tokenizers split a run of white space one way at the end of a text and another way before a word."""
    return at == len(text) - 1 and at >= behind_added and text[at:].isspace()


def _n_common(one: Sequence[int], other: Sequence[int]) -> int:
    n = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        n += 1
    return n
