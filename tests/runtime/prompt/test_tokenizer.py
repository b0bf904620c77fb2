"""Tests of ids and text, compared with transformers on the checkpoint's tokenizer.json; llama.cpp's vocabulary is the
fallback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from granite4v.errors import ModelFileError
from granite4v.ggml.gguf_file import GgufFile
from granite4v.ggml.metadata import GgufMetadata
from granite4v.runtime.prompt.tokenizer import (
    HfTokenizer,
    LlamaTokenizer,
    Tokenizer,
    load_tokenizer,
    special_tokens,
    stop_tokens,
    token_id,
)
from tests.helpers.gguf_edit import copy_gguf
from tests.toy.language import END_OF_TEXT, IMAGE, START_OF_ROLE
from tests.toy.spec import PRESETS

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "Total: 1234567890.12 EUR, 31415926535897932384626433832795",
    "L'été, größer, 東京, Привет, 🧾🧾 and \t tabs\r\n\n  newlines",
    f"{START_OF_ROLE}user<|end_of_role|>{IMAGE}\nWhat?{END_OF_TEXT}\n",
    "<otsl><fcel>1<nl></otsl> <|not a token|>",
    '{"cells": [{"row": 1, "col": 2}]}',
]


@pytest.fixture(scope="module")
def text_file(make_model: Callable[..., Path]) -> Path:
    return make_model(PRESETS["tiny"]) / "text-F32.gguf"


@pytest.fixture(scope="module")
def reference(make_checkpoint: Callable[..., Path]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(make_checkpoint(PRESETS["tiny"]))


@pytest.fixture(scope="module")
def ours(text_file: Path) -> Tokenizer:
    with GgufFile.open(text_file) as file:
        tokenizer = load_tokenizer(file, text_file)
    assert isinstance(tokenizer, HfTokenizer)
    return tokenizer


@pytest.fixture(scope="module")
def llama(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    bare = copy_gguf(text_file, tmp_path_factory.mktemp("bare") / "text.gguf", without=["tokenizer.huggingface"])
    with GgufFile.open(bare) as file:
        tokenizer = load_tokenizer(file, bare)
    assert isinstance(tokenizer, LlamaTokenizer)
    yield tokenizer
    tokenizer.close()


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_are_the_references(ours: Tokenizer, reference: Any, text: str) -> None:
    ids = ours.encode(text)
    assert ids == reference(text).input_ids
    assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("text", TEXTS)
def test_llama_cpps_tokenizer_agrees_where_it_splits_alike(llama: Tokenizer, ours: Tokenizer, text: str) -> None:
    assert llama.encode(text) == ours.encode(text)
    assert llama.decode(ours.encode(text)) == ours.decode(ours.encode(text))


@pytest.mark.parametrize("kind", ["ours", "llama"])
def test_streamed_text_is_the_whole_text(request: pytest.FixtureRequest, kind: str) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        stream = tokenizer.text_stream()
        assert "".join(stream.push(i) for i in ids) + stream.flush() == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["ours", "llama"])
def test_a_character_is_held_back_until_it_is_whole(request: pytest.FixtureRequest, kind: str) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    ids = tokenizer.encode("🧾")
    assert len(ids) > 1  # several tokens, none of them a complete character
    stream = tokenizer.text_stream()
    assert [stream.push(i) for i in ids] == [""] * (len(ids) - 1) + ["🧾"]
    assert stream.push(ids[0]) == "" and stream.flush() == "\N{REPLACEMENT CHARACTER}"


def test_special_and_stop_tokens_come_from_the_file(text_file: Path, reference: Any) -> None:
    with GgufFile.open(text_file) as file:
        assert special_tokens(file)["eos_token"] == reference.eos_token
        assert stop_tokens(file) == {reference.eos_token_id}
        assert token_id(file, IMAGE) == reference.convert_tokens_to_ids(IMAGE)
        assert token_id(file, "<no such token>") is None


def test_a_file_without_an_end_of_text_is_an_error() -> None:
    with pytest.raises(ModelFileError, match="has no end-of-text token"):
        stop_tokens(GgufMetadata("text.gguf", {}))


def test_a_broken_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="'tokenizer.huggingface.json' that cannot be read"):
        load_tokenizer(GgufMetadata("text.gguf", {"tokenizer.huggingface.json": "{"}), tmp_path / "text.gguf")


def test_nothing_is_added_when_the_text_starts_with_the_bos_token(text_file: Path) -> None:
    """As in the reference, for tokenizers that put a bos token before every text by their own settings."""
    with GgufFile.open(text_file) as file:
        source = file["tokenizer.huggingface.json"]
    import tokenizers

    adding = tokenizers.Tokenizer.from_str(source)
    end = adding.token_to_id(END_OF_TEXT)
    adding.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, end)]
    )
    tokenizer = HfTokenizer(adding.to_str(), text_file, END_OF_TEXT)
    assert tokenizer.encode("x")[0] == end
    assert tokenizer.encode(f"{END_OF_TEXT}x") == tokenizer.encode("x")
