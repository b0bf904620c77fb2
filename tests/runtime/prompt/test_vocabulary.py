"""Tests of the vocabulary of a model, from tokenizer.json and from llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from granite4v.ggml.gguf_file import GgufFile
from granite4v.runtime.prompt.tokenizer import HfTokenizer, LlamaTokenizer, load_tokenizer
from tests.helpers.gguf_edit import copy_gguf
from tests.toy.spec import PRESETS


@pytest.fixture(scope="module")
def text_file(make_model: Callable[..., Path]) -> Path:
    return make_model(PRESETS["tiny"]) / "text-F32.gguf"


def test_the_vocabulary_is_the_same_from_tokenizer_json_and_from_llama_cpp(text_file: Path, tmp_path: Path) -> None:
    bare = copy_gguf(text_file, tmp_path / "text.gguf", without=["tokenizer.huggingface"])
    with GgufFile.open(text_file) as file, GgufFile.open(bare) as other:
        ours, theirs = load_tokenizer(file, text_file), load_tokenizer(other, bare)
    assert isinstance(ours, HfTokenizer) and isinstance(theirs, LlamaTokenizer)
    assert ours.vocabulary() == theirs.vocabulary()
    texts = {piece for piece in ours.vocabulary().pieces if piece}
    assert {b"<fcel>", b"<nl>", bytes([0xC3])} <= texts
    assert not {b"<|end_of_text|>", b"<image>", b"<|pad|>"} & texts
    for text in ("<otsl>a<|end_of_text|>", "<image>é"):
        assert ours.encode_plain(text) == theirs.encode_plain(text)
        assert b"".join(ours.vocabulary().pieces[t] or b"?" for t in ours.encode_plain(text)) == text.encode()
    assert ours.encode("<|end_of_text|>") != ours.encode_plain("<|end_of_text|>")
    theirs.close()


def test_another_kind_of_tokenizer_is_spelled_by_llama_cpp(text_file: Path) -> None:
    """Here tokenizer.json belongs to a model whose pieces are characters, not bytes."""
    with GgufFile.open(text_file) as file:
        ours = load_tokenizer(file, text_file)
        assert isinstance(ours, HfTokenizer)
        source = json.loads(file["tokenizer.huggingface.json"])
    source["decoder"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    assert HfTokenizer(json.dumps(source), text_file, None).vocabulary() == ours.vocabulary()
