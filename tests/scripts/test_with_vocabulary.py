"""A vocabulary given by ranks: its merges are the trained ones, and a text file gets it without other changes."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from granite4v import gguf_keys as keys
from scripts.with_vocabulary import MERGES, copy, merges, read_ranks, spelled
from tests.toy.spec import PRESETS

TEXT = "the theatre there, in the other tent: an assistant and the assistants' tests, naïve or not, 1234 and 12345"


@pytest.fixture(scope="module")
def trained() -> dict[str, dict[str, int] | list[list[str]]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    found = json.loads(tokenizer.to_str())["model"]
    return {"vocab": found["vocab"], "merges": found["merges"]}


def ranks_file(vocab: dict[str, int]) -> bytes:
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    lines = [f"{base64.b64encode(bytes(byte_of[c] for c in token)).decode()} {rank}" for token, rank in vocab.items()]
    return "\n".join(lines).encode()


def test_merges_are_those_of_the_training(trained: dict[str, dict[str, int] | list[list[str]]]) -> None:
    vocab, expected = trained["vocab"], trained["merges"]
    assert isinstance(vocab, dict) and len(expected) == 300 - 256
    assert [[spelled(a), spelled(b)] for a, b in merges(read_ranks(ranks_file(vocab)))] == expected


def test_a_token_that_no_merge_makes_is_refused() -> None:
    with pytest.raises(ValueError, match="b'abc' is not made of two others"):
        merges({b"a": 0, b"b": 1, b"c": 2, b"abc": 3})


def test_a_text_file_gets_the_vocabulary(
    trained: dict[str, dict[str, int] | list[list[str]]], make_model: Callable[..., Path], tmp_path: Path
) -> None:
    (text,) = make_model(PRESETS["tiny"]).glob("text-*.gguf")
    vocab = trained["vocab"]
    assert isinstance(vocab, dict)
    copy(text, read_ranks(ranks_file(vocab)), tmp_path / "out.gguf")
    before, after = gguf.GGUFReader(text), gguf.GGUFReader(tmp_path / "out.gguf")
    tokens = after.fields[keys.TOKENS].contents()
    assert tokens[:300] == sorted(vocab, key=vocab.__getitem__)
    assert tokens[300:] == before.fields[keys.TOKENS].contents()[300:]
    assert after.fields[MERGES].contents() == [" ".join(pair) for pair in trained["merges"]]
    changed = {keys.TOKENS, MERGES, keys.TOKENIZER_HF_JSON}
    kept = {name for name in before.fields if not name.startswith("GGUF.")} - changed
    assert all(after.fields[name].contents() == before.fields[name].contents() for name in kept)
    assert keys.TOKENIZER_HF_JSON in before.fields and keys.TOKENIZER_HF_JSON not in after.fields
    for old, new in zip(before.tensors, after.tensors, strict=True):
        assert old.name == new.name and old.tensor_type == new.tensor_type and (old.data == new.data).all()
