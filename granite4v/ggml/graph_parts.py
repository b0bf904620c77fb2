"""Cutting a graph into parts that are computed one by one: for progress, and for operations that are not ggml's."""

from __future__ import annotations

import ctypes
from collections.abc import Container, Iterator
from typing import Any

MAX_PARTS, MIN_NODES = 50, 64  # of a graph that reports progress


def graph_parts(nodes: list[Any], alone: Container[int]) -> Iterator[list[Any]]:
    """The nodes in order, in lists; a node whose address is in `alone` is a list of its own."""
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
