"""A repository on the hub, as plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HubFile:
    """A file of a repository. `sha256` is known for large files (LFS); `blob_id` is git's hash."""

    path: str
    n_bytes: int
    sha256: str | None
    blob_id: str | None

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    @property
    def key(self) -> str:
        """The checksum that identifies the content."""
        return self.sha256 or self.blob_id or ""


@dataclass(frozen=True)
class Repository:
    """A repository at one commit."""

    name: str
    commit: str
    files: tuple[HubFile, ...]


def size(n_bytes: float) -> str:
    """Formats a number of bytes: '2.10 GB', '15.0 MB'."""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.1f} MB"
