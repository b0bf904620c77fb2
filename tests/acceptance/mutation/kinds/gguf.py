"""Model directories with damaged or inconsistent GGUF files: text, vision and adapter."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from .. import edits, samples
from ..case import Case, Result
from ..gguf_bytes import ARRAY, SCALARS, STRING, Gguf, Info, Value
from ..product import command_line

name = "gguf"
MODEL = "model"
PRESETS = ("tiny", "tiny-clip-llama", "tiny-granite-3.3", "tiny-siglip-qwen2")
run = command_line


def prepare(bases: Path) -> None:
    for preset in PRESETS:
        samples.model(bases, preset)
    samples.model(bases, "tiny", adapter=True)


def build(rng: random.Random, bases: Path, folder: Path) -> Case:
    from granite4v.default_model import embedded_model

    models = sorted((bases / "models").iterdir())
    source = embedded_model(lambda line: None) if rng.random() < 0.1 else rng.choice(models)
    target = folder / MODEL
    samples.link_files(source, target)
    samples.write_page(folder / samples.PAGE)
    case = Case([source.name])
    for _ in range(rng.choice((1, 1, 1, 2))):
        case.edits.append(_edit_file(rng, target, models))
    where = rng.choice([MODEL, MODEL, *(str(path.relative_to(folder)) for path in sorted(target.glob("*.gguf")))])
    case.commands.append(["inspect", where, *rng.choice(([], ["--json"]))])
    ask = ["ask", samples.PAGE, "<chart2csv>", "--model", MODEL, "--max-tokens", "3", "--threads", "1"]
    extract = ["extract", samples.PAGE, "--task", rng.choice(("tables_otsl", "chart2csv")), "--model", MODEL]
    extract += ["--max-tokens", "4", "--threads", "1", "--out", "out"]
    case.commands.append(ask if rng.random() < 0.6 else extract)
    return case


def check(folder: Path, case: Case, results: list[Result]) -> list[str]:
    from ..records import problems

    return problems(folder / "out") if (folder / "out").exists() else []


def _edit_file(rng: random.Random, target: Path, models: list[Path]) -> str:
    files = sorted(path for path in target.glob("*.gguf") if path.is_file())
    if not files:
        return "no file left"
    path = rng.choice(files)
    data = path.read_bytes()
    kind = rng.random()
    if kind < 0.06:
        return f"{path.name}: {_swap(rng, path, data, models)}"
    if kind < 0.2:
        data, what = edits.edit_bytes(rng, data)
    else:
        try:
            gguf = Gguf.read(data)
        except Exception:  # damaged by an earlier edit
            data, what = edits.edit_bytes(rng, data)
        else:
            what = "; ".join(_edit_gguf(rng, gguf) for _ in range(rng.choice((1, 1, 1, 2, 3))))
            data = gguf.write()
    samples.replace_file(path, data)
    return f"{path.name}: {what}"


def _swap(rng: random.Random, path: Path, data: bytes, models: list[Path]) -> str:
    others = sorted(rng.choice(models).glob("*.gguf"))
    kind = rng.randrange(5)
    if kind == 0:
        other = rng.choice(others)
        samples.replace_file(path, other.read_bytes())
        return f"replaced by {other.parent.name}/{other.name}"
    if kind == 1:
        samples.replace_file(path.with_name("b-" + path.name), data)
        return "there twice"
    if kind == 2:
        path.unlink()
        return "removed"
    if kind == 3:
        samples.replace_file(path, b"")
        return "empty"
    path.unlink()
    path.mkdir()
    return "a folder"


def _edit_gguf(rng: random.Random, gguf: Gguf) -> str:
    edit = rng.choices([_header, _metadata, _tensor, _whole_tensor, _weights], weights=[2, 16, 4, 3, 2])[0]
    return edit(rng, gguf)


def _header(rng: random.Random, gguf: Gguf) -> str:
    what, value = rng.choice(("magic", "version", "n_metadata", "n_tensors")), edits.number(rng)
    if what == "magic":
        gguf.magic = rng.choice((b"GGML", b"ggjt", b"FUGG", b"\0\0\0\0"))
        return f"magic {gguf.magic!r}"
    if what != "version":
        value = rng.choice((value, len(gguf.metadata) + 1, max(0, len(gguf.tensors) - 1)))
    setattr(gguf, what, value)
    return f"{what} {value}"


def _metadata(rng: random.Random, gguf: Gguf) -> str:
    if not gguf.metadata:
        return "no metadata left"
    i = rng.randrange(len(gguf.metadata))
    key, value = gguf.metadata[i]
    shown = key.decode("utf-8", "replace")[:60]
    kind = rng.random()
    if kind < 0.06:
        del gguf.metadata[i]
        return f"{shown} removed"
    if kind < 0.1:
        gguf.metadata.append((key, value if rng.random() < 0.5 else _odd_value(rng)))
        return f"{shown} twice"
    if kind < 0.15:
        new = rng.choice((key + b"x", b"", b"\xff\xfe" + key, key.upper(), b"k" * 70_000, _text(rng)))
        gguf.metadata[i] = (new, value)
        return f"{shown} renamed {new[:30]!r}"
    if kind < 0.2:
        j = rng.randrange(len(gguf.metadata))
        gguf.metadata[i], gguf.metadata[j] = (key, gguf.metadata[j][1]), (gguf.metadata[j][0], value)
        return f"{shown} exchanged with {gguf.metadata[j][0].decode('utf-8', 'replace')[:60]}"
    if kind < 0.45:
        gguf.metadata[i] = (key, _odd_value(rng))
        return f"{shown} = {_shown(gguf.metadata[i][1])}"
    return f"{shown}: {_edit_value(rng, value)}"


def _edit_value(rng: random.Random, value: Value) -> str:
    """Edits a value and mostly keeps its type."""
    if value.type == ARRAY:
        return _edit_array(rng, value)
    if value.type == STRING:
        new = rng.choice((_text(rng), value.content + _text(rng), value.content[: len(value.content) // 2]))
        value.content = new
        return f"text {new[:40]!r}"
    changes = [edits.number(rng), rng.choice(edits.FLOATS)]
    if isinstance(value.content, int | float) and value.content == value.content:
        changes += [value.content + 1, value.content - 1, value.content * 2, -value.content, value.content / 2]
    value.content = rng.choice(changes)
    if rng.random() < 0.15:
        value.type = rng.choice([*SCALARS, 13, 255])
    return _shown(value)


def _edit_array(rng: random.Random, value: Value) -> str:
    items = value.content
    at = rng.randrange(len(items)) if items else 0
    kinds: list[tuple[str, Callable[[], object]]] = [
        ("empty", items.clear),
        ("count", lambda: setattr(value, "count", rng.choice((edits.number(rng), len(items) + 1)))),
        ("element type", lambda: setattr(value, "element", rng.choice([*SCALARS, STRING, ARRAY, 13, 99]))),
        ("longer", lambda: items.extend(items[: rng.randint(1, 50)])),
    ]
    if items:
        kinds += [
            ("shorter", lambda: items.__delitem__(slice(rng.randrange(len(items)), None))),
            ("an item removed", lambda: items.pop(at)),
            ("an item twice", lambda: items.insert(at, items[rng.randrange(len(items))])),
            ("an item repeated in place of another", lambda: items.__setitem__(at, items[rng.randrange(len(items))])),
            ("shuffled", lambda: rng.shuffle(items)),
            ("all alike", lambda: items.__setitem__(slice(None), [items[at]] * len(items))),
        ]
        new = _text(rng) if value.element == STRING else rng.choice((edits.number(rng), rng.choice(edits.FLOATS)))
        kinds += [(f"item {at} = {new!r:.40}", lambda: items.__setitem__(at, new))] * 4
    what, change = rng.choice(kinds)
    change()
    if value.element != STRING and any(isinstance(item, bytes) for item in items):
        value.content = [0 if isinstance(item, bytes) else item for item in items]
    if value.element == STRING and not all(isinstance(item, bytes) for item in items):
        value.content = [item if isinstance(item, bytes) else str(item).encode() for item in items]
    if value.element == ARRAY:
        value.content = []
    return what


def _odd_value(rng: random.Random) -> Value:
    kind = rng.choice([*SCALARS, STRING, STRING, ARRAY, ARRAY])
    if kind == STRING:
        return Value(kind, _text(rng))
    if kind != ARRAY:
        return Value(kind, rng.choice((edits.number(rng), rng.choice(edits.FLOATS))))
    element, n = rng.choice([*SCALARS, STRING]), rng.choice((0, 1, 2, 3, 40, 4000))
    return Value(kind, [_text(rng) if element == STRING else edits.number(rng) for _ in range(n)], element)


def _text(rng: random.Random) -> bytes:
    if rng.random() < 0.1:
        return rng.choice((b"\xff\xfe", b"abc\xe9", b"\xed\xa0\x80", b"\x80" * 100))
    return edits.text(rng).encode("utf-8", "surrogatepass")


def _tensor(rng: random.Random, gguf: Gguf) -> str:
    if not gguf.tensors:
        return "no tensor left"
    i = rng.randrange(len(gguf.tensors))
    info = gguf.tensors[i]
    shown = info.name.decode("utf-8", "replace")[:60]
    kind = rng.randrange(7)
    if kind == 0:
        at = rng.randrange(len(info.dims) + 1)
        if at == len(info.dims):
            info.dims.append(rng.choice((1, 2, edits.number(rng))))
        elif rng.random() < 0.2:
            info.dims.pop()
        else:
            n = info.dims[at]
            info.dims[at] = rng.choice((edits.number(rng), n * 2, n // 2, n + 1, n - 1, 32, 256))
        return f"{shown} has dims {info.dims}"
    if kind == 1:
        info.type = rng.choice((rng.randrange(45), edits.number(rng)))
        return f"{shown} has type {info.type}"
    if kind == 2:
        other = rng.choice(gguf.tensors).offset
        info.offset = rng.choice((edits.number(rng), other, info.offset + 32, len(gguf.data), len(gguf.data) - 1))
        return f"{shown} at {info.offset}"
    if kind == 3:
        other = rng.choice(gguf.tensors).name
        info.name = rng.choice((other, info.name + b"x", b"", b"n" * 64, b"n" * 5000, b"\xff" + info.name, _text(rng)))
        return f"{shown} renamed {info.name[:40]!r}"
    if kind == 4:
        del gguf.tensors[i]
        return f"{shown} removed"
    if kind == 5:
        gguf.tensors.insert(i, Info(info.name, [*info.dims], info.type, info.offset))
        return f"{shown} twice"
    info.dims.reverse()
    return f"{shown} has dims {info.dims}"


def _whole_tensor(rng: random.Random, gguf: Gguf) -> str:
    """Makes an edit and lays the data out again, so that every entry points at its bytes and readers get past the
    header."""
    if not gguf.tensors:
        return "no tensor left"
    i = rng.randrange(len(gguf.tensors))
    info, other = gguf.tensors[i], rng.choice(gguf.tensors)
    shown = info.name.decode("utf-8", "replace")[:60]
    kind = rng.randrange(5)
    if kind == 0:
        gguf.tensors.remove(info)
        what = f"{shown} left out"
    elif kind == 1:
        gguf.tensors.insert(i, Info(info.name + b"2", [*info.dims], info.type, 0, info.content))
        what = f"{shown} again under another name"
    elif kind == 2:
        what = f"{shown} is another ({other.name.decode('utf-8', 'replace')[:60]})"
        info.dims, info.type, info.content = [*other.dims], other.type, other.content
    elif kind == 3:
        at, times = rng.randrange(len(info.dims)), rng.choice((2, 3))
        info.dims[at] *= times
        info.content *= times
        what = f"{shown} has dims {info.dims}"
    else:
        rng.shuffle(gguf.tensors)
        what = "tensors shuffled"
    gguf.lay_out()
    return what


def _weights(rng: random.Random, gguf: Gguf) -> str:
    if not gguf.data:
        return "no weights left"
    if rng.random() < 0.5:
        at, n = rng.randrange(len(gguf.data)) & ~3, rng.choice((4, 4096, len(gguf.data)))
        fill = rng.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\0\0", b"\xff\xff\x7f\x7f"))
        fill = fill * (min(n, len(gguf.data) - at) // 4)
        gguf.data = gguf.data[:at] + fill + gguf.data[at + len(fill) :]
        return f"weights {fill[:4].hex()} from {at}"
    gguf.data = gguf.data[: rng.randrange(len(gguf.data))]
    return f"weights cut to {len(gguf.data)} bytes"


def _shown(value: Value) -> str:
    return f"type {value.type}, {value.content!r:.60}"
