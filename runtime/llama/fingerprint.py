"""SHA-256 of a model's files, computed once for each state of a file and kept in the user's cache."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

from granite4v.errors import ModelFileError
from granite4v.paths import read_json_cache, write_json_cache
from granite4v.runtime.llama.files import ModelFiles

CACHE = "checksums.json"  # {"path size mtime_ns": SHA-256}
READ_BYTES = 1 << 20
ANNOUNCE_BYTES = 1 << 28  # takes about a second
_SHA256 = re.compile("[0-9a-f]{64}")
_SHARD = re.compile(r"-00001-of-(\d{5})\.gguf$")


def _nothing() -> None:
    pass


def model_hashes(files: ModelFiles, say: Callable[[str], None], check: Callable[[], None] = _nothing) -> dict[str, str]:
    """SHA-256 by role: 'text', and 'vision' and 'adapter' where there are such files.

    A file of 2 GB takes a few seconds the first time, which `say` announces; `check` is called meanwhile, and may
    raise.
    """
    found = {"text": files.text, "vision": files.vision, "adapter": files.adapter}
    return {role: file_hash(file.path, say, check) for role, file in found.items() if file is not None}


def file_hash(path: Path, say: Callable[[str], None], check: Callable[[], None] = _nothing) -> str:
    """SHA-256 of a file, or of its shards' one after another; known again by path, size and time of change.

    `check` is called between pieces, and may raise. Raises ModelFileError for a file that cannot be read.
    """
    parts = _shards(path)
    try:
        hashes = [_hash_of_one(part, say, check) for part in parts]
    except OSError as error:
        raise ModelFileError(f"'{error.filename or path}' cannot be read: {error.strerror or error}.") from None
    return hashes[0] if len(parts) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _hash_of_one(path: Path, say: Callable[[str], None], check: Callable[[], None]) -> str:
    status = path.stat()
    key = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
    found = _known_hashes().get(key)
    if found is None:
        if status.st_size > ANNOUNCE_BYTES:
            say(f"computing the checksum of '{path.name}' ...")
        found = _sha256(path, check)
        known = {**_known_hashes(), key: found}  # read again: hashing takes seconds, in which others may have written
        write_json_cache(CACHE, {key: value for key, value in known.items() if _path_of(key).exists()})
    return found


def _path_of(key: str) -> Path:
    return Path(key.rsplit(" ", 2)[0])


def _shards(path: Path) -> list[Path]:
    match = _SHARD.search(path.name)
    if match is None:
        return [path]
    stem, n = path.name[: match.start()], max(1, int(match[1]))
    return [path.with_name(f"{stem}-{i:05}-of-{n:05}.gguf") for i in range(1, n + 1)]


def _sha256(path: Path, check: Callable[[], None]) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(READ_BYTES):
            digest.update(piece)
            check()
    return digest.hexdigest()


def _known_hashes() -> dict[str, str]:
    """The cache; entries that are not hashes are left out, and so computed again."""
    content = read_json_cache(CACHE)
    return {key: value for key, value in content.items() if isinstance(value, str) and _SHA256.fullmatch(value)}
