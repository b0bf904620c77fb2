"""SHA-256 of a model's files, computed once for each state of a file and kept in the user's cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from granite4v.errors import ModelFileError

if TYPE_CHECKING:
    from granite4v.runtime.llama.files import ModelFiles

READ_BYTES = 1 << 20
_SHA256 = re.compile("[0-9a-f]{64}")
_SHARD = re.compile(r"-00001-of-(\d{5})\.gguf$")


def model_hashes(files: ModelFiles, say: Callable[[str], None]) -> dict[str, str]:
    """SHA-256 by role: 'text', and 'vision' and 'adapter' where there are such files.

    A file of 2 GB takes a few seconds the first time, which `say` announces.
    """
    found = {"text": files.text, "vision": files.vision, "adapter": files.adapter}
    return {role: file_hash(file.path, say) for role, file in found.items() if file is not None}


def file_hash(path: Path, say: Callable[[str], None]) -> str:
    """SHA-256 of a file, or of its shards' one after another; known again by path, size and time of change.

    Raises ModelFileError for a file that cannot be read.
    """
    parts = _shards(path)
    try:
        hashes = [_hash_of_one(part, say) for part in parts]
    except OSError as error:
        raise ModelFileError(f"'{error.filename or path}' cannot be read: {error.strerror or error}.") from None
    return hashes[0] if len(parts) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _hash_of_one(path: Path, say: Callable[[str], None]) -> str:
    status = path.stat()
    key = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
    known = _read_cache()
    if key not in known:
        if status.st_size > 1 << 28:
            say(f"computing the checksum of '{path.name}' ...")
        known = {**known, key: _sha256(path)}
        _write_cache(known)
    return known[key]


def _shards(path: Path) -> list[Path]:
    match = _SHARD.search(path.name)
    if match is None:
        return [path]
    stem, n = path.name[: match.start()], max(1, int(match[1]))
    return [path.with_name(f"{stem}-{i:05}-of-{n:05}.gguf") for i in range(1, n + 1)]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _cache_file() -> Path:
    from granite4v.ggml.autotune import cache_file

    return cache_file().with_name("checksums.json")


def _read_cache() -> dict[str, str]:
    try:
        content = json.loads(_cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # none yet, or damaged: computed again
        return {}
    if not isinstance(content, dict):
        return {}
    return {key: value for key, value in content.items() if isinstance(value, str) and _SHA256.fullmatch(value)}


def _write_cache(known: dict[str, str]) -> None:
    path = _cache_file()
    there = {key: value for key, value in known.items() if Path(key.rsplit(" ", 2)[0]).exists()}
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time alone
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(there), encoding="utf-8")
        partial.replace(path)
