"""The Ray cluster: connected to, or started on this machine; its nodes, and how many workers each of them gets."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from granite4v.errors import DeviceError

AUTO, LOCAL = "auto", "local"
OBJECT_STORE_BYTES = 1 << 30  # of a cluster that is started here: pages on their way to workers
_REACHED_S = 15.0
_STATISTICS = "RAY_USAGE_STATS_ENABLED"
_PART_OF_STORE = 4  # the pages on their way take no more than one part in so many of a node's object store


@dataclass(frozen=True)
class Node:
    """A machine, as Ray sees it."""

    id: str
    host: str
    n_cpus: int
    n_gpus: int
    store_bytes: int


@dataclass(frozen=True)
class Share:
    """What one worker gets of its node."""

    n_cpus: int
    n_gpus: int = 0


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """The module `ray`, connected to the cluster at `address`.

    'auto': the cluster of RAY_ADDRESS or of this machine, or one that is started here and ends with the run, as
    'local' always does; it reports no usage statistics. A connection that this process has already is used and left
    open. Raises DeviceError.
    """
    ray = _import()
    if ray.is_initialized():
        yield ray
        return
    with _signal_handlers_kept():
        _connect(ray, address)
    try:
        yield ray
    finally:
        with _signal_handlers_kept():
            ray.shutdown()


def _import() -> Any:
    import ray
    import ray.exceptions
    import ray.util.scheduling_strategies

    return ray


def _connect(ray: Any, address: str) -> None:
    quiet = {"configure_logging": False, "log_to_driver": False}
    try:
        if address == AUTO:
            try:
                ray.init(address=AUTO, **quiet)
            except ConnectionError:  # there is none
                address = LOCAL
        if address == LOCAL:
            with _no_usage_statistics():
                ray.init(address=LOCAL, include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **quiet)
        elif address != AUTO:
            _check_reachable(address)
            ray.init(address=address, **quiet)
    except Exception as error:  # a node that does not start in time raises just that
        what = "no Ray cluster can be started here" if address == LOCAL else f"no Ray cluster answers at '{address}'"
        raise DeviceError(
            f"{what} ({_first_line(error)}); start one with 'ray start --head', with the same versions of Ray and "
            "Python as here, or give --ray without an address."
        ) from None


@contextlib.contextmanager
def _no_usage_statistics() -> Iterator[None]:
    """For the processes that Ray starts meanwhile."""
    before = os.environ.get(_STATISTICS)
    os.environ[_STATISTICS] = "0"
    try:
        yield
    finally:
        os.environ.pop(_STATISTICS)
        if before is not None:
            os.environ[_STATISTICS] = before


def _check_reachable(address: str) -> None:
    """Ray itself tries for minutes. Raises OSError."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), _REACHED_S).close()


@contextlib.contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """Ray replaces the handler of SIGTERM by one that leaves no time for what is unfinished."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def nodes(ray: Any) -> list[Node]:
    """Those that are alive."""
    found = []
    for node in ray.nodes():
        if node["Alive"]:
            resources = node["Resources"]
            found.append(
                Node(
                    node["NodeID"],
                    node["NodeManagerHostname"],
                    int(resources.get("CPU", 0)),
                    int(resources.get("GPU", 0)),
                    int(resources.get("object_store_memory", OBJECT_STORE_BYTES)),
                )
            )
    return found


def shares(node: Node, n_threads: int | None, device: str) -> list[Share]:
    """The workers of a node: one with all of its cores; with `n_threads`, one for each group of so many; on GPUs, one
    for each GPU. None on a node without a core, as heads of clusters often are."""
    if not node.n_cpus:
        return []
    if device == "cuda":
        n_each = max(1, min(node.n_cpus // max(1, node.n_gpus), n_threads or node.n_cpus))
        return [Share(n_each, 1)] * node.n_gpus
    n_each = min(n_threads or node.n_cpus, node.n_cpus)
    return [Share(n_each)] * (node.n_cpus // n_each)


def room_bytes(found: list[Node]) -> int:
    """Of pages that are on their way to workers."""
    return min((node.store_bytes for node in found), default=OBJECT_STORE_BYTES) // _PART_OF_STORE


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).strip().rstrip(".")[:200]
