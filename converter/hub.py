"""Resolves SRC: a local directory, or a repository on the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.utils import tqdm

from granite4v.errors import CheckpointError
from granite4v.models.names import HUB_URL, is_hub_id

SNAPSHOT = re.compile(r"snapshots/([0-9a-f]{40})$")
FILE_PATTERNS = ["*.json", "*.jinja", "*.safetensors"]


class DownloadBar(tqdm):  # type: ignore[misc]  # the library has no types that mypy is shown
    """The progress bar of a complete download, in bytes, on a line of its own.

    huggingface_hub would draw two more bars, for files and for transfers, by moving the cursor up and down. The command
    line escapes such control sequences, since they may come from untrusted text.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        is_total = options.get("unit") == "B" and "transfer" not in str(options.get("name"))
        if not is_total:
            options["disable"] = True
        super().__init__(*args, **options)


@dataclass(frozen=True)
class Location:
    """A checkpoint's directory, its name for the user, and its commit if known."""

    folder: Path
    name: str
    revision: str | None = None

    @property
    def short_name(self) -> str:
        """The model's own name, without its owner or parent directories."""
        return Path(self.name).resolve().name if Path(self.name).is_dir() else self.name.rsplit("/", 1)[-1]


def locate(source: str, revision: str | None = None, report: Callable[[str], None] | None = None) -> Location:
    """Resolves a local path or hub id to a directory; files that are not in the hub's cache are downloaded.

    Downloads resume, show their progress on stderr and honour HF_HUB_OFFLINE; `report` is called before one begins.
    Raises CheckpointError.
    """
    folder = Path(source)
    try:
        folder = folder.expanduser()
        if folder.is_dir():
            match = SNAPSHOT.search(folder.resolve().as_posix())
            return Location(folder, source, match.group(1) if match else None)
        exists = folder.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, no home directory, a NUL
        raise CheckpointError(f"cannot read '{source}': {getattr(error, 'strerror', None) or error}.") from None
    if exists:
        raise CheckpointError(f"'{source}' is a file; give the checkpoint's directory or a hub id.")
    if url := HUB_URL.fullmatch(source):
        at = f", with --revision {url[2]}" if url[2] else ""
        raise CheckpointError(f"'{source}' is a web address; give the hub id '{url[1]}'{at}.")
    if not is_hub_id(source):
        raise CheckpointError(
            f"there is no directory '{source}', and it is not a hub id (such as 'owner/name'); check the path."
        )
    path = _download(source, revision, report or (lambda _: None))
    return Location(path, source, path.name)


def _download(repository: str, revision: str | None, report: Callable[[str], None]) -> Path:
    at = f" at revision '{revision}'" if revision else ""
    if not constants.HF_HUB_OFFLINE:
        report(f"there is no directory '{repository}' here; fetching '{repository}'{at} from {constants.ENDPOINT}")
    try:
        folder = snapshot_download(repository, revision=revision, allow_patterns=FILE_PATTERNS, tqdm_class=DownloadBar)
        return Path(folder)
    except Exception as error:  # its HTTP library has its own exceptions, which change between versions
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"there is no directory '{repository}' here, and the hub repository of that name{at} could not be "
            f"fetched: {reason} Check the name, the network, or 'hf auth login' for a gated one."
        ) from None
