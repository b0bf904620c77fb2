#!/usr/bin/env python3
"""Makes build/rooms/granite4v, a link to the package, which holds links to its rooms itself."""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def link_rooms(root: Path = ROOT) -> Path:
    """Renews the link and returns it."""
    link = root / "build" / "rooms" / "granite4v"
    if link.is_symlink():
        link.unlink()
    elif link.exists():
        shutil.rmtree(link)  # of links, as it was once
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(root / "granite4v", target_is_directory=True)
    return link


if __name__ == "__main__":
    print(link_rooms().parent)
