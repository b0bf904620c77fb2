"""Tests of trials in a child process: files that would end this process or fill its memory are refused before it loads
them, and good ones are tried only once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import granite4v
from granite4v import child
from granite4v.child import Ended, run_main
from granite4v.errors import DeviceError, ModelFileError
from granite4v.ggml.metadata import GgufMetadata
from granite4v.runtime.engine import trial
from granite4v.runtime.llama.file_checks import check_text
from granite4v.runtime.llama.files import ModelFiles
from tests.helpers.gguf_edit import copy_gguf
from tests.toy.spec import PRESETS

TINY = PRESETS["tiny"]


@pytest.fixture
def folder(make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRANITE4V_CACHE", str(tmp_path / "cache"))
    return shutil.copytree(make_model(TINY), tmp_path / "model")


def try_(path: Path) -> None:
    with ModelFiles.open(path) as files:
        trial.try_once(files)


def test_a_good_model_is_tried_once_for_each_state_of_its_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def counted(module: str, *arguments: Any) -> Ended:
        tried.append(module)
        return run_main(module, *arguments)

    monkeypatch.setattr(trial, "run_main", counted)
    try_(folder)
    try_(folder)
    assert len(tried) == 1
    os.utime(folder / "text-F32.gguf", (1, 1))
    try_(folder)
    assert len(tried) == 2


ENDS = [
    (
        Ended(-int(signal.SIGABRT), "", "/tmp/b/x.cpp:1: GGML_ASSERT(n_rot <= 8) failed\n#0 in main\n"),
        ["by SIGABRT", "GGML_ASSERT(n_rot <= 8)"],
    ),
    (Ended(-int(signal.SIGSEGV), "", ""), ["by SIGSEGV"]),
    (Ended(None, "", ""), ["after a timeout"]),
    (Ended(1, "", "Traceback ...\nKeyError: 5"), ["with status 1", "KeyError: 5"]),
    (Ended(0, "", ""), ["with status 0"]),
    (Ended(0, '["NoSuchError", "x"]', ""), ["with status 0"]),
    (Ended(0, 'noise\n["ModelFileError", "its own words"]', ""), ["its own words"]),
]


@pytest.mark.parametrize(("ended", "words"), ENDS)
def test_how_a_process_ended_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, ended: Ended, words: list[str]
) -> None:
    monkeypatch.setattr(trial, "run_main", lambda *arguments: ended)
    for _ in range(2):  # a failure is not remembered
        with pytest.raises(ModelFileError) as caught:
            try_(folder)
        assert all(word in str(caught.value) for word in words)
    if "own words" not in words[0]:
        assert str(folder / "text-F32.gguf") in str(caught.value)


def test_a_lack_of_memory_is_not_the_files_fault(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stderr in ("terminate called after throwing an instance of 'std::bad_alloc'", "MemoryError"):
        ended = Ended(-int(signal.SIGABRT), "", stderr)
        monkeypatch.setattr(trial, "run_main", lambda *arguments, ended=ended: ended)
        with pytest.raises(DeviceError, match="Memory is short: close other programs"):
            try_(folder)


def test_without_another_process_the_load_itself_must_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "")
    try_(folder)


def test_a_child_that_aborts_hangs_or_floods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ending.py").write_text(
        "import os, sys, time\n"
        "def main(how):\n"
        "    if how == 'abort': print('GGML_ASSERT failed', file=sys.stderr, flush=True); os.abort()\n"
        "    if how == 'hang': time.sleep(600)\n"
        "    if how == 'flood': print('x' * 10**6, file=sys.stderr)\n"
        "    print('ok')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    ended = run_main("ending", ["abort"], 60)
    assert (ended.status, ended.how, ended.reason) == (-int(signal.SIGABRT), "by SIGABRT", "GGML_ASSERT failed")
    assert run_main("ending", ["flood"], 60).stdout == "ok\n"
    said: list[int] = []
    monkeypatch.setattr(child, "ANNOUNCE_AFTER_S", 0.1)
    start = time.monotonic()
    assert run_main("ending", ["hang"], 0.5, lambda: said.append(1)).status is None
    assert said == [1] and time.monotonic() - start < 60


def test_a_module_in_the_current_folder_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('taken')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert run_main("granite4v.child", [], 60).stderr.endswith("has no attribute 'main'\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"granite.rope.dimension_count": 32},
            "rotates 32 values ('granite.rope.dimension_count') of heads with 16",
        ),
        ({"granite.rope.dimension_count": 7}, "rotates 7 values"),
        ({"granite.attention.head_count": 0}, "'granite.attention.head_count' is 0, expected an integer from 1"),
        ({"granite.attention.head_count": 5}, "has 5 heads ('granite.attention.head_count') in a width of 64"),
        ({"granite.attention.head_count_kv": 3}, "wrong shape"),
        ({"granite.block_count": 9}, "tensor 'blk.8.attn_norm.weight' not found"),
        ({"tokenizer.ggml.model": "none of ours"}, "unknown tokenizer"),
    ],
)
def test_hyperparameters_that_do_not_fit_are_said(folder: Path, change: dict[str, Any], message: str) -> None:
    path = folder / "text-F32.gguf"
    copy_gguf(path, folder / "copy.gguf", change=change, without=["granite.deepstack"]).replace(path)
    (folder / "mmproj-F32.gguf").unlink()
    with pytest.raises(ModelFileError) as caught:
        try_(folder)
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_a_vocabulary_over_which_llama_cpp_ends_the_process(folder: Path) -> None:
    """A SentencePiece model needs a token for each byte; without them llama.cpp throws, and nothing catches it."""
    path = folder / "text-F32.gguf"
    change = {"tokenizer.ggml.model": "llama"}
    copy_gguf(path, folder / "copy.gguf", change=change, without=["tokenizer.huggingface"]).replace(path)
    with granite4v.load(folder, device="cpu") as model, pytest.raises(ModelFileError, match="ends by SIG.* to load"):
        model.logits("x")


def test_a_vocabulary_entry_twice_is_said(folder: Path) -> None:
    path = folder / "text-F32.gguf"
    with ModelFiles.open(folder) as files:
        tokens = files.text["tokenizer.ggml.tokens"]
    change = {"tokenizer.ggml.tokens": [*tokens[:7], tokens[3], *tokens[8:]]}
    copy_gguf(path, folder / "copy.gguf", change=change).replace(path)
    with granite4v.load(folder, device="cpu") as model, pytest.raises(ModelFileError, match="twice .*, 3 and 7"):
        model.logits("x")


def metadata(tokenizer: Any = None, **changes: Any) -> GgufMetadata:
    values: dict[str, Any] = {
        "general.architecture": "llama",
        "llama.embedding_length": 64,
        "llama.attention.head_count": 4,
        "tokenizer.ggml.tokens": ["a", "b"],
    }
    if tokenizer is not None:
        values["tokenizer.huggingface.json"] = tokenizer if isinstance(tokenizer, str) else json.dumps(tokenizer)
    return GgufMetadata("text.gguf", {**values, **changes})


def replace(text: str, by: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": text}, "content": by}


GROWING: list[tuple[Any, str]] = [
    ({"normalizer": replace("a", "b" * 65)}, "the normalizer of .* makes texts 65 times as long"),
    ({"normalizer": {"type": "Sequence", "normalizers": [replace("a", "aa")] * 40}}, "in 40 steps"),
    (
        {
            "normalizer": {
                "type": "Sequence",
                "normalizers": [{"type": "Sequence", "normalizers": [replace("a", "a" * 9)] * 2}],
            }
        },
        "81 times",
    ),
    ({"normalizer": {"type": "Replace", "pattern": {"Regex": "x*"}, "content": "y" * 64}}, "65 times"),
    ({"decoder": {"type": "Sequence", "decoders": [replace("a", "a" * 100)]}}, "the decoder of .* 100 times"),
    ({"normalizer": {"type": "Prepend", "prepend": "x" * 2000}}, "inf times"),
    ({"model": {"vocab": {"a": 1 << 40}}}, "has the token id 1099511627776"),
    ({"added_tokens": [{"id": -1}]}, "has the token id -1"),
    ({"added_tokens": [{"id": "x"}]}, "has the token id 'x'"),
    ("{", "that cannot be read"),
    ("[" * 100_000, "that cannot be read"),
]


@pytest.mark.parametrize(("tokenizer", "message"), GROWING, ids=[message[:30] for _, message in GROWING])
def test_a_tokenizer_that_would_fill_memory_is_said(tokenizer: Any, message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        check_text(metadata(tokenizer))


@pytest.mark.parametrize(
    "tokenizer",
    [
        {
            "normalizer": {
                "type": "Sequence",
                "normalizers": [{"type": "NFKC"}, replace(" ", "\N{LOWER ONE EIGHTH BLOCK}")],
            }
        },
        {"normalizer": {"type": "Prepend", "prepend": "\N{LOWER ONE EIGHTH BLOCK}"}, "decoder": {"type": "ByteLevel"}},
        {"normalizer": None, "model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 5}]},
        [],
    ],
)
def test_tokenizers_as_they_are_published_pass(tokenizer: Any) -> None:
    check_text(metadata(tokenizer))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tokenizer.ggml.token_type": [1]},
            "has 1 values in 'tokenizer.ggml.token_type', expected one for each of its 2",
        ),
        ({"tokenizer.ggml.scores": "x"}, "has 'x' in 'tokenizer.ggml.scores'"),
        ({"tokenizer.ggml.tokens": 5}, "'tokenizer.ggml.tokens' is 5, expected a list of texts"),
        ({"tokenizer.ggml.merges": [1]}, "'tokenizer.ggml.merges' holds a list of 1"),
    ],
)
def test_lists_that_llama_cpp_would_read_beyond_their_end(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        check_text(metadata(**changes))


@pytest.mark.parametrize("n_threads", [0, -1, 10**9, 513, 1.5, True])
def test_numbers_of_threads_that_ggml_cannot_start(folder: Path, n_threads: Any) -> None:
    with pytest.raises(DeviceError, match="the number of threads is .*, expected 1 to 512"):
        granite4v.load(folder, device="cpu", n_threads=n_threads)
