"""Compiles a callback that runs graphs between decoder layers without Python.

After a layer of a hundred megabytes nothing of Python is left in the CPU's caches, so copying a row and calling ggml
from Python takes 0.07 ms, 3% of a layer. If other threads are busy, it also has to wait for the GIL.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from granite4v.ggml.compiled.writer import LANES, Writer, compiled, llvm
from granite4v.ggml.declarations import BackendP, GraphP
from granite4v.ggml.library import lib

_LONGEST = 16  # bytes of a node's name, with the terminating zero


class InPlace(NamedTuple):
    """A graph that computes `n` float32 values from `n` others. `given` and `found` are the addresses of its input and
    its output in host memory."""

    backend: BackendP
    graph: GraphP
    given: int
    found: int
    n: int


class Place(ctypes.Structure):
    """A node, by name, after which something is computed: by `graph` if that is set and the node has `n_rows` rows,
    otherwise by the other callback. `is_seen`: whether that has been done for the current graph of llama.cpp."""

    _fields_ = [
        ("name", ctypes.c_char * _LONGEST),
        ("mask", ctypes.c_char * _LONGEST),  # 0xff for each byte of the name to compare
        ("backend", ctypes.c_void_p),
        ("graph", ctypes.c_void_p),
        ("given", ctypes.c_void_p),
        ("found", ctypes.c_void_p),
        ("n_rows", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("is_seen", ctypes.c_int64),
    ]

    def use(self, found: InPlace | None, n_rows: int) -> None:
        """Prepares for the next graph of llama.cpp, with `n_rows` rows. `found`: the graph to run; None, or a number of
        values that is no multiple of `LANES`, leaves the node to the other callback."""
        self.is_seen, self.graph = 0, None
        if found is not None and found.n % LANES == 0:
            self.backend, self.graph, self.given, self.found = found.backend.value, found.graph.value, *found[2:4]
            self.n_rows, self.n = n_rows, found.n


class State(ctypes.Structure):
    """The callback's data. Its first field is the callback's own address, so that another callback can call it, given
    only its data (`nodes.callback`)."""

    _fields_ = [
        ("callback", ctypes.c_void_p),
        ("other", ctypes.c_void_p),  # called for what this one cannot compute or failed to
        ("compute", ctypes.c_void_p),  # ggml_backend_graph_compute
        ("is_host", ctypes.c_void_p),  # ggml_backend_buffer_is_host
        ("is_wanted", ctypes.c_int64),
        ("n_places", ctypes.c_int64),
        ("places", ctypes.POINTER(Place)),
    ]


def state_for(names: list[bytes], other: int) -> State:
    """Creates the callback's data for nodes of these names. `other`: the address of a callback that computes whatever
    this one does not; without LLVM it is used instead."""
    places = (Place * max(1, len(names)))()
    for place, name in zip(places, names, strict=False):
        place.name, place.mask = name, b"\xff" * (len(name) + 1)
    ggml = lib()
    compute, is_host = (
        ctypes.cast(function, ctypes.c_void_p).value
        for function in (ggml.ggml_backend_graph_compute, ggml.ggml_backend_buffer_is_host)
    )
    return State(address() or other, other, compute, is_host, 0, len(names), places)


@functools.cache
def address() -> int | None:
    """Returns the address of the compiled `ggml_backend_sched_eval_callback`; None without a working LLVM."""
    if llvm() is None:
        return None
    try:
        return int(_compiled().get_function_address("see_between"))
    except RuntimeError:  # LLVM fails; `NodeKernels.available` warns of that
        return None


@functools.cache
def _compiled() -> Any:
    return compiled(_text, "between layers")


def _text() -> str:
    """Writes a ggml_backend_sched_eval_callback: bool (struct ggml_tensor * t, bool ask, void * user_data)."""
    w = Writer()
    function = w.begin("see_between", w.i8, w.bytes, w.i8, w.bytes)
    node, asks, state = function.args
    b = w.b
    no, yes, left_alone, by_other = (function.append_basic_block() for _ in range(4))

    def needed(condition: Any, otherwise: Any) -> None:
        more = function.append_basic_block()
        b.cbranch(condition, more, otherwise)
        b.position_at_end(more)

    needed(b.icmp_signed("!=", _of(w, state, State, "is_wanted"), w.integer(0)), no)
    places = _of(w, state, State, "places", w.bytes)
    index = _place_of(w, node, places, _of(w, state, State, "n_places"))
    needed(b.icmp_signed(">=", index, w.integer(0)), left_alone)
    place = b.gep(places, [b.mul(index, w.integer(ctypes.sizeof(Place)))])
    computed, asked = function.append_basic_block(), function.append_basic_block()
    b.cbranch(b.icmp_signed("!=", asks, w.integer(0, w.i8)), asked, computed)
    b.position_at_end(asked)
    b.ret(b.zext(b.icmp_signed("==", _of(w, place, Place, "is_seen"), w.integer(0)), w.i8))
    b.position_at_end(computed)
    _compute(w, node, state, place, lambda condition: needed(condition, by_other))
    b.branch(yes)
    b.position_at_end(by_other)
    other = b.bitcast(_of(w, state, State, "other", w.bytes), function.function_type.as_pointer())
    b.ret(b.call(other, [node, asks, state]))
    b.position_at_end(left_alone)
    b.ret(b.zext(b.icmp_signed("==", asks, w.integer(0, w.i8)), w.i8))
    for block, value in ((no, 0), (yes, 1)):
        b.position_at_end(block)
        b.ret(w.integer(value, w.i8))
    return str(w.module)


def _compute(w: Writer, node: Any, state: Any, place: Any, needed: Callable[[Any], None]) -> None:
    """Runs the graph of a place on a node's rows and overwrites them with the result. `needed` jumps to the other
    callback unless its condition holds; the rows are still unchanged then."""
    b, n = w.b, _of(w, place, Place, "n")
    graph = _of(w, place, Place, "graph", w.bytes)
    needed(b.icmp_unsigned("!=", graph, w.ir.Constant(w.bytes, None)))
    n_rows = w.field(node, "ne", 1)
    needed(b.icmp_signed("==", n_rows, _of(w, place, Place, "n_rows")))
    needed(b.icmp_signed("==", b.mul(w.field(node, "ne", 0), n_rows), n))
    is_host = b.bitcast(_of(w, state, State, "is_host", w.bytes), w.ir.FunctionType(w.i1, [w.bytes]).as_pointer())
    needed(b.call(is_host, [w.field(node, "buffer", kind=w.bytes)]))
    rows, found = w.field(node, "data", kind=w.bytes), _of(w, place, Place, "found", w.bytes)
    _copy(w, _of(w, place, Place, "given", w.bytes), rows, n)
    kind = w.ir.FunctionType(w.i32, [w.bytes, w.bytes]).as_pointer()
    compute = b.bitcast(_of(w, state, State, "compute", w.bytes), kind)
    status = b.call(compute, [_of(w, place, Place, "backend", w.bytes), graph])
    needed(b.icmp_signed("==", status, w.integer(0, w.i32)))
    needed(_is_finite(w, found, n))
    _copy(w, rows, found, n)
    w.store(w.integer(1), place, w.integer(_offset(Place, "is_seen")), 8)


def _of(w: Writer, base: Any, structure: type[ctypes.Structure], name: str, kind: Any = None) -> Any:
    return w.load(base, w.integer(_offset(structure, name)), kind or w.i64, 8)


def _offset(structure: type[ctypes.Structure], name: str) -> int:
    return int(getattr(structure, name).offset)


def _place_of(w: Writer, node: Any, places: Any, n_places: Any) -> Any:
    """Index of the place with a node's name, or -1. Names are compared as two masked words of eight bytes."""
    b = w.b
    half = _LONGEST // 2
    name = [w.field(node, "name", i) for i in range(2)]
    with w.loop(w.integer(0), n_places, w.integer(1), [w.integer(-1)]) as (i, turn):
        place, is_it = b.gep(places, [b.mul(i, w.integer(ctypes.sizeof(Place)))]), w.integer(1, w.i1)
        for part, value in enumerate(name):
            mask, expected = (
                w.load(place, w.integer(_offset(Place, field) + half * part), w.i64, 8) for field in ("mask", "name")
            )
            is_it = b.and_(is_it, b.icmp_unsigned("==", b.and_(value, mask), expected))
        turn[0] = b.select(is_it, i, turn[0])
    return turn[0]


def _copy(w: Writer, target: Any, source: Any, n: Any) -> None:
    with w.loop(w.integer(0), n, w.integer(LANES)) as (i, _):
        place = w.b.mul(i, w.integer(4))
        w.store(w.load(source, place, w.vector), target, place)


def _is_finite(w: Writer, values: Any, n: Any) -> Any:
    """Whether the sum of the squares of the values is finite. It may overflow although all values are finite: then the
    other callback computes them again and checks each value."""
    with w.loop(w.integer(0), n, w.integer(LANES), [w.all(0.0)]) as (i, turn):
        one = w.load(values, w.b.mul(i, w.integer(4)), w.vector)
        turn[0] = w.fma(one, one, turn[0])
    return w.b.fcmp_ordered("<", w.total(turn[0]), w.number(float("inf")))
