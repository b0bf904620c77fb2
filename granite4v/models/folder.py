"""The models folder: one directory per model, complete or absent, each with a manifest of where it came from.

    <models>/ibm-granite--granite-vision-4.1-4b-GGUF--Q4_K_M/    granite4v-model.json, *.gguf
    <models>/.downloads/ibm-granite--granite-vision-4.1-4b-GGUF/ downloads in progress, by checksum (see `pull`)

GRANITE4V_MODELS names the folder; by default it is in the user's data folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import platformdirs

from granite4v.errors import OutputError
from granite4v.models.names import FOLDER_MARK, HubName, preferred
from granite4v.paths import PARTIAL_PREFIX, cache_folder, disk_errors, sync_folder, write_bytes

MANIFEST = "granite4v-model.json"
DOWNLOADS = ".downloads"
FORMAT = 1
MAX_MANIFEST_BYTES = 1 << 20


@dataclass(frozen=True)
class ModelFile:
    """A file of a model. `sha256`: the hub's checksum, which was verified; None for converted files."""

    name: str
    n_bytes: int
    sha256: str | None = None


@dataclass(frozen=True)
class Manifest:
    """Origin and files of a model in the folder. `pulled`: when, in seconds since the epoch."""

    repository: str
    commit: str
    variant: str
    is_converted: bool
    files: tuple[ModelFile, ...]
    pulled: float
    format: int = FORMAT

    @property
    def n_bytes(self) -> int:
        return sum(file.n_bytes for file in self.files)


@dataclass(frozen=True)
class Installed:
    """A complete model in the folder. `used`: when it was last looked up, in seconds since the epoch."""

    path: Path
    manifest: Manifest
    used: float

    @property
    def name(self) -> HubName:
        return HubName(self.manifest.repository, self.manifest.variant)


def models_folder() -> Path:
    """GRANITE4V_MODELS, or a folder in this user's data folder. It need not exist."""
    named = os.environ.get("GRANITE4V_MODELS")
    if named:
        return Path(named).absolute()
    try:
        return Path(platformdirs.user_data_dir("granite4v")) / "models"
    except RuntimeError:  # no home, as in containers and services
        return cache_folder() / "models"


def installed(folder: Path | None = None) -> list[Installed]:
    """All complete models, sorted by name. Skips directories that are damaged or were not made by `pull`."""
    folder = folder or models_folder()
    try:
        paths = [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError:  # missing, or not readable
        return []
    found = [model for path in sorted(paths) if (model := read(path)) is not None]
    return sorted(found, key=lambda model: str(model.name))


def read(path: Path) -> Installed | None:
    """Reads the model in one directory; None unless its manifest is valid and every file in it exists with its size."""
    try:
        status = (path / MANIFEST).stat()
        if status.st_size > MAX_MANIFEST_BYTES:
            return None
        content = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = tuple(ModelFile(**file) for file in content.pop("files"))
        manifest = Manifest(**content, files=files)
        texts = (manifest.repository, manifest.commit, manifest.variant)
        if not all(isinstance(text, str) for text in texts) or not isinstance(manifest.pulled, int | float):
            return None
        expected = HubName(manifest.repository).folder_name(manifest.variant)
        if manifest.format != FORMAT or path.name != expected or not all(_is_whole(path, file) for file in files):
            return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return Installed(path, manifest, status.st_mtime)


def find(name: HubName, folder: Path | None = None) -> Installed | None:
    """Finds the installed model that a name means: its variant, or the preferred one if it names none; None if there
    is no such model."""
    found = {model.manifest.variant: model for model in installed(folder) if model.name.repository == name.repository}
    if name.variant is not None:
        return next((model for variant, model in found.items() if variant.upper() == name.variant.upper()), None)
    return found.get(preferred(found) or next(iter(found), ""))


def mark_used(model: Installed) -> None:
    """Records that a model was used just now, if the folder is writable."""
    with contextlib.suppress(OSError):
        os.utime(model.path / MANIFEST)


def remove(model: Installed) -> int:
    """Removes a model; other processes never see it incomplete. Returns the number of bytes freed. Raises
    OutputError."""
    if model.path.is_symlink():
        raise OutputError(f"'{model.path}' is a link, not a model in the models folder; remove it by hand.")
    with disk_errors(model.path):
        # files that are hard-linked into another model (see `pull`) free nothing
        freed = folder_bytes(model.path)
        discard(model.path)
    return freed


def discard(path: Path) -> None:
    """Removes a directory of the models folder: renames it first, then deletes its files. Raises OSError."""
    shutil.rmtree(_set_aside(path))


def put_in_place(new: Path, path: Path) -> None:
    """Renames a complete directory to `path`, and replaces an earlier one. Raises OSError."""
    earlier = _set_aside(path) if path.exists() else None
    new.rename(path)
    sync_folder(path.parent)
    if earlier is not None:
        shutil.rmtree(earlier, ignore_errors=True)  # if that fails, `remove_leftovers` does it later


def _set_aside(path: Path) -> Path:
    return path.rename(path.with_name(f"{PARTIAL_PREFIX}{os.getpid()}-{path.name}"))


def remove_leftovers(target: Path) -> None:
    """Removes renamed directories of a model that `discard` or `put_in_place` left when their process was killed."""
    for trash in target.parent.glob(f"{PARTIAL_PREFIX}*-{target.name}"):
        shutil.rmtree(trash, ignore_errors=True)


def downloads_folder(name: HubName) -> Path:
    """The folder that keeps a repository's downloads until its model is in place."""
    return models_folder() / DOWNLOADS / name.folder_prefix


def incomplete() -> dict[str, int]:
    """Leftovers of interrupted pulls: {repository: bytes on disk}."""
    try:
        paths = sorted(path for path in (models_folder() / DOWNLOADS).iterdir() if path.is_dir())
    except OSError:
        return {}
    found = {path.name.replace(FOLDER_MARK, "/"): folder_bytes(path) for path in paths}
    return {name: n_bytes for name, n_bytes in found.items() if n_bytes}


def folder_bytes(folder: Path) -> int:
    """Total bytes of the files in a folder that have no other hard link. Raises OSError."""
    statuses = [path.lstat() for path in folder.rglob("*") if not path.is_dir()]
    return sum(status.st_size for status in statuses if status.st_nlink == 1)


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Writes the manifest, which makes a directory a model. Raises OutputError."""
    with disk_errors(path):
        write_bytes(path / MANIFEST, json.dumps(asdict(manifest), indent=1).encode())


def _is_whole(path: Path, file: ModelFile) -> bool:
    return (path / file.name).stat().st_size == file.n_bytes
