"""Connects to a Ray cluster or starts one on this machine, lists its nodes, and divides each among workers."""

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
OBJECT_STORE_BYTES = 1 << 30  # of a cluster that is started here, for pages in flight to workers
_REACHED_S = 15.0
_STATISTICS, _ADDRESS = "RAY_USAGE_STATS_ENABLED", "RAY_ADDRESS"
_PART_OF_STORE = 4  # pages in flight take at most this fraction (1/4) of a node's object store


@dataclass(frozen=True)
class Node:
    """A node of the cluster, as Ray reports it."""

    id: str
    host: str
    n_cpus: int
    n_gpus: int
    store_bytes: int


@dataclass(frozen=True)
class Share:
    """The part of a node that one worker gets."""

    n_cpus: int
    n_gpus: int = 0


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """Yields the module `ray`, connected to the cluster at `address`.

    'auto': the cluster of RAY_ADDRESS or of this machine, or if there is none, one that is started here. 'local':
    always one that is started here. A cluster that is started here ends with the run and reports no usage statistics.
    If this process is connected already, that connection is used and left open. Raises DeviceError.
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
    if address == AUTO:
        address = os.environ.get(_ADDRESS, "").strip() or AUTO
    try:
        if address == AUTO:
            try:
                ray.init(address=AUTO, **quiet)
            except ConnectionError:  # no cluster found
                address = LOCAL
        if address == LOCAL:
            with _no_usage_statistics():
                ray.init(address=LOCAL, include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **quiet)
        elif address != AUTO:
            _check_reachable(address)
            ray.init(address=address, **quiet)
    except Exception as error:  # a node that does not start in time raises a plain Exception
        what = "no Ray cluster can be started here" if address == LOCAL else f"no Ray cluster answers at '{address}'"
        raise DeviceError(
            f"{what} ({_first_line(error)}); start one with 'ray start --head', with the same versions of Ray and "
            "Python as here, or give --ray without an address."
        ) from None


@contextlib.contextmanager
def _no_usage_statistics() -> Iterator[None]:
    """Disables usage statistics in the processes that Ray starts inside the block."""
    before = os.environ.get(_STATISTICS)
    os.environ[_STATISTICS] = "0"
    try:
        yield
    finally:
        os.environ.pop(_STATISTICS)
        if before is not None:
            os.environ[_STATISTICS] = before


def _check_reachable(address: str) -> None:
    """Tries one connection first, since Ray itself retries for minutes. Raises OSError."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), _REACHED_S).close()


@contextlib.contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """Restores the SIGTERM handler after the block: Ray's own leaves no time to finish pending work."""
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
    """Returns the nodes that are alive."""
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
    """Divides a node among workers: one with all its cores; with `n_threads`, one for each group of that many cores;
    with 'cuda', one for each GPU. Returns no share for a node without cores, as cluster heads often are."""
    if not node.n_cpus:
        return []
    if device == "cuda":
        n_each = max(1, min(node.n_cpus // max(1, node.n_gpus), n_threads or node.n_cpus))
        return [Share(n_each, 1)] * node.n_gpus
    n_each = min(n_threads or node.n_cpus, node.n_cpus)
    return [Share(n_each)] * (node.n_cpus // n_each)


def room_bytes(found: list[Node]) -> int:
    """Returns how many bytes the pages in flight to workers may take."""
    return min((node.store_bytes for node in found), default=OBJECT_STORE_BYTES) // _PART_OF_STORE


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).strip().rstrip(".")[:200]
