"""Other things in place of a checkpoint's files, and invalid safetensors headers."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from granite4v.converter import plan_conversion
from tests.helpers.damaged import change_header, read_raw, refusal, write_raw
from tests.toy.checkpoint import PRESETS, CheckpointSpec

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 8000\n"
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "chat_template.jinja")


@pytest.fixture
def source(make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path: Path) -> Path:
    return shutil.copytree(make_checkpoint(PRESETS["tiny"]), tmp_path / "source")


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Frees a file's name for something else, and restores the file afterwards."""
    aside = path.with_name("aside")
    path.rename(aside)
    yield path
    path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    aside.rename(path)


# --- other things in a file's place ---


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LFS_POINTER, "is a Git LFS pointer, not the file itself; run 'git lfs pull'"),
        (b"<!DOCTYPE html>\n<html><body>404</body></html>", "is a web page, perhaps an error message of the server"),
        (b"", "is empty; download it again"),
    ],
    ids=["LFS pointer", "web page", "empty"],
)
def test_a_placeholder_is_named(content: bytes, message: str, source: Path) -> None:
    for name in (*FILES, "model.safetensors"):
        with replaced(source / name) as path:
            path.write_bytes(content)
            assert f"'{path}' {message}" in refusal(source)


@pytest.mark.parametrize("kind", ["pipe", "directory", "device", "link to itself", "link to nothing"])
def test_only_regular_files_are_opened(kind: str, source: Path) -> None:
    """Opening a pipe would wait for its writer forever."""
    expected = {"link to itself": "symbolic links", "link to nothing": "is a link to '../blobs/4d7a21', which does"}
    for name in (*FILES, "model.safetensors"):
        targets = {"device": "/dev/zero", "link to itself": name, "link to nothing": "../blobs/4d7a21"}
        with replaced(source / name) as path:
            if kind == "pipe":
                os.mkfifo(path)
            elif kind == "directory":
                path.mkdir()
            else:
                path.symlink_to(targets[kind])
            message = refusal(source)
            assert f"'{path}'" in message
            assert expected.get(kind, "expected a file") in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": ', "is not valid JSON ("),
        (b"[1, 2]", "holds a list; expected a JSON object"),
        (b"null", "holds null; expected a JSON object"),
        (b'{"a": 1}'.decode().encode("utf-16"), "is UTF-16; expected UTF-8"),
        (b'{"a": "\xff"}', "is not UTF-8 (byte 7)"),
        (b'{"a":' * 200 + b"1" + b"}" * 200, "is nested too deeply; expected at most 100 levels"),
        (b'{"a":' * 100_000, "is nested too deeply"),
        (b'{"a": "\\ud800"}', "holds half of a surrogate pair (\\ud800)"),
    ],
    ids=["cut", "list", "null", "UTF-16", "not UTF-8", "deep", "deeper", "surrogate"],
)
def test_invalid_json(content: bytes, message: str, source: Path) -> None:
    for name in FILES[:4]:
        with replaced(source / name) as path:
            path.write_bytes(content)
            assert f"'{path}' {message}" in refusal(source)


def test_a_byte_order_mark_is_skipped(source: Path) -> None:
    path = source / "config.json"
    expected = plan_conversion(source).files[0].metadata
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert plan_conversion(source).files[0].metadata == expected


# --- safetensors headers ---


def put(name: str, **fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[name].update(fields)


NAME = "model.image_newline"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.update({NAME: 5}), f"'{NAME}' in 'model.safetensors' has a header entry without dtype, shape or"),
        (lambda h: h.update({NAME: [["dtype", "F32"]]}), "has a header entry without dtype, shape or offsets"),
        (put(NAME, shape=["64"]), "has a header entry without dtype, shape or offsets"),
        (put(NAME, shape=[64.0]), "has a header entry without dtype, shape or offsets"),
        (put(NAME, shape=[True]), "has a header entry without dtype, shape or offsets"),
        (put(NAME, data_offsets=[-256, 0]), "has a header entry without dtype, shape or offsets"),
        (put(NAME, data_offsets=[0, 2**80]), "has a header entry without dtype, shape or offsets"),
        (put(NAME, data_offsets=[256, 0]), "has -256 bytes for F32 [64]"),
        (put(NAME, shape=[2**62, 2**62]), "bytes for F32 [4611686018427387904, 4611686018427387904]"),
        (put(NAME, shape=[2**61, 8], data_offsets=[0, 0]), "has 0 bytes for F32 [2305843009213693952, 8]"),
        (put(NAME, dtype="F33"), f"'{NAME}' in 'model.safetensors' has type F33; expected F32, F16, BF16"),
        (put(NAME, data_offsets=[0, 256]), " overlap in 'model.safetensors'"),
        (lambda h: h.update({"\x1b[2J": h[NAME]}), "unknown tensor '\\x1b[2J'"),
    ],
)
def test_header_entries_that_are_wrong(change: Callable[[dict[str, Any]], Any], message: str, source: Path) -> None:
    change_header(source / "model.safetensors", change)
    assert message in refusal(source)


@pytest.mark.parametrize(
    "header",
    [b"[]", b"null", b'"a"', b"5", b"{" * 1000, b"[" * 100_000, b'{"a": ', b"\xff\xfe{\x00"],
    ids=["list", "null", "text", "number", "cut", "deep", "cut entry", "UTF-16"],
)
def test_a_header_that_is_no_object(header: bytes, source: Path) -> None:
    write_raw(source / "model.safetensors", header, b"")
    assert "has a broken safetensors header (not " in refusal(source)


def test_more_tensors_than_any_model_has(source: Path) -> None:
    """Each tensor would be searched for in every table."""
    entry = b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = b"{" + b",".join(entry % i for i in range(100_001)) + b"}"
    write_raw(source / "model.safetensors", header, b"")
    assert "has 100,001 tensors; expected at most 100,000" in refusal(source)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**8])
def test_a_header_longer_than_its_file(length: int, source: Path) -> None:
    raw = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(struct.pack("<Q", length) + raw[8:])
    assert "its header does not fit in" in refusal(source)


@pytest.mark.parametrize(
    ("file", "shown"),
    [("../other.safetensors", "'../other.safetensors'"), ("/etc/x.safetensors", "'/etc/x.safetensors'"), (7, "7")],
)
def test_an_index_that_points_elsewhere(file: Any, shown: str, source: Path) -> None:
    (source / "model.safetensors").rename(source.parent / "other.safetensors")
    index = {"weight_map": {NAME: file}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"places tensors in {shown}; expected the name of a .safetensors file beside it" in refusal(source)


@pytest.mark.parametrize(
    ("dtype", "n_bytes"), [("I64", 8), ("I32", 4), ("BOOL", 1), ("F64", 8)], ids=["I64", "I32", "BOOL", "F64"]
)
def test_buffers_that_are_dropped_may_be_of_any_type(dtype: str, n_bytes: int, source: Path) -> None:
    expected = plan_conversion(source)
    header, data = read_raw(source / "model.safetensors")
    names = [
        "model.vision_tower.embeddings.position_ids",
        "model.language_model.layers.0.self_attn.rotary_emb.inv_freq",
    ]
    for name in names:
        header[name] = {"dtype": dtype, "shape": [1, 64], "data_offsets": [len(data), len(data) + 64 * n_bytes]}
        data += bytes(64 * n_bytes)
    write_raw(source / "model.safetensors", header, data)
    found = plan_conversion(source)
    assert {name for name, _ in found.dropped} - {name for name, _ in expected.dropped} == set(names)
    assert [t.name for f in found.files for t in f.tensors] == [t.name for f in expected.files for t in f.tensors]
