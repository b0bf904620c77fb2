"""Reads the small files of a checkpoint: only regular files, and with clear errors for common wrong contents.

Downloaded checkpoints may contain Git LFS pointers, error pages of web servers, and incomplete files.
"""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from granite4v.errors import CheckpointError

MAX_TEXT_BYTES = 256 << 20  # the largest published tokenizer.json has 35 MB
MAX_JSON_DEPTH = 100
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
PEEK_BYTES = 512
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def exists(path: Path) -> bool:
    """Whether the path exists; raises CheckpointError for a dangling link."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise _dangling(path) from None
        return False
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read '{path}': {getattr(error, 'strerror', None) or error}.") from None
    return True


def _dangling(path: Path) -> CheckpointError:
    return CheckpointError(
        f"'{path}' is a link to '{os.readlink(path)}', which does not exist; download the checkpoint again."
    )


def check_regular(path: Path) -> int:
    """Returns the size in bytes of a regular file; raises CheckpointError for anything else.

    Opening a named pipe, for instance, would wait for a writer forever. Raises FileNotFoundError if there is none.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        if path.is_symlink():
            raise _dangling(path) from None
        raise
    except OSError as error:
        raise CheckpointError(f"cannot read '{path}': {error.strerror or error}.") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "directory" if stat.S_ISDIR(status.st_mode) else "device, pipe or socket"
        raise CheckpointError(f"'{path}' is a {kind}; expected a file.")
    return status.st_size


def placeholder(start: bytes) -> str | None:
    """Recognizes from its first bytes a file that is not what was expected. Returns what it is and what to do about it;
    None if the file looks right."""
    if not start:
        return "is empty; download it again"
    if start.startswith(LFS_POINTER):
        return "is a Git LFS pointer, not the file itself; run 'git lfs pull' in the checkpoint's folder"
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "is a web page, perhaps an error message of the server; download the file again"
    return None


def read_text(path: Path) -> str:
    """Reads the text of a UTF-8 file; all line ends become newlines.

    Raises CheckpointError, and FileNotFoundError if there is no file.
    """
    size_bytes = check_regular(path)
    if size_bytes > MAX_TEXT_BYTES:
        raise CheckpointError(f"'{path}' has {size_bytes:,} bytes; expected at most {MAX_TEXT_BYTES:,}.")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read '{path}': {error.strerror or error}.") from None
    instead = placeholder(data[:PEEK_BYTES])
    if instead is not None:
        raise CheckpointError(f"'{path}' {instead}.")
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        found = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else f"not UTF-8 (byte {error.start:,})"
        raise CheckpointError(f"'{path}' is {found}; expected UTF-8. Save it as UTF-8, or download it again.") from None


def read_json(path: Path) -> dict[str, Any]:
    """Reads the object in a JSON file; raises CheckpointError."""
    try:
        text = read_text(path)
    except FileNotFoundError:
        raise CheckpointError(f"'{path.parent}' has no '{path.name}'; it is not a Hugging Face checkpoint.") from None
    return parse_object(text, f"'{path}'")


def parse_object(text: str, what: str) -> dict[str, Any]:
    """Parses JSON text that holds an object; raises CheckpointError with a message that begins with `what`."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise CheckpointError(f"{what} is nested too deeply; expected at most {MAX_JSON_DEPTH} levels.") from None
    except ValueError as error:
        raise CheckpointError(f"{what} is not valid JSON ({error}); download it again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} holds {_kind(value)}; expected a JSON object.")
    _check_depth(value, what)
    if SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            found = f"\\u{ord(error.object[error.start]):04x}"
            raise CheckpointError(f"{what} holds half of a surrogate pair ({found}), not a character.") from None
    return value


def _check_depth(value: Any, what: str) -> None:
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return
    raise CheckpointError(f"{what} is nested too deeply; expected at most {MAX_JSON_DEPTH} levels.")


def _kind(value: Any) -> str:
    """A JSON value's type, in JSON's terms."""
    names = {list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")
