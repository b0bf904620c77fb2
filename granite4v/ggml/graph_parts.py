"""Cuts a graph into parts that are computed one after another: for progress, and for operations outside ggml."""

from __future__ import annotations

import ctypes
from collections.abc import Container, Iterator
from typing import Any

MAX_PARTS, MIN_NODES = 50, 64  # aim for 50 parts, but allow each part at least 64 nodes


def graph_parts(nodes: list[Any], alone: Container[int]) -> Iterator[list[Any]]:
    """Yields the nodes in order, as lists; a node whose address is in `alone` gets a list of its own."""
    longest = max(MIN_NODES, -(-len(nodes) // MAX_PARTS))
    part: list[Any] = []
    for node in nodes:
        is_alone = ctypes.addressof(node.contents) in alone
        if part and (is_alone or len(part) == longest):
            yield part
            part = []
        part.append(node)
        if is_alone:
            yield part
            part = []
    if part:
        yield part
