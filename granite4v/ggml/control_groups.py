"""The Linux control groups that this process is in: where containers and services have their limits."""

from __future__ import annotations

from pathlib import Path

OWN, MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def group_folders(controller: str, own: Path = OWN, mount: Path = MOUNT) -> list[tuple[int, Path]]:
    """(version, folder) of this process's group and of each group around it; a limit of any of them counts.

    `controller`: 'memory', 'cpu', ... A folder need not exist: a container without a namespace of its own for control
    groups sees its group as the root, under a path that is only valid outside. Empty where there are no control groups.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:  # hierarchy:controllers:path; version 2 names no controllers and has one hierarchy for all
        _, controllers, path = line.split(":", 2) if line.count(":") >= 2 else ("", "?", "")
        if controllers == "":
            version, root = 2, mount
        elif controller in controllers.split(","):
            version, root = 1, mount / controller
        else:
            continue
        folder = root / path.strip("/")
        found += [(version, each) for each in (folder, *folder.parents) if each == root or root in each.parents]
    return found
