"""The parser of GGUF headers: the same values as the gguf package's reader, and a reason for everything invalid."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from granite4v.errors import ModelFileError
from granite4v.ggml.gguf_file import GgufFile
from tests.toy.spec import PRESETS

U8, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10


def string(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def tensor(name: bytes = b"w", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def content(
    *parts: bytes,
    version: int = 3,
    n_tensors: int | None = None,
    n_keys: int | None = None,
    tensors: tuple[bytes, ...] = (),
    data: int = 4096,
) -> bytes:
    """Returns a GGUF file with these metadata pairs and tensor entries, followed by `data` bytes of data."""
    counts = struct.pack(
        "<QQ", len(tensors) if n_tensors is None else n_tensors, len(parts) if n_keys is None else n_keys
    )
    return b"GGUF" + struct.pack("<I", version) + counts + b"".join(parts) + b"".join(tensors) + bytes(data)


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[bytes], GgufFile]:
    def open_(data: bytes) -> GgufFile:
        path = tmp_path / "f.gguf"
        path.write_bytes(data)
        return GgufFile.open(path)

    return open_


@pytest.mark.parametrize("name", ["text-Q4_K_M.gguf", "mmproj-Q8_0.gguf"])
def test_everything_is_as_the_gguf_package_reads_it(make_model: Callable[..., Path], name: str) -> None:
    path = make_model(PRESETS["tiny"], "Q4_K_M", "Q8_0") / name
    reader = gguf.GGUFReader(path)
    with GgufFile.open(path) as file:
        theirs = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
        assert dict(file) == theirs
        assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
        for other in reader.tensors:
            ours = file.tensors[other.name]
            assert (ours.type_name, ours.offset, ours.nbytes) == (
                other.tensor_type.name,
                other.data_offset,
                other.n_bytes,
            )
            assert int(np.prod(ours.shape)) == other.n_elements and ours.shape[-1] == other.shape[0]


def test_every_type_of_value(opened: Callable[[bytes], GgufFile]) -> None:
    forms = {0: ("B", 200), 1: ("b", -3), 2: ("H", 60000), 3: ("h", -7), 4: ("I", 1 << 31), 5: ("i", -9), 6: ("f", 0.5)}
    forms |= {10: ("Q", 1 << 63), 11: ("q", -1 << 62), 12: ("d", 1e300)}
    pairs = [
        pair(f"one.{kind}".encode(), kind, struct.pack("<" + form, value)) for kind, (form, value) in forms.items()
    ]
    pairs += [
        pair(f"list.{kind}".encode(), ARRAY, struct.pack(f"<IQ2{form}", kind, 2, value, value))
        for kind, (form, value) in forms.items()
    ]
    pairs += [
        pair(b"flags", ARRAY, struct.pack("<IQ3B", BOOL, 3, 0, 1, 2)),
        pair(b"empty", ARRAY, struct.pack("<IQ", 8, 0)),
    ]
    with opened(content(*pairs)) as file:
        for kind, (_, value) in forms.items():
            assert file[f"one.{kind}"] == value and file[f"list.{kind}"] == [value, value]
        assert file["flags"] == [False, True, True] and file["empty"] == []


def test_version_2_is_read(opened: Callable[[bytes], GgufFile]) -> None:
    assert opened(content(pair(b"a", U32, struct.pack("<I", 7)), version=2))["a"] == 7


def test_names_that_are_not_utf8_stay_different(opened: Callable[[bytes], GgufFile]) -> None:
    pairs = [pair(b"k\xff", U8, b"\1"), pair(b"k\xfe", U8, b"\2"), pair(b"text", STRING, string(b"a\xffb"))]
    with opened(content(*pairs, tensors=(tensor(b"t\xff"),))) as file:
        assert dict(file) == {"k\\xff": 1, "k\\xfe": 2, "text": "a\N{REPLACEMENT CHARACTER}b"}
        assert list(file.tensors) == ["t\\xff"]


BIG = 1 << 60
WRONG = {
    "version 4": (content(version=4), "is GGUF version 4, which is newer than this granite4v; expected version 2 or 3"),
    "version 1": (content(version=1), "is GGUF version 1, which is no longer in use"),
    "big-endian": (content(version=3 << 24), "is a big-endian GGUF file; expected little-endian"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "a Git LFS pointer of"),
    "many tensors": (content(n_tensors=BIG), f"it counts {BIG:,} tensors, expected at most"),
    "many keys": (content(n_keys=BIG), f"it counts {BIG:,} metadata keys, expected at most"),
    "a key without end": (content(struct.pack("<Q", BIG), n_keys=1), "metadata key 1 would end at byte"),
    "a key without a name": (content(pair(b"", U8, b"\0")), "metadata key 1 has no name"),
    "a key twice": (content(pair(b"a", U8, b"\0"), pair(b"a", U8, b"\0")), "it has the key 'a' twice"),
    "a value's type": (content(pair(b"a", 13, b"\0")), "the key 'a' has value type 13, expected 0 to 12"),
    "a list of lists": (content(pair(b"a", ARRAY, struct.pack("<IQ", ARRAY, 1))), "the key 'a' holds a list of lists"),
    "a long list": (content(pair(b"a", ARRAY, struct.pack("<IQ", U8, BIG))), f"a list of {BIG:,} values"),
    "a list behind the end": (content(pair(b"a", ARRAY, struct.pack("<IQ", U64, 9999))), "key 'a' would end at byte"),
    "strings behind the end": (content(pair(b"a", ARRAY, struct.pack("<IQ", STRING, 9999))), "key 'a' would end at"),
    "a string without end": (content(pair(b"a", STRING, struct.pack("<Q", (1 << 64) - 1))), "key 'a'"),
    "alignment 0": (content(pair(b"general.alignment", U32, bytes(4))), "'general.alignment' is 0, expected a power"),
    "alignment 48": (content(pair(b"general.alignment", U32, b"\x30\0\0\0")), "'general.alignment' is 48"),
    "alignment as text": (content(pair(b"general.alignment", STRING, string(b"32"))), "'general.alignment' is '32'"),
    "a list as alignment": (content(pair(b"general.alignment", ARRAY, struct.pack("<IQI", 4, 1, 32))), "is None"),
    "a long name": (content(tensors=(tensor(b"n" * 64),)), "tensor 1 has a name of 64 bytes"),
    "a tensor twice": (content(tensors=(tensor(), tensor(offset=128))), "it has tensor 'w' twice"),
    "five dimensions": (content(tensors=(tensor(shape=(1, 1, 1, 1, 32)),)), "tensor 'w' has 5 dimensions"),
    "no value": (content(tensors=(tensor(shape=(32, 0)),)), "tensor 'w' has shape [32, 0], which holds no value"),
    "overflow": (content(tensors=(tensor(shape=(1 << 32, 1 << 32)),)), "more values than any file holds"),
    "a newer type": (
        content(tensors=(tensor(kind=45),)),
        "type 45 of tensor 'w' is newer than this llama-cpp-python (",
    ),
    "a dropped type": (content(tensors=(tensor(kind=4),)), "tensor 'w' has type 4, which ggml no longer reads"),
    "half a block": (
        content(tensors=(tensor(shape=(33,), kind=2),)),
        "rows of 33 values, expected a multiple of Q4_0's block",
    ),
    "an offset": (content(tensors=(tensor(offset=64),)), "tensor 'w' begins at byte 64 of the data, expected 0"),
    "cut short": (content(tensors=(tensor(shape=(32, 4096)),)), "is cut short: tensor 'w' should end at byte"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_hold_is_said(
    opened: Callable[[bytes], GgufFile], name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    data, message = WRONG[name]
    with pytest.raises(ModelFileError) as caught:
        opened(data)
    assert message in str(caught.value) and "f.gguf" in str(caught.value)
    assert capfd.readouterr() == ("", "")  # ggml would print its own reasons


def test_every_byte_of_a_header_may_be_another(opened: Callable[[bytes], GgufFile]) -> None:
    pairs = [
        pair(b"general.alignment", U32, struct.pack("<I", 64)),
        pair(b"text", STRING, string(b"granite")),
        pair(b"list", ARRAY, struct.pack("<IQ3f", F32, 3, 1, 2, 3)),
        pair(b"tokens", ARRAY, struct.pack("<IQ", STRING, 2) + string(b"a") + string(b"bc")),
    ]
    data = content(*pairs, tensors=(tensor(shape=(32, 2), kind=2), tensor(b"v", offset=64)))
    with opened(data) as file:
        start = min(info.offset for info in file.tensors.values())
    for at in range(start):
        for value in {0, 1, 0x7F, 0x80, 0xFF} - {data[at]}:
            changed = bytearray(data)
            changed[at] = value
            try:
                with opened(bytes(changed)) as file:
                    assert len(dict(file)) == len(file)
            except ModelFileError:
                pass


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
def test_a_fifo_is_refused_rather_than_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(ModelFileError, match="pipe.gguf' is not a regular file"):
        GgufFile.open(tmp_path / "pipe.gguf")


def test_a_folder_a_nul_and_a_long_name(tmp_path: Path) -> None:
    for path in (tmp_path, Path("a\0b"), tmp_path / ("x" * 300)):
        with pytest.raises(ModelFileError, match="cannot read"):
            GgufFile.open(path)
