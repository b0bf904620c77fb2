"""Machine code that this user's earlier processes have compiled, in a private folder of the cache.

Writing and compiling kernels takes most of a second, loading them a thousandth of that. What is loaded is executed, so
the folder must belong to this user and be closed to all others, as far as the system has owners and modes for that; and
a file that was damaged is not used.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from granite4v.paths import cache_folder, is_private, write_bytes

FOLDER = "kernels"
MOST_FILES = 64  # of some tens of kilobytes each; sources, versions and CPUs come and go
_DIGEST_BYTES = hashlib.sha256().digest_size


def find(key: str) -> bytes | None:
    """What was kept under a key; None where there is nothing."""
    try:
        path = _folder() / key
        content = path.read_bytes()
        digest, code = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if digest != hashlib.sha256(code).digest():
            return None
    except (OSError, ValueError):
        return None
    with contextlib.suppress(OSError):  # of a folder that is only read
        os.utime(path)
    return code


def keep(key: str, code: bytes) -> None:
    """Where that is possible. The files that were used longest ago leave."""
    with contextlib.suppress(OSError, ValueError):
        folder = _folder()
        write_bytes(folder / key, hashlib.sha256(code).digest() + code, mode=0o600)
        files = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)
        for path in files[:-MOST_FILES]:
            path.unlink(missing_ok=True)


def _folder() -> Path:
    """Raises OSError where there is none that only this user can write to."""
    folder = cache_folder() / FOLDER
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    if not is_private(folder):
        raise PermissionError(str(folder))
    return folder
