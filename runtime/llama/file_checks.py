"""Checks a text file's metadata before native code reads it, for what is known to abort a process or to fill memory.

llama.cpp asserts that no vocabulary entry occurs twice and that the rotary embedding fits its head. It reads lists of
scores and types as long as the vocabulary without checking their length. tokenizers applies whatever a tokenizer.json
says. Unknown problems are found by loading the files once in a child process (`engine.trial`).
"""

from __future__ import annotations

import json
from typing import Any

from granite4v import gguf_keys as keys
from granite4v.errors import ModelFileError
from granite4v.families.hf_fields import MAX_VOCABULARY, MAX_WIDTH
from granite4v.ggml.metadata import AGAIN, GgufMetadata

# Normalizers can lengthen a text: Unicode decompositions by up to 18 times, lower-casing hardly at all. More is an
# attack.
MAX_GROWTH = 64
MAX_AFFIX = 1024  # characters that a normalizer or a decoder adds before or after a text


def check_text(file: GgufMetadata) -> None:
    """Raises ModelFileError for metadata that native code cannot handle."""
    _check_heads(file)
    _check_vocabulary(file)
    source = file.text(keys.TOKENIZER_HF_JSON, "")
    if source:
        _check_tokenizer(file, source)


def _check_heads(file: GgufMetadata) -> None:
    arch = file.text(keys.GENERAL_ARCHITECTURE)
    width = file.integer(keys.text_key(keys.EMBEDDING_LENGTH, arch), 1, MAX_WIDTH)
    heads_key = keys.text_key(keys.HEAD_COUNT, arch)
    if isinstance(file.get(heads_key), list):  # one number per layer, which llama.cpp checks itself
        return
    heads = file.integer(heads_key, 1, width)
    length_key = keys.text_key(keys.KEY_LENGTH, arch)
    head_dim = file.integer(length_key, 1, MAX_WIDTH, 0)
    if not head_dim:
        if width % heads:
            raise ModelFileError(
                f"'{file.path}' has {heads} heads ('{heads_key}') in a width of {width}, expected a number that "
                f"divides it; {AGAIN}."
            )
        head_dim = width // heads
    rope_key = keys.text_key(keys.ROPE_DIMENSION_COUNT, arch)
    rotated = file.integer(rope_key, 0, MAX_WIDTH, 0)
    if rotated > head_dim or rotated % 2:
        raise ModelFileError(
            f"'{file.path}' rotates {rotated} values ('{rope_key}') of heads with {head_dim}, expected an even "
            f"number up to {head_dim}; {AGAIN}."
        )


def _check_vocabulary(file: GgufMetadata) -> None:
    tokens = file.texts(keys.TOKENS)
    if len(set(tokens)) != len(tokens):
        seen: dict[str, int] = {}
        for i, token in enumerate(tokens):
            if token in seen:
                raise ModelFileError(
                    f"'{file.path}' has the vocabulary entry {token!r:.40} twice ('{keys.TOKENS}', {seen[token]} and "
                    f"{i}), expected each once; {AGAIN}."
                )
            seen[token] = i
    for key in (keys.TOKEN_SCORES, keys.TOKEN_TYPES):
        values = file.get(key)
        if values is not None and (not isinstance(values, list) or len(values) != len(tokens)):
            n = f"{len(values):,} values" if isinstance(values, list) else f"{values!r:.40}"
            raise ModelFileError(
                f"'{file.path}' has {n} in '{key}', expected one for each of its {len(tokens):,} tokens; {AGAIN}."
            )
    file.integers(keys.TOKEN_TYPES, 0, MAX_VOCABULARY, [])
    file.texts(keys.TOKEN_MERGES, [])


def _check_tokenizer(file: GgufMetadata, source: str) -> None:
    try:
        tokenizer = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(
            f"'{file.path}' has a '{keys.TOKENIZER_HF_JSON}' that cannot be read ({error}); {AGAIN}."
        ) from None
    for part in ("normalizer", "decoder"):
        steps = list(_steps(tokenizer.get(part))) if isinstance(tokenizer, dict) else []
        growth = 1.0
        for step in steps:
            growth *= _growth(step)
        if growth > MAX_GROWTH or len(steps) > MAX_AFFIX:
            raise ModelFileError(
                f"'{file.path}': the {part} of '{keys.TOKENIZER_HF_JSON}' makes texts {growth:,.0f} times as long in "
                f"{len(steps)} steps, expected at most {MAX_GROWTH}; {AGAIN}."
            )
    for token in _ids(tokenizer):
        if not isinstance(token, int) or not 0 <= token < MAX_VOCABULARY:
            raise ModelFileError(
                f"'{file.path}': '{keys.TOKENIZER_HF_JSON}' has the token id {token!r:.40}, expected 0 to "
                f"{MAX_VOCABULARY - 1:,}; {AGAIN}."
            )


def _steps(part: Any) -> Any:
    """Yields the steps of a normalizer or a decoder; a Sequence, which may be nested, is flattened."""
    waiting = [part]
    while waiting:
        part = waiting.pop()
        if not isinstance(part, dict):
            continue
        inner = part.get("normalizers") or part.get("decoders")
        if isinstance(inner, list):
            waiting += inner
        else:
            yield part


def _growth(step: Any) -> float:
    """The factor by which a step can lengthen a text."""
    if step.get("type") == "Replace":
        pattern, content = step.get("pattern"), step.get("content")
        text = pattern.get("String") if isinstance(pattern, dict) else None
        n_content = len(content) if isinstance(content, str) else 0
        if not isinstance(text, str):  # a regular expression may match at every character
            return 1.0 + n_content
        return max(1.0, n_content / max(len(text), 1))
    affix = step.get("prepend") or step.get("prefix") or ""
    return float("inf") if isinstance(affix, str) and len(affix) > MAX_AFFIX else 1.0


def _ids(tokenizer: Any) -> Any:
    model = tokenizer.get("model") if isinstance(tokenizer, dict) else None
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        yield from vocabulary.values()
    added = tokenizer.get("added_tokens") if isinstance(tokenizer, dict) else None
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict):
            yield token.get("id")
