"""Caches the machine code of compiled kernels between processes, in a private folder of the user's cache.

Writing and compiling kernels takes most of a second, loading them a thousandth of that. Loaded code is executed, so the
folder must belong to this user and be closed to all others, as far as the system has owners and modes. A file that does
not match its checksum is not used.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from granite4v.paths import cache_folder, is_private, write_bytes

FOLDER = "kernels"
MOST_FILES = 64  # some tens of kilobytes each; they pile up as sources, versions and CPUs change
_DIGEST_BYTES = hashlib.sha256().digest_size


def find(key: str) -> bytes | None:
    """Returns the code stored under a key; None if there is none, or it is damaged."""
    try:
        path = _folder() / key
        content = path.read_bytes()
        digest, code = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if digest != hashlib.sha256(code).digest():
            return None
    except (OSError, ValueError):
        return None
    with contextlib.suppress(OSError):  # a read-only folder
        os.utime(path)
    return code


def keep(key: str, code: bytes) -> None:
    """Stores code under a key, if possible. Deletes the least recently used files beyond `MOST_FILES`."""
    with contextlib.suppress(OSError, ValueError):
        folder = _folder()
        write_bytes(folder / key, hashlib.sha256(code).digest() + code, mode=0o600)
        files = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)
        for path in files[:-MOST_FILES]:
            path.unlink(missing_ok=True)


def _folder() -> Path:
    """Returns the folder, which it creates if needed. Raises OSError unless only this user can access it."""
    folder = cache_folder() / FOLDER
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    if not is_private(folder):
        raise PermissionError(str(folder))
    return folder
