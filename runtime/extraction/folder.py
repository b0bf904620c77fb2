"""The output directory: one process at a time, one run for good, and nobody else's files."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from granite4v.errors import OutputError
from granite4v.runtime.extraction.durable import OWN, disk_errors, remove_partial_files, sync_folder, whole_file

RESULTS, MANIFEST = "results.jsonl", "run.json"
FORMAT = 1  # raise it when records or files of an earlier version cannot be gone on with
_LOCK = f"{OWN}.lock"
# what a run must have in common with the one it goes on with, in the words of a message
_SAME = {
    "inputs": "the inputs",
    "pages": "the pages",
    "crop": "the region",
    "tasks": "the tasks",
    "prompts": "the prompts",
    "schema": "the schema",
    "model": "the model's files",
    "settings": "the settings",
}


class Folder:
    """An output directory that this process holds the lock of, until `release`."""

    def __init__(self, path: Path, lock: Any, created: bool) -> None:
        self.path, self._lock, self._created = path, lock, created
        self._begun = (path / MANIFEST).exists()

    @classmethod
    def claim(cls, path: Path, *, resume: bool) -> Folder:
        """Makes the directory if need be and locks it.

        Raises OutputError when another process writes there, when it holds another run's results (and `resume` is
        off) or files that no run of ours made, and when it cannot be written.
        """
        from filelock import FileLock, Timeout

        with disk_errors(path):
            if path.exists() and not path.is_dir():
                raise OutputError(f"'{path}' is a file; give a directory, or one that does not exist yet.")
            created = not path.exists()
            path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path / _LOCK)
            try:
                lock.acquire(blocking=False)
            except Timeout:
                raise OutputError(
                    f"another process is writing to '{path}'; wait for it, or give another directory."
                ) from None
            except NotImplementedError:
                raise OutputError(
                    f"the disk of '{path}' has no file locks, so two runs could mix; give a directory on another disk."
                ) from None
        folder = cls(path, lock, created)
        try:
            folder._check(resume)
            remove_partial_files(path)
        except BaseException:
            folder.release()
            raise
        return folder

    @property
    def results(self) -> Path:
        return self.path / RESULTS

    def begin(self, manifest: Mapping[str, Any]) -> bool:
        """Writes down which run this is, or checks that it is the one that was begun here; True for the latter.

        Raises OutputError that names what differs.
        """
        if not self._begun:
            with whole_file(self.path / MANIFEST) as file:
                json.dump({"format": FORMAT, **manifest}, file, indent=2, ensure_ascii=False)
                file.write("\n")
            sync_folder(self.path.parent)
            self._begun = True
            return False
        begun = self._manifest()
        wanted = json.loads(json.dumps(manifest))
        differences = [_difference(name, begun.get(key), wanted.get(key)) for key, name in _SAME.items()]
        found = "; ".join(filter(None, differences))
        if found:
            raise OutputError(
                f"'{self.path}' holds the results of another run: {found}. Go on with what it was begun with, or give "
                "another directory."
            )
        return True

    def release(self) -> None:
        """Gives the lock back; of a run that never began nothing stays."""
        if not self._begun:
            with contextlib.suppress(OSError):
                (self.path / _LOCK).unlink(missing_ok=True)
        self._lock.release()
        if self._created and not self._begun:
            with contextlib.suppress(OSError):  # somebody else put something there
                self.path.rmdir()

    def _check(self, resume: bool) -> None:
        if self._begun:
            if not resume:
                raise OutputError(
                    f"'{self.path}' holds the results of another run; go on with it (--resume), or give another "
                    "directory."
                )
            return
        with disk_errors(self.path):
            foreign = sorted(path.name for path in self.path.iterdir() if not path.name.startswith(OWN))
        if foreign:
            more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
            raise OutputError(
                f"'{self.path}' holds {', '.join(foreign[:3])}{more}, which no run of 'granite4v extract' made; give "
                "an empty directory, or one that does not exist yet."
            )

    def _manifest(self) -> dict[str, Any]:
        path = self.path / MANIFEST
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise OutputError(f"'{path}' cannot be read ({error}); start again with another --out.") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise OutputError(f"'{path}' was not written by this version of granite4v; start again with another --out.")
        return content


def _difference(name: str, begun: Any, wanted: Any) -> str:
    if begun == wanted:
        return ""
    if isinstance(begun, dict) and isinstance(wanted, dict):
        keys = [key for key in {**begun, **wanted} if begun.get(key) != wanted.get(key)]
        pairs = ", ".join(f"{key} {_short(begun.get(key))} then and {_short(wanted.get(key))} now" for key in keys)
        return f"{name} differ ({pairs})"
    return f"{name} differ ({_short(begun)} then, {_short(wanted)} now)"


def _short(value: Any) -> str:
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) == 64 and not set(text) - set("0123456789abcdef"):
        return f"{text[:12]}..."  # a SHA-256
    return text if len(text) <= 60 else f"{text[:57]}..."
