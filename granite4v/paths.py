"""The folder for what is worth keeping between runs, and small JSON files in it.

Nothing here may stop a command: a cache that cannot be read or written costs time alone.
"""

from __future__ import annotations

import functools
import json
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

MAX_BYTES = 1 << 24  # a cache file of ours has a few kilobytes


def cache_folder() -> Path:
    """GRANITE4V_CACHE, or the user's cache folder, or for a user without a home a folder below the temporary one."""
    import platformdirs

    named = os.environ.get("GRANITE4V_CACHE")
    if named:
        return Path(named)
    try:
        return Path(platformdirs.user_cache_dir("granite4v"))
    except RuntimeError:  # no HOME, and no entry in the password database: containers and services
        return _temporary_folder()


def read_json(name: str) -> dict[str, Any]:
    """The object in a cache file; empty when there is none, or when it is damaged. Its values are not checked."""
    try:
        path = cache_folder() / name
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:  # a FIFO would wait for ever
            return {}
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def write_json(name: str, content: dict[str, Any]) -> None:
    """Puts a cache file in place at once, so that another process reads the old one or the new one."""
    partial = ""
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, prefix=f".{name}-", delete=False, encoding="utf-8") as file:
            partial = file.name
            json.dump(content, file, indent=1)
        os.replace(partial, folder / name)
    except (OSError, ValueError):  # ValueError: a NUL in the folder's name
        if partial:
            Path(partial).unlink(missing_ok=True)


@functools.cache
def _temporary_folder() -> Path:
    """A folder that belongs to this user alone. Its name is known to everybody, so one that somebody else made, or that
    others may write to, is not used: then this process has one of its own."""
    try:
        folder = Path(tempfile.gettempdir()) / f"granite4v-{os.getuid() if hasattr(os, 'getuid') else 'cache'}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if is_private(folder):
            return folder
    except OSError:
        pass
    return _own_folder()


def is_private(folder: Path) -> bool:
    """Whether a folder is a real one, this user's, and closed to all others."""
    status = folder.lstat()
    if not hasattr(os, "getuid"):
        return stat.S_ISDIR(status.st_mode)
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077


def _own_folder() -> Path:
    import atexit
    import shutil

    try:
        folder = Path(tempfile.mkdtemp(prefix="granite4v-"))
    except OSError:  # nowhere to write: whoever writes to the cache will find that out, and go on without
        return Path(os.devnull) / "granite4v"
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
