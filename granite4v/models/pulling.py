"""Pulls a model from the hub into the models folder: complete or absent, and resumed after an interruption.

Downloads of one repository share the folder `.downloads/<owner>--<name>/`. A file grows as `<checksum>.partial`; when
it is complete and its checksum is verified, it is renamed to `<checksum>`. So any variant, revision or process can
finish a download that another one began. Then the model's directory is assembled in the same folder and renamed into
the models folder. One process at a time works on a repository; the others wait, and find its result.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from granite4v.errors import HubError, OutputError
from granite4v.ggml.gguf_file import GgufFile
from granite4v.gguf_role import ROLE_NAMES, role
from granite4v.models import folder as models
from granite4v.models import hub
from granite4v.models.choice import Choice, choose
from granite4v.models.folder import Installed, Manifest, ModelFile
from granite4v.models.names import HubName
from granite4v.models.repository import HubFile, Repository, size
from granite4v.paths import check_space, disk_errors

READ_BYTES = 1 << 20
WHERE = "GRANITE4V_MODELS names the models folder."
Say = Callable[[str], None]


@dataclass(frozen=True)
class PullProgress:
    """Progress of a pull: `stage` is 'downloading' or 'checking', of `file`."""

    stage: str
    file: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Checkpoint:
    """A downloaded checkpoint that is to be converted with this text type."""

    folder: Path
    repository: str
    commit: str
    text_type: str


@dataclass(frozen=True)
class Conversion:
    """How checkpoints are converted. `check` raises Granite4vError for an unknown text type; `run` converts a
    checkpoint to a new directory."""

    default_type: str
    check: Callable[[str], None]
    run: Callable[[Checkpoint, Path], None]


def pull(
    name: HubName,
    conversion: Conversion,
    *,
    revision: str | None = None,
    say: Say = lambda line: None,
    progress: Callable[[PullProgress], None] = lambda activity: None,
) -> Installed:
    """Downloads a model into the models folder, as the hub has it at `revision` ('main' by default).

    Files that are present already, also in other models, are not downloaded again. `say` gets a line about each step.
    Raises HubError for a model that the hub does not have or refuses, OutputError for disk errors, and what the
    conversion raises. After an interrupt, the downloaded bytes are kept for the next pull.
    """
    repository = hub.list_repository(name.repository, revision)
    choice = choose(repository, name, conversion.default_type)
    if choice.is_checkpoint:
        conversion.check(choice.variant)
    folder = models.models_folder()
    target, downloads = folder / name.folder_name(choice.variant), models.downloads_folder(name)
    with disk_errors(folder, WHERE):
        downloads.mkdir(parents=True, exist_ok=True)
    with _alone(downloads, say):
        models.remove_leftovers(target)
        with disk_errors(folder, WHERE):
            downloads.mkdir(exist_ok=True)  # `discard_downloads` may have removed it before the lock was acquired
        there = models.read(target)
        if there is not None and there.manifest.commit == repository.commit:
            return there
        try:
            _Work(repository, choice, downloads, say, progress).make(target, conversion)
        except KeyboardInterrupt:
            say("what is downloaded is kept; the same command goes on from there")
            raise
    made = models.read(target)
    if made is None:
        raise OutputError(f"'{target}' was changed while it was made; try again.")
    return made


def discard_downloads(name: HubName) -> int:
    """Removes the downloads that an interrupted pull of a repository left. Returns the number of bytes freed.

    Raises OutputError while another process is pulling from the repository.
    """
    downloads = models.downloads_folder(name)
    if not downloads.is_dir():
        return 0

    def refuse(line: str) -> None:
        raise OutputError(f"another process is pulling from '{name.repository}'; end it first.")

    with _alone(downloads, refuse), disk_errors(downloads):
        freed = models.folder_bytes(downloads)
        shutil.rmtree(downloads)
    return freed


@contextlib.contextmanager
def _alone(downloads: Path, say: Say) -> Iterator[None]:
    """Holds the lock of the repository, and waits for it if another process has it. The system releases the lock of a
    killed process."""
    lock = FileLock(downloads.with_name(f"{downloads.name}.lock"))
    try:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            say("another process is pulling from this repository; waiting for it ...")
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        raise OutputError(f"'{downloads.parent}' cannot be locked ({error}); {WHERE}") from None
    try:
        yield
    finally:
        lock.release()


@dataclass(frozen=True)
class _Work:
    """Pulls one model while the lock is held."""

    repository: Repository
    choice: Choice
    downloads: Path
    say: Say
    progress: Callable[[PullProgress], None]

    def make(self, target: Path, conversion: Conversion) -> None:
        """Downloads, checks, converts, and moves into place. Raises what `pull` raises."""
        missing = [file for file in self.choice.files if not self._have(file)]
        self._announce(missing, target)
        self._fetch(missing)
        new = self.downloads / target.name
        with disk_errors(self.downloads):
            shutil.rmtree(new, ignore_errors=True)  # left incomplete by a killed process
        try:
            if self.choice.is_checkpoint:
                self._convert(new, conversion)
            else:
                self._collect(new)
                _check_roles(new)
            self._finish(new, target)
        finally:
            shutil.rmtree(new, ignore_errors=True)

    def _announce(self, missing: list[HubFile], target: Path) -> None:
        left = sum(file.n_bytes - _size(self._partial(file)) for file in missing)
        if not missing:
            return
        whole = self.choice.n_bytes
        here = f", {size(whole - left)} of it here already" if left < whole else ""
        files = f"{len(self.choice.files)} file{'s' if len(self.choice.files) > 1 else ''}"
        self.say(
            f"pulling '{self.repository.name}' ({self.choice.variant}, {files}, {size(whole)}{here}) from "
            f"{hub.endpoint()} to '{target}'"
        )
        # a converted model is at most about as large as its checkpoint
        check_space(self.downloads, left + (whole if self.choice.is_checkpoint else 0), WHERE)

    def _have(self, file: HubFile) -> bool:
        """Whether a file is complete and verified. A file that another installed model has is verified again and
        hard-linked."""
        path = self._complete(file)
        if path.is_file() and _size(path) == file.n_bytes:
            return True
        if file.sha256 is not None:
            for model in models.installed(self.downloads.parent.parent):
                for other in model.manifest.files:
                    if other.sha256 == file.sha256 and self._is_sound(model.path / other.name, file):
                        with contextlib.suppress(OSError):  # a file system without hard links
                            path.unlink(missing_ok=True)
                            os.link(model.path / other.name, path)
                            return True
        return False

    def _is_sound(self, path: Path, file: HubFile) -> bool:
        with contextlib.suppress(OSError), path.open("rb") as content:
            return _matches(content, file, self._checking(file))
        return False

    def _checking(self, file: HubFile) -> Callable[[int], None]:
        return lambda n_bytes: self.progress(PullProgress("checking", file.name, n_bytes, file.n_bytes))

    def _fetch(self, missing: list[HubFile]) -> None:
        done, total = self.choice.n_bytes - sum(file.n_bytes for file in missing), self.choice.n_bytes
        for file in missing:
            partial = self._partial(file)
            was_begun = _size(partial) > 0
            self._fetch_one(file, partial, done, total)
            if was_begun and _size(partial) == 0:
                self.say(f"what was downloaded of '{file.path}' before is damaged; downloading it again ...")
                self._fetch_one(file, partial, done, total)
            if _size(partial) == 0 and file.n_bytes:
                raise HubError(
                    f"'{file.path}' arrived damaged: its checksum is not the one that {hub.endpoint()} lists. It was "
                    "removed; try again, and check the network or the mirror if that does not help."
                )
            done += file.n_bytes
            with disk_errors(partial):
                partial.replace(self._complete(file))

    def _fetch_one(self, file: HubFile, partial: Path, before: int, total: int) -> None:
        """Completes a partial file and verifies it; truncates a damaged one to nothing."""
        if _size(partial) > file.n_bytes:
            partial.unlink()
        done = _size(partial)

        def advance(n_bytes: int) -> None:
            nonlocal done
            done += n_bytes
            self.progress(PullProgress("downloading", file.name, before + done, total))

        advance(0)
        hub.download(self.repository, file, partial, advance)
        with disk_errors(partial), open(partial, "r+b") as content:
            os.fsync(content.fileno())
            if _size(partial) != file.n_bytes or not _matches(content, file, self._checking(file)):
                content.truncate(0)

    def _collect(self, new: Path) -> None:
        """Links the chosen files, under their own names, into a new directory."""
        with disk_errors(new):
            new.mkdir()
            for file in self.choice.files:
                try:
                    os.link(self._complete(file), new / file.name)
                except OSError:  # no hard links here: move it; if the process is killed later, it is downloaded again
                    self._complete(file).replace(new / file.name)

    def _give_back(self, collected: Path) -> None:
        """Moves files back among the downloads that were moved for want of hard links."""
        for file in self.choice.files:
            if not self._complete(file).exists():
                (collected / file.name).replace(self._complete(file))

    def _convert(self, new: Path, conversion: Conversion) -> None:
        checkpoint = self.downloads / "checkpoint"
        shutil.rmtree(checkpoint, ignore_errors=True)
        self._collect(checkpoint)
        try:
            self.say(f"converting '{self.repository.name}' to {self.choice.variant} ...")
            conversion.run(
                Checkpoint(checkpoint, self.repository.name, self.repository.commit, self.choice.variant), new
            )
        except BaseException:
            with contextlib.suppress(OSError):  # which would hide why the conversion failed
                self._give_back(checkpoint)
            raise
        finally:
            shutil.rmtree(checkpoint, ignore_errors=True)

    def _finish(self, new: Path, target: Path) -> None:
        """Writes the manifest, moves the directory into place, and removes downloads that are no longer needed."""
        checked = {file.name: file.sha256 for file in self.choice.files}
        with disk_errors(target):
            files = tuple(
                ModelFile(path.name, path.stat().st_size, checked.get(path.name)) for path in sorted(new.iterdir())
            )
            models.write_manifest(
                new,
                Manifest(
                    repository=self.repository.name,
                    commit=self.repository.commit,
                    variant=self.choice.variant,
                    is_converted=self.choice.is_checkpoint,
                    files=files,
                    pulled=time.time(),
                ),
            )
            models.put_in_place(new, target)
            current = {file.key for file in self.repository.files}
            done = {file.key for file in self.choice.files}
            for path in self.downloads.iterdir():
                key = path.name.removesuffix(".partial")
                if path.is_file() and (key in done or key not in current):
                    path.unlink()

    def _complete(self, file: HubFile) -> Path:
        return self.downloads / file.key

    def _partial(self, file: HubFile) -> Path:
        return self.downloads / f"{file.key}.partial"


def _check_roles(new: Path) -> None:
    """Raises HubError unless one of the files, which were chosen by name, is a text model. Raises ModelFileError for an
    invalid GGUF file."""
    roles = {}
    for path in new.glob("*.gguf"):
        with GgufFile.open(path) as file:
            roles[path.name] = role(file)
    if "text" not in roles.values():
        found = ", ".join(f"'{name}' is {ROLE_NAMES[kind]}" for name, kind in sorted(roles.items()))
        raise HubError(f"none of the chosen files is a text model: {found}; name the file after a colon.")


def _matches(content: BinaryIO, file: HubFile, check: Callable[[int], None]) -> bool:
    """Whether a file has the checksum that the hub lists: SHA-256, or git's SHA-1 for small files."""
    wanted = file.sha256 or file.blob_id
    digest = hashlib.sha256() if file.sha256 else hashlib.sha1(f"blob {file.n_bytes}\0".encode(), usedforsecurity=False)
    n_bytes = 0
    while piece := content.read(READ_BYTES):
        digest.update(piece)
        n_bytes += len(piece)
        check(n_bytes)
    return digest.hexdigest() == wanted


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
