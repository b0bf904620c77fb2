"""Edits for any file, and edits of JSON documents. They know no other format."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from typing import Any

Json = Any
EXTREMES = (0, 1, 2, 7, 8, 255, 256, 1 << 15, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 53, 1 << 63, -1, -2)
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 1e-9, 1e9, 3.5e38, 1e308, float("inf"), float("-inf"), float("nan"))
TEXTS = (
    "", " ", "a", "0", "-1", "1e999", "null", "true", "NaN", "\n", "\t", "\0", "a\0b", "\x1b[31mred\x1b[0m", "../..",
    "/", "C:\\", "%s%n", "{}", "{{", "{%", "$(id)", "<image>", "</s>", "é", "e\u0301", "日本語", "\u202e", "\ufeff",
    "\ufffd", "\U0001f600", "\ud800", "[[[[", "a" * 300, "é" * 5000, "x y " * 3000,
)  # fmt: skip


def number(rng: random.Random) -> int:
    """Returns a small number, an extreme one, one near an extreme, or any of up to 64 bits."""
    kind = rng.random()
    if kind < 0.3:
        return rng.randint(-3, 70)
    if kind < 0.6:
        return rng.choice(EXTREMES)
    if kind < 0.8:
        return rng.choice(EXTREMES) + rng.randint(-2, 2)
    return rng.getrandbits(rng.choice((8, 16, 31, 32, 63, 64))) * rng.choice((1, 1, -1))


def text(rng: random.Random) -> str:
    if rng.random() < 0.7:
        return rng.choice(TEXTS)
    return "".join(rng.choices("abcXYZ019 _-./\\\"'<>{}[]|&;\n\u00e9\u3042", k=rng.randint(1, 40)))


# --- bytes ---


def edit_bytes(rng: random.Random, data: bytes, most: int = 4) -> tuple[bytes, str]:
    """Returns the data after a few edits, and the edits in words."""
    done = []
    for _ in range(rng.randint(1, most)):
        if not data:
            break
        edit = rng.choices(list(BYTE_EDITS), weights=list(BYTE_EDITS.values()))[0]
        data, what = edit(rng, data)
        done.append(what)
    return data, ", ".join(done)


def _spot(rng: random.Random, data: bytes) -> int:
    """Returns an offset, with a bias towards the beginning of the file, where headers are."""
    return rng.randrange(min(len(data), rng.choice((16, 64, 512, 1 << 30))))


def _flip(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    at = _spot(rng, data)
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :], f"flip a bit at {at}"


def _byte(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    at, value = _spot(rng, data), rng.randrange(256)
    return data[:at] + bytes([value]) + data[at + 1 :], f"byte {value} at {at}"


def _integer(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    at, value, n = _spot(rng, data), number(rng), rng.choice((1, 2, 4, 8))
    packed = (value & ((1 << 8 * n) - 1)).to_bytes(n, rng.choice(("little", "big")))
    return data[:at] + packed + data[at + n :], f"{n}-byte integer {value} at {at}"


def _float(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    at, value = _spot(rng, data), rng.choice(FLOATS)
    packed = struct.pack(rng.choice("<>") + "d", value)
    return data[:at] + packed + data[at + 8 :], f"double {value} at {at}"


def _cut(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    at = rng.choice((_spot(rng, data), len(data) - 1 - min(len(data) - 1, rng.randrange(64))))
    return data[:at], f"cut at {at}"


def _remove(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    at, n = _spot(rng, data), rng.choice((1, 2, 4, 8, rng.randint(1, 300)))
    return data[:at] + data[at + n :], f"remove {n} bytes at {at}"


def _insert(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    at, n = _spot(rng, data), rng.choice((1, 2, 4, 8, rng.randint(1, 300)))
    fill = rng.choice((bytes(n), b"\xff" * n, rng.randbytes(n)))
    return data[:at] + fill + data[at:], f"insert {n} bytes at {at}"


def _fill(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    at, n = _spot(rng, data), rng.choice((4, 16, rng.randint(1, 2000)))
    n = min(n, len(data) - at)
    fill = rng.choice((bytes(n), b"\xff" * n, rng.randbytes(n)))
    return data[:at] + fill + data[at + n :], f"overwrite {n} bytes at {at}"


def _repeat(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    at, n, times = _spot(rng, data), rng.randint(1, 200), rng.choice((1, 1, 2, 50, 1000))
    return data[: at + n] + data[at : at + n] * times + data[at + n :], f"repeat {n} bytes at {at} {times} times"


def _move(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    a, b, n = _spot(rng, data), _spot(rng, data), rng.randint(1, 200)
    return data[:b] + data[a : a + n] + data[b + n :], f"copy {n} bytes from {a} to {b}"


BYTE_EDITS: dict[Callable[[random.Random, bytes], tuple[bytes, str]], int] = {
    _flip: 4, _byte: 3, _integer: 5, _float: 1, _cut: 2, _remove: 2, _insert: 2, _fill: 2, _repeat: 1, _move: 2,
}  # fmt: skip


# --- JSON ---


def odd_value(rng: random.Random, depth: int = 0) -> Json:
    """Returns a value that is probably unexpected in its place."""
    kinds: list[Callable[[], Json]] = [
        lambda: None,
        lambda: rng.choice((True, False)),
        lambda: number(rng),
        lambda: rng.choice(FLOATS),
        lambda: rng.choice((10**30, -(10**30), 10**4400)) if rng.random() < 0.3 else number(rng),
        lambda: text(rng),
        lambda: str(number(rng)),
        list,
        dict,
        lambda: nested(rng),
        lambda: [number(rng) for _ in range(rng.choice((1, 2, 5, 2000)))],
    ]
    if depth < 3:
        kinds += [
            lambda: [odd_value(rng, depth + 1) for _ in range(rng.randint(1, 3))],
            lambda: {text(rng): odd_value(rng, depth + 1) for _ in range(rng.randint(1, 3))},
        ]
    return rng.choice(kinds)()


def nested(rng: random.Random) -> Json:
    value: Json = rng.choice((None, 1, "x", []))
    for _ in range(rng.choice((3, 40, 200))):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def edit_json(rng: random.Random, document: Json, most: int = 3) -> tuple[Json, str]:
    """Returns a document with a few edits anywhere in it, and the edits in words."""
    root = {"": copy.deepcopy(document)}
    done = []
    for _ in range(rng.choice((1, 1, 1, rng.randint(1, most)))):
        holder, key, path = _place(rng, root)
        done.append(f"{path}: {_edit_member(rng, holder, key)}")
        if "" not in root:
            root[""] = None
    return root[""], "; ".join(done)


def _place(rng: random.Random, root: dict[str, Json]) -> tuple[Any, Any, str]:
    """Picks a member by walking down from the root, so that a long list has no more weight than a number next to it."""
    holder: Any = root
    key: Any = ""
    path = "$"
    while True:
        below = holder[key]
        if not isinstance(below, dict | list) or not below or (holder is not root and rng.random() < 0.25):
            return holder, key, path
        if holder is root and rng.random() < 0.02:
            return holder, key, path
        holder = below
        key = rng.choice(list(below)) if isinstance(below, dict) else rng.randrange(len(below))
        path += f"[{key!r:.40}]"


def _edit_member(rng: random.Random, holder: Any, key: Any) -> str:
    value = holder[key]
    edits: list[Callable[[], str]] = [lambda: _set(holder, key, odd_value(rng))] * 4
    edits += [lambda: _delete(holder, key), lambda: _set(holder, key, [value])]
    if isinstance(holder, dict):
        edits.append(lambda: _rename(rng, holder, key))
        edits.append(lambda: _set(holder, key, holder[rng.choice(list(holder))]))
        edits.append(lambda: _set(holder, text(rng), odd_value(rng)))
    if isinstance(holder, list):
        edits.append(lambda: holder.insert(key, holder[rng.randrange(len(holder))]) or "doubled")
        edits.append(lambda: rng.shuffle(holder) or "shuffled")
    if isinstance(value, int | float) and not isinstance(value, bool):
        for change in (value + 1, value - 1, -value, value * 2, value * 10**9):
            edits.append(lambda change=change: _set(holder, key, change))
    if isinstance(value, str):
        for change in (value + "x", value[:-1], value.upper(), value * 3, value + "\0", value + text(rng), [*value]):
            edits.append(lambda change=change: _set(holder, key, change))
    if isinstance(value, list | dict) and value:
        edits.append(lambda: _set(holder, key, type(value)()))
        edits.append(lambda: _set(holder, key, {str(i): v for i, v in enumerate(value)}))
    if isinstance(value, list) and value:
        edits.append(lambda: _set(holder, key, value * rng.choice((2, 100))))
        edits.append(lambda: _set(holder, key, value[: rng.randrange(len(value))]))
    return rng.choice(edits)()


def _set(holder: Any, key: Any, value: Json) -> str:
    holder[key] = value
    return f"= {_shown(value)}"


def _delete(holder: Any, key: Any) -> str:
    del holder[key]
    return "removed"


def _rename(rng: random.Random, holder: dict[str, Json], key: str) -> str:
    new = rng.choice((key + "_", key.upper(), "", text(rng)))
    holder[new] = holder.pop(key)
    return f"renamed {new!r:.40}"


def _shown(value: Json) -> str:
    try:
        shown = repr(value)
    except ValueError:  # more digits than Python converts
        return "an integer of many digits"
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def edit_json_text(rng: random.Random, document: Json) -> tuple[bytes, str]:
    """Returns the bytes of a document after edits of its values or, less often, of its text."""
    if rng.random() < 0.8:
        document, what = edit_json(rng, document)
        return dump_json(document), what
    data = dump_json(document)
    edits: list[tuple[str, Callable[[], bytes]]] = [
        ("empty", lambda: b""),
        ("a byte order mark", lambda: b"\xef\xbb\xbf" + data),
        ("UTF-16", lambda: data.decode().encode("utf-16")),
        ("a comma at the end", lambda: data.rstrip()[:-1] + b"," + data.rstrip()[-1:]),
        ("twice", lambda: data + data),
        ("single quotes", lambda: data.replace(b'"', b"'")),
        ("a key twice", lambda: b'{"model_type":1,"a":1,' + data.lstrip()[1:]),
        ("not UTF-8", lambda: data.replace(b'"', b'"\xff\xc0', rng.randint(1, 3))),
        ("nested without end", lambda: rng.choice((b"[", b'{"a":')) * rng.choice((500, 5000, 200_000))),
        ("nested in itself", lambda: b"[" * (n := rng.choice((100, 900, 5000))) + data + b"]" * n),
    ]
    if rng.random() < 0.4:
        return edit_bytes(rng, data)
    what, make = rng.choice(edits)
    return make(), what


def dump_json(document: Json) -> bytes:
    """Serializes JSON with NaN, lone surrogates and integers of any length, which other programs also write."""
    limit = _digits_limit(0)
    try:
        return json.dumps(document).encode("utf-8", "surrogatepass")
    finally:
        _digits_limit(limit)


def _digits_limit(limit: int) -> int:
    """Sets the number of digits that Python converts and returns the old limit; does nothing in Pythons without it."""
    import sys

    if not hasattr(sys, "set_int_max_str_digits"):
        return 0
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(limit)
    return before
