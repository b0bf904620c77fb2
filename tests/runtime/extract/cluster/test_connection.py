"""Tests of which workers a node gets, and of the message where there is no cluster."""

from __future__ import annotations

import pytest

from granite4v.errors import DeviceError
from granite4v.runtime.extract.cluster.connection import Node, Share, connected, room_bytes, shares


def node(n_cpus: int, n_gpus: int = 0, store_bytes: int = 1 << 30) -> Node:
    return Node("id", "host", n_cpus, n_gpus, store_bytes)


@pytest.mark.parametrize(
    ("there", "n_threads", "device", "expected"),
    [
        (node(8), None, "auto", [Share(8)]),
        (node(8), 3, "auto", [Share(3)] * 2),
        (node(2), 4, "cpu", [Share(2)]),
        (node(0), None, "auto", []),
        (node(0), 4, "auto", []),
        (node(8, 2), None, "cuda", [Share(4, 1)] * 2),
        (node(8, 2), 1, "cuda", [Share(1, 1)] * 2),
        (node(1, 4), None, "cuda", [Share(1, 1)] * 4),
        (node(8, 0), None, "cuda", []),
    ],
)
def test_the_workers_of_a_node(there: Node, n_threads: int | None, device: str, expected: list[Share]) -> None:
    assert shares(there, n_threads, device) == expected


def test_the_smallest_store_bounds_what_is_on_its_way() -> None:
    assert room_bytes([node(1, store_bytes=800), node(1, store_bytes=400)]) == 100


def test_an_address_where_no_cluster_is() -> None:
    message = "no Ray cluster answers at '127.0.0.1:1'.+'ray start --head'"
    with pytest.raises(DeviceError, match=message), connected("127.0.0.1:1"):
        pass


def test_an_address_in_the_environment_is_tried_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(DeviceError, match="no Ray cluster answers at '127.0.0.1:1'"), connected("auto"):
        pass
