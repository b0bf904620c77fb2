"""Converts text to token ids and back with the checkpoint's own tokenizer.json, or llama.cpp's tokenizer without one.

Special tokens written in the text are recognised, as in transformers. Knows nothing about images.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import tokenizers

from granite4v import gguf_keys as keys
from granite4v.errors import ModelFileError
from granite4v.families.hf_fields import MAX_VOCABULARY
from granite4v.ggml.metadata import GgufMetadata
from granite4v.runtime.llama.model import LlamaModel
from granite4v.runtime.prompt.detokenizer import ByteStream, TextStream, WindowStream

_SPECIAL_KEYS = {
    "bos_token": keys.BOS_TOKEN_ID,
    "eos_token": keys.EOS_TOKEN_ID,
    "pad_token": keys.PADDING_TOKEN_ID,
    "unk_token": keys.UNKNOWN_TOKEN_ID,
}
_STOP_KEYS = (keys.EOS_TOKEN_ID, keys.EOT_TOKEN_ID, keys.EOM_TOKEN_ID)
_USER_DEFINED = 4  # enum llama_token_type: added to the vocabulary, but ordinary text


@dataclass(frozen=True)
class Vocabulary:
    """The bytes of each id's text; None for an id without text: special, unused, or not in the vocabulary.

    `added`: tokens whose texts the tokenizer cuts out before it splits the rest (leftmost first, the longest if several
    begin there), so that they never merge with their neighbours.
    """

    pieces: tuple[bytes | None, ...]
    added: frozenset[int]


class Tokenizer(Protocol):
    """Converts text to ids and back.

    `encode` recognises special tokens in the text and adds those of the tokenizer's own settings, unless the text
    starts with the bos token. `encode_plain` does neither: special tokens in the text are split like any other text.
    """

    def encode(self, text: str) -> list[int]: ...

    def encode_plain(self, text: str) -> list[int]: ...

    def vocabulary(self) -> Vocabulary: ...

    def decode(self, tokens: Iterable[int]) -> str: ...

    def text_stream(self) -> TextStream: ...

    def close(self) -> None: ...


def load_tokenizer(metadata: GgufMetadata, path: Path) -> Tokenizer:
    """The tokenizer of a text GGUF: its tokenizer.json, or llama.cpp's own where it has none. Raises ModelFileError."""
    source = metadata.text(keys.TOKENIZER_HF_JSON, "")
    if source:
        return HfTokenizer(source, path, special_tokens(metadata).get("bos_token"))
    return LlamaTokenizer(path, metadata.integers(keys.TOKEN_TYPES, 0, MAX_VOCABULARY, ()))


def special_tokens(metadata: GgufMetadata) -> dict[str, str]:
    """The texts of 'bos_token', 'eos_token', ..., for the chat template."""
    ids = {name: _id(metadata, key) for name, key in _SPECIAL_KEYS.items() if key in metadata}
    vocabulary = metadata.texts(keys.TOKENS, []) if ids else []
    return {name: vocabulary[i] for name, i in ids.items() if i is not None and i < len(vocabulary)}


def stop_tokens(metadata: GgufMetadata) -> frozenset[int]:
    """The ids that end an answer: end of text, of turn, of message. Raises ModelFileError when the file has none."""
    found = frozenset(_id(metadata, key) for key in _STOP_KEYS if key in metadata) - {None}
    if not found:
        raise ModelFileError(
            f"'{metadata.path}' has no end-of-text token, expected a token id in '{keys.EOS_TOKEN_ID}'; convert it "
            "again with 'granite4v convert'."
        )
    return frozenset(token for token in found if token is not None)


def _id(metadata: GgufMetadata, key: str) -> int | None:
    """A token id; None for the values by which other converters mean 'none' (-1 and 2^32 - 1)."""
    if metadata[key] in (-1, 0xFFFFFFFF):
        return None
    return int(metadata.integer(key, 0, MAX_VOCABULARY - 1))


def token_id(metadata: GgufMetadata, text: str) -> int | None:
    """The id of a token of the vocabulary, by its exact text."""
    try:
        return int(metadata.texts(keys.TOKENS, []).index(text))
    except ValueError:
        return None


def added_token(metadata: GgufMetadata, token: int) -> str | None:
    """The text of a token that tokenizer.json adds to its vocabulary; None if it adds no such token."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        added = json.loads(metadata.text(keys.TOKENIZER_HF_JSON, ""))["added_tokens"]
        return next((str(entry["content"]) for entry in added if entry["id"] == token), None)
    return None


class HfTokenizer:
    """tokenizer.json through the `tokenizers` library."""

    def __init__(self, source: str, path: Path, bos_token: str | None) -> None:
        self._path, self._bos_token = path, bos_token
        # guards the setting encode_special_tokens: the engine's thread may encode forced text at any moment
        self._lock = threading.Lock()
        with self._explained("cannot be read"):
            self._tokenizer = tokenizers.Tokenizer.from_str(source)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Turns the library's errors into ModelFileError.

        It raises bare Exception for every error in the JSON, and its Rust panics derive only from BaseException.
        """
        try:
            yield
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:
            raise ModelFileError(
                f"'{self._path}' has a '{keys.TOKENIZER_HF_JSON}' that {what} ({error!s:.200}); convert it again."
            ) from None

    def encode(self, text: str) -> list[int]:
        add_special = not (self._bos_token and text.startswith(self._bos_token))
        return self._encode(text, plain=False, add_special=add_special)

    def encode_plain(self, text: str) -> list[int]:
        return self._encode(text, plain=True, add_special=False)

    def _encode(self, text: str, *, plain: bool, add_special: bool) -> list[int]:
        with self._lock, self._explained("cannot tokenize this text"):
            self._tokenizer.encode_special_tokens = plain
            return list(self._tokenizer.encode(text, add_special_tokens=add_special).ids)

    def vocabulary(self) -> Vocabulary:
        added = self._tokenizer.get_added_tokens_decoder()
        if isinstance(self._tokenizer.decoder, tokenizers.decoders.ByteLevel):
            pieces = self._byte_level_pieces(added)
        else:
            # llama.cpp knows the bytes of a piece for every kind of vocabulary; the ids are the same in both
            with contextlib.closing(LlamaTokenizer(self._path)) as other:
                pieces = list(other.vocabulary().pieces)
        pieces += [None] * (max(added, default=-1) + 1 - len(pieces))
        for token, info in added.items():
            pieces[token] = None if info.special else info.content.encode()
        return Vocabulary(tuple(pieces), frozenset(token for token, info in added.items() if not info.special))

    def _byte_level_pieces(self, added: Container[int]) -> list[bytes | None]:
        found = self._tokenizer.get_vocab(with_added_tokens=True)
        byte_of = byte_of_letter()
        pieces: list[bytes | None] = [None] * (max(found.values(), default=-1) + 1)
        for text, token in found.items():
            if token not in added and byte_of.keys() >= set(text):
                pieces[token] = bytes(byte_of[letter] for letter in text)
        return pieces

    def decode(self, tokens: Iterable[int]) -> str:
        with self._explained("cannot decode these tokens"):
            return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def text_stream(self) -> TextStream:
        return WindowStream(self.decode)

    def close(self) -> None:
        pass


def byte_of_letter() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for.

    GPT-2's table (`bytes_to_unicode`): printable bytes stand for themselves, the others are numbered from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


class LlamaTokenizer:
    """llama.cpp's own tokenizer with the file's vocabulary. `types` are the file's token types, if it has any."""

    def __init__(self, path: Path, types: Sequence[int] = ()) -> None:
        self._model: LlamaModel = LlamaModel(path, vocab_only=True)
        self._types = types

    def encode(self, text: str) -> list[int]:
        return self._model.tokenize(text)

    def encode_plain(self, text: str) -> list[int]:
        return self._model.tokenize(text, plain=True)

    def vocabulary(self) -> Vocabulary:
        pieces = tuple(self._model.piece(token) or None for token in range(self._model.n_vocab))
        added = (i for i, kind in enumerate(self._types) if kind == _USER_DEFINED and pieces[i] is not None)
        return Vocabulary(pieces, frozenset(added))

    def decode(self, tokens: Iterable[int]) -> str:
        return b"".join(self._model.piece(token) for token in tokens).decode("utf-8", "replace")

    def text_stream(self) -> TextStream:
        return ByteStream(self._model.piece)

    def close(self) -> None:
        self._model.close()
