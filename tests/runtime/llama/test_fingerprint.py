"""Tests of the checksums of a model's files."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from granite4v.errors import ModelFileError
from granite4v.runtime.extract import extract
from granite4v.runtime.llama.fingerprint import file_hash
from tests.helpers.gguf_edit import copy_gguf
from tests.helpers.pictures import text_picture
from tests.toy.spec import PRESETS


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRANITE4V_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "checksums.json"


def test_a_split_file_is_that_of_all_its_parts(tmp_path: Path) -> None:
    parts = [tmp_path / f"text-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
    for i, part in enumerate(parts):
        part.write_bytes(bytes([i]) * 10)
    first = file_hash(parts[0], print)
    each = "".join(hashlib.sha256(part.read_bytes()).hexdigest() for part in parts)
    assert first == hashlib.sha256(each.encode()).hexdigest() == file_hash(parts[0], print)
    parts[2].write_bytes(b"other")
    assert file_hash(parts[0], print) != first
    parts[1].unlink()
    with pytest.raises(ModelFileError, match=r"text-00002-of-00003.gguf' cannot be read: No such file"):
        file_hash(parts[0], print)
    (tmp_path / "one-00001-of-00001.gguf").write_bytes(b"x")
    assert file_hash(tmp_path / "one-00001-of-00001.gguf", print) == hashlib.sha256(b"x").hexdigest()


def test_a_file_of_the_same_size_and_date_is_another_one(tmp_path: Path) -> None:
    """As after `cp -p` of another model of the same quantization, or from reproducible archives."""
    path = tmp_path / "a.gguf"
    for content in (b"first", b"other", b"third"):
        if content == b"other":
            path.write_bytes(content)  # the same inode
        else:
            (tmp_path / "new").write_bytes(content)
            os.utime(tmp_path / "new", (5, 5))
            (tmp_path / "new").replace(path)
        os.utime(path, (5, 5))
        assert file_hash(path, print) == hashlib.sha256(content).hexdigest()


def test_a_file_that_grows_meanwhile_has_no_checksum(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"begun")

    with pytest.raises(ModelFileError, match=r"a.gguf' changes while it is read"):
        file_hash(path, print, lambda: os.truncate(path, 9))
    assert not cache.exists()


def test_extract_reads_with_a_split_model(make_model: Callable[..., Path], tmp_path: Path) -> None:
    whole = make_model(PRESETS["tiny"])
    split = tmp_path / "split"
    split.mkdir()
    for path in whole.glob("*.gguf"):
        if path.name.startswith("mmproj"):
            shutil.copy(path, split / path.name)
        else:
            copy_gguf(path, split / "text.gguf", tensors_a_part=10)
    text_picture((60, 90)).save(tmp_path / "a.png")
    assert len(list(split.glob("text-0000?-of-*.gguf"))) > 1
    found = list(
        extract(tmp_path / "a.png", "tables_html", model=split, max_tokens=3, n_threads=1, out=tmp_path / "out")
    )
    assert [record.error for record in found] == [None] and len(found[0].model["text"]) == 64


@pytest.mark.parametrize("content", ["{", "[" * 100_000, "[]", '{"x": 5}', "\x00"])
def test_a_damaged_cache_is_made_anew(tmp_path: Path, cache: Path, content: str) -> None:
    (tmp_path / "a.gguf").write_bytes(b"weights")
    expected = hashlib.sha256(b"weights").hexdigest()
    assert file_hash(tmp_path / "a.gguf", print) == expected
    known = cache.read_text()
    cache.write_text(content)
    assert file_hash(tmp_path / "a.gguf", print) == expected
    cache.write_text(known.replace(expected, "x"))
    assert file_hash(tmp_path / "a.gguf", print) == expected
    cache.write_text(known.replace(f'"{expected}"', "5"))
    assert file_hash(tmp_path / "a.gguf", print) == expected
