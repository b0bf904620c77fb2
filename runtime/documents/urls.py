"""Finds documents at URLs, such as s3://bucket/scans/, through fsspec, and makes local copies of them.

A URL names a file or a folder, never a page in a file: '#' and what follows it are part of the name.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from granite4v.clip_projector.files import shown, url_in
from granite4v.errors import DocumentError, Granite4vError
from granite4v.extras import check_installed

_PASSWORD = re.compile(r"://[^/@]*:[^/@]*@")
_MAGIC = re.compile(r"[*?\[]")
_PIECE_BYTES = 1 << 20
_WEB = ("http", "https")  # where `ukey` depends on the URL alone, which says nothing about the content


@dataclass(frozen=True, eq=False)
class RemoteFile:
    """A file in one of fsspec's file systems. `url`: its name in records."""

    url: str
    system: Any
    path: str

    @property
    def state(self) -> str | None:
        """A text that changes when the file does; None if the file system offers none."""
        try:
            info = self.system.info(self.path)
            token = info.get("ETag") if _protocol(self.system) in _WEB else self.system.ukey(self.path)
        except Exception:  # reported when it is read
            return None
        return None if token is None else f"{info.get('size')}:{token!s:.64}"

    @contextlib.contextmanager
    def fetched(self, limit_bytes: int) -> Iterator[Path]:
        """Makes a complete local copy, which exists inside the block. Raises DocumentError."""
        with tempfile.NamedTemporaryFile(prefix="granite4v-") as copy:
            try:
                size = self.system.info(self.path).get("size")
                with self.system.open(self.path, "rb") as file:
                    while piece := file.read(_PIECE_BYTES):
                        copy.write(piece)
                        if copy.tell() > limit_bytes:
                            break
                copy.flush()
            except Exception as error:  # each file system has errors of its own
                raise _unreadable(self.url, error) from None
            n_bytes = copy.tell()
            if n_bytes > limit_bytes:
                raise DocumentError(f"'{shown(self.url)}' has more than {limit_bytes:,} bytes; split it.")
            if not n_bytes or (size is not None and size != n_bytes):
                raise DocumentError(
                    f"'{shown(self.url)}' ended after {n_bytes:,} of {size or 0:,} bytes; read it again with --resume."
                )
            yield Path(copy.name)


def find_remote(given: str, suffixes: Sequence[str]) -> list[RemoteFile]:
    """Returns the files that a URL stands for, in no order: the file itself; those below a folder with one of
    `suffixes`; the matches of a glob. Raises DocumentError."""
    url = url_in(given) or given
    if _PASSWORD.search(url):
        raise DocumentError(
            "a URL holds a password, which every record would show; give it by the environment or by fsspec's "
            "configuration."
        )
    try:
        check_installed(f"the URL '{shown(url)}'", "fsspec", "fsspec")
    except Granite4vError as error:
        raise DocumentError(str(error)) from None
    from fsspec.core import url_to_fs

    try:
        system, path = url_to_fs(url)
        if system.isdir(path):
            found = [name for name in system.find(path) if name.lower().endswith(tuple(suffixes))]
        elif system.exists(path):
            found = [path]
        else:
            found = [name for name in system.glob(path) if not system.isdir(name)] if _MAGIC.search(path) else []
    except Exception as error:
        raise _unreadable(url, error) from None
    if not found:
        raise DocumentError(f"there is no supported file at '{shown(url)}'; is the URL right?")
    chain = "".join(f"::{part}" for part in url.split("::")[1:])
    return [RemoteFile(f"{system.unstrip_protocol(name)}{chain}", system, name) for name in found]


def _protocol(system: Any) -> str:
    return system.protocol if isinstance(system.protocol, str) else system.protocol[0]


def _unreadable(url: str, error: Exception) -> DocumentError:
    lines = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
    return DocumentError(f"'{shown(url)}' cannot be read ({reason:.200}).")
