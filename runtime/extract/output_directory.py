"""The output directory: only one process at a time writes to it, it holds one run, and only our files are touched."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from granite4v.errors import OutputError
from granite4v.paths import OWN_PREFIX, atomic_text_file, disk_errors, remove_partial_files, sync_folder
from granite4v.runtime.extract.own_files import check_own
from granite4v.runtime.extract.page_images import image_path
from granite4v.runtime.formats.tasks import task_or_question

RESULTS, MANIFEST = "results.jsonl", "run.json"
FORMAT = 1  # increase it when records or files of an earlier version cannot be resumed
_LOCK = f"{OWN_PREFIX}.lock"
# what a run must have in common with the one it resumes, with the words of the error message; inputs, pages and tasks
# may differ: they decide how much is read, not what a record means
_SAME = {
    "crop": "the crop differs",
    "schema": "the schema differs",
    "prompts": "the prompts differ",
    "model": "the model's files differ",
    "settings": "the settings differ",
}


# old names of renamed settings, so that runs of earlier versions can be resumed
_RENAMED = {"free": "unconstrained"}


class OutputLocked(OutputError):
    """Another process is writing to the directory."""


class EnvironmentRemark(str):
    """A resumed run differs from the one before in what changes answers slightly."""


class OutputDirectory:
    """An output directory, locked by this process until `release`."""

    def __init__(self, path: Path, lock: Any, created: Sequence[Path]) -> None:
        """`created`: the folders that were created for it, innermost first."""
        self.path, self._lock, self._created = path, lock, created
        self._begun = (path / MANIFEST).exists()

    @classmethod
    def claim(cls, path: Path, *, resume: bool) -> OutputDirectory:
        """Creates the directory if necessary and locks it.

        Raises OutputError if another process writes there, if it holds another run's results (and `resume` is off) or
        files that no run of ours made, and if it cannot be written.
        """
        folder = cls._locked(path)
        try:
            folder._check(resume)
            remove_partial_files(path)
        except BaseException:
            folder.release()
            raise
        return folder

    @classmethod
    def claim_for_export(cls, path: Path, results: Path) -> OutputDirectory:
        """Like `claim`, for files made from the records in the folder `results`, which may be the same folder.

        Raises OutputError for another folder that holds anything but an earlier export; otherwise as `claim`.
        """
        was_ours = (path / _LOCK).exists()
        folder = cls._locked(path)
        folder._begun |= was_ours
        try:
            with disk_errors(path):
                in_place = results.exists() and path.samefile(results)
            if not in_place and ((path / RESULTS).exists() or (path / MANIFEST).exists()):
                raise OutputError(f"'{path}' holds the results of another run; give another directory.")
            if not in_place and not was_ours:
                folder._check_empty()
            remove_partial_files(path)
        except BaseException:
            folder.release()
            raise
        return folder

    def keep(self) -> None:
        """Marks the directory as ours, so that it stays even if the run or the export fails."""
        self._begun = True

    @classmethod
    def _locked(cls, path: Path) -> OutputDirectory:
        with disk_errors(path):
            if os.path.lexists(path) and not path.is_dir():
                raise OutputError(f"'{path}' is a file; give a directory, or one that does not exist yet.")
            created = [folder for folder in (path, *path.parents) if not folder.exists()]
            path.mkdir(parents=True, exist_ok=True)
            for name in (_LOCK, MANIFEST, RESULTS):
                check_own(path / name)
            lock = FileLock(path / _LOCK)
            try:
                lock.acquire(blocking=False)
            except Timeout:
                raise OutputLocked(
                    f"another process is writing to '{path}'; wait for it, or give another directory."
                ) from None
            except NotImplementedError:
                raise OutputError(
                    f"the disk of '{path}' does not support file locks, so two runs could interfere; give a "
                    "directory on another disk."
                ) from None
        return cls(path, lock, created)

    @property
    def is_resumed(self) -> bool:
        """Whether the directory holds an earlier run."""
        return self._begun

    @property
    def results(self) -> Path:
        return self.path / RESULTS

    def has_image(self, digest: str) -> bool:
        """Whether the report has the image of a page."""
        return image_path(self.path, digest).exists()

    def begin(self, manifest: Mapping[str, Any]) -> list[str]:
        """Writes `run.json`, or checks that this run may resume the one described there.

        Returns remarks about differences that may change answers slightly. Raises OutputError, which names them, for
        other differences.
        """
        if not self._begun:
            self._write({"format": FORMAT, **manifest})
            sync_folder(self.path.parent)
            self.keep()
            return []
        begun = self._manifest()
        wanted = json.loads(json.dumps(manifest))
        differences = [_difference(name, *_comparable(key, begun, wanted)) for key, name in _SAME.items()]
        found = "; ".join(filter(None, differences))
        if found:
            raise OutputError(
                f"'{self.path}' holds the results of another run: {found}. Resume it with the options "
                "it was started with, or give another directory."
            )
        environments, now = begun.get("environments") or [], wanted.get("environments") or []
        new = [environment for environment in now if environment not in environments]
        merged = {
            **begun,
            **wanted,
            "tasks": list(dict.fromkeys([*(begun.get("tasks") or []), *(wanted.get("tasks") or [])])),
            "prompts": {**begun["prompts"], **wanted["prompts"]},
            "schema": wanted.get("schema") or begun.get("schema"),
            "environments": [*environments, *new],
        }
        self._write(merged)
        remarks: list[str] = [_remark(environments[-1], environment) for environment in new if environments]
        if wanted.get("confidence") and not begun.get("confidence"):
            remarks.append("the records of the earlier run have no confidences; only new ones get them.")
        return remarks

    def _write(self, manifest: Mapping[str, Any]) -> None:
        with atomic_text_file(self.path / MANIFEST) as file:
            json.dump(manifest, file, indent=2, ensure_ascii=False)
            file.write("\n")

    def release(self) -> None:
        """Releases the lock, and removes what was created for a run that never began."""
        if not self._begun:
            with contextlib.suppress(OSError):
                (self.path / _LOCK).unlink(missing_ok=True)
        self._lock.release()
        if not self._begun:
            with contextlib.suppress(OSError):  # not empty: another program put something there
                for folder in self._created:
                    folder.rmdir()

    def _check(self, resume: bool) -> None:
        if self._begun:
            if not resume:
                raise OutputError(
                    f"'{self.path}' holds the results of another run; resume it (--resume), or give another directory."
                )
            return
        self._check_empty()

    def _check_empty(self) -> None:
        with disk_errors(self.path):
            foreign = sorted(path.name for path in self.path.iterdir() if not path.name.startswith(OWN_PREFIX))
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
        except (OSError, ValueError, RecursionError) as error:
            raise OutputError(f"'{path}' cannot be read ({error}); start again with another --out.") from None
        ours = isinstance(content, dict) and all(
            isinstance(content.get(name), kind)
            for name, kind in (("inputs", list), ("tasks", list), ("prompts", dict), ("model", dict))
        )
        if not ours or content.get("format") != FORMAT:
            raise OutputError(f"'{path}' was not written by this version of granite4v; start again with another --out.")
        settings = content.get("settings")
        if isinstance(settings, dict):
            content["settings"] = {_RENAMED.get(name, name): value for name, value in settings.items()}
        return content


def _comparable(key: str, begun: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[Any, Any]:
    """Returns the values of a key for both runs, reduced to what can be compared: prompts of the tasks that both have,
    schemas if both have one."""
    then, now = begun.get(key), wanted.get(key)
    if key == "schema" and (then is None or now is None):
        return None, None
    if key == "prompts" and isinstance(then, dict) and isinstance(now, dict):
        # a prompt that is made from the schema differs with it, and that is reported already
        told = begun["schema"] != wanted["schema"]
        both = [task for task in then if task in now and not (told and task_or_question(task).takes_schema)]
        return {task: then[task] for task in both}, {task: now[task] for task in both}
    return then, now


def _remark(then: Any, now: Mapping[str, Any]) -> EnvironmentRemark:
    before = then if isinstance(then, dict) else {}
    pairs = ", ".join(f"{key} was {before.get(key)}, is {now[key]}" for key in now if before.get(key) != now[key])
    return EnvironmentRemark(
        f"resumed in a different environment ({pairs}); new answers may differ slightly from what a single run gives."
    )


def _difference(name: str, begun: Any, wanted: Any) -> str:
    if begun == wanted:
        return ""
    if isinstance(begun, dict) and isinstance(wanted, dict):
        keys = [key for key in {**begun, **wanted} if begun.get(key) != wanted.get(key)]
        pairs = ", ".join(f"{key} {_short(begun.get(key))} then and {_short(wanted.get(key))} now" for key in keys)
        return f"{name} ({pairs})"
    return f"{name} ({_short(begun)} then, {_short(wanted)} now)"


def _short(value: Any) -> str:
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) == 64 and not set(text) - set("0123456789abcdef"):
        return f"{text[:12]}..."  # a SHA-256
    return text if len(text) <= 60 else f"{text[:57]}..."
