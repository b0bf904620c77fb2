"""Computes SHA-256 checksums of a model's files, once for each state of a file; they are kept in the user's cache."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

from granite4v.errors import ModelFileError
from granite4v.paths import read_json_cache, write_json_cache
from granite4v.runtime.llama.files import ModelFiles

CACHE = "checksums.json"  # {"path state": SHA-256}; see `_state`
READ_BYTES = 1 << 20
ANNOUNCE_BYTES = 1 << 28  # takes about a second
_SHA256 = re.compile("[0-9a-f]{64}")
_SHARD = re.compile(r"-00001-of-(\d{5})\.gguf$")


def _nothing() -> None:
    pass


def model_hashes(files: ModelFiles, say: Callable[[str], None], check: Callable[[], None] = _nothing) -> dict[str, str]:
    """Returns the SHA-256 by role: 'text', and 'vision' and 'adapter' where there are such files.

    A file of 2 GB takes a few seconds the first time, which `say` announces; `check` is called meanwhile, and may
    raise.
    """
    return {role: file_hash(path, say, check) for role, path in _by_role(files).items()}


class UnchangedFiles:
    """Remembers the current state of a model's files; `check` detects changes. If a loaded file is replaced by another
    one of the same name, its checksum is no longer that of the weights in memory."""

    def __init__(self, files: ModelFiles) -> None:
        """Raises ModelFileError for a missing file."""
        self._states = {part: _state_of(part) for path in _by_role(files).values() for part in _shards(path)}

    def check(self) -> None:
        """Raises ModelFileError for a file that was changed, replaced or removed; takes microseconds."""
        for path, state in self._states.items():
            if _state_of(path) != state:
                raise ModelFileError(f"'{path}' has changed since the model was loaded; load it again.")


def _by_role(files: ModelFiles) -> dict[str, Path]:
    found = {"text": files.text, "vision": files.vision, "adapter": files.adapter}
    return {role: file.path for role, file in found.items() if file is not None}


def _state_of(path: Path) -> str:
    """The state of a file (`_state`). Raises ModelFileError if it cannot be read."""
    try:
        return _state(path)
    except OSError as error:
        raise ModelFileError(f"'{path}' cannot be read: {error.strerror or error}.") from None


def _state(path: Path) -> str:
    """A text that changes whenever a file is written or replaced, even if that keeps size and date, as when `cp -p`
    copies a model over another one of the same quantization. Raises OSError."""
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"


def file_hash(path: Path, say: Callable[[str], None], check: Callable[[], None] = _nothing) -> str:
    """Returns the SHA-256 of a file, or for shards that of their hashes joined; cached by path and state.

    `check` is called between pieces, and may raise. Raises ModelFileError for a file that cannot be read.
    """
    parts = _shards(path)
    try:
        hashes = [_hash_of_one(part, say, check) for part in parts]
    except OSError as error:
        raise ModelFileError(f"'{error.filename or path}' cannot be read: {error.strerror or error}.") from None
    return hashes[0] if len(parts) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _hash_of_one(path: Path, say: Callable[[str], None], check: Callable[[], None]) -> str:
    state = _state(path)
    key = f"{path.resolve()} {state}"
    found = _known_hashes().get(key)
    if found is None:
        if path.stat().st_size > ANNOUNCE_BYTES:
            say(f"computing the checksum of '{path.name}' ...")
        found = _sha256(path, check)
        if _state(path) != state:  # the hash is of a mixture of two states
            raise ModelFileError(f"'{path}' changes while it is read; wait until it is complete.")
        known = {**_known_hashes(), key: found}  # read again: other processes may have written meanwhile
        write_json_cache(CACHE, {key: value for key, value in known.items() if _path_of(key).exists()})
    return found


def _path_of(key: str) -> Path:
    return Path(key.rsplit(" ", 4)[0])


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
    """The cached hashes. Entries that are not hashes are left out, and so computed again."""
    content = read_json_cache(CACHE)
    return {key: value for key, value in content.items() if isinstance(value, str) and _SHA256.fullmatch(value)}
