"""Finds the Linux control groups of this process, which hold the limits of containers and services."""

from __future__ import annotations

from pathlib import Path

OWN, MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def group_folders(controller: str, own: Path = OWN, mount: Path = MOUNT) -> list[tuple[int, Path]]:
    """Lists (version, folder) of this process's control group and of each parent group; a limit of any of them applies.

    `controller`: 'memory', 'cpu', ... A folder need not exist: a container without its own cgroup namespace sees its
    group as the root, under a path that is only valid outside. Empty if there are no control groups.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:  # hierarchy:controllers:path; version 2 has one hierarchy for all and names no controllers
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
