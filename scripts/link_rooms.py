#!/usr/bin/env python3
"""Makes build/rooms/granite4v, a folder of links that looks like the installed package.

Type checkers and editors do not follow setuptools' package-dir. Point them at build/rooms.
"""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("clip_projector", "converter", "runtime")


def link_rooms(root: Path = ROOT) -> Path:
    """Renews the folder and returns it."""
    folder = root / "build" / "rooms" / "granite4v"
    if folder.exists():
        shutil.rmtree(folder)  # links only: what they point to stays
    folder.mkdir(parents=True)
    sources = [path for path in (root / "granite4v").iterdir() if path.name != "__pycache__"]
    for source in [*sources, *(root / room for room in ROOMS)]:
        (folder / source.name).symlink_to(source, target_is_directory=source.is_dir())
    return folder


if __name__ == "__main__":
    print(link_rooms().parent)
