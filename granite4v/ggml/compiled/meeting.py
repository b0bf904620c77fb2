"""Coordinates the threads that compute one node: shared memory, a barrier, and shares of the work.

ggml calls an operation once in each of its threads, all at the same time, and puts a barrier behind it. The state that
the threads share is in the node, behind the parameters of ggml's custom operation. It is zero before and after a call.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from granite4v.ggml.compiled.writer import Writer
from granite4v.ggml.declarations import TensorStruct

# Byte offsets in the node's parameters: address of the shared memory, number of threads that have reached the barrier,
# number of threads that have left, and the next share.
ROOM, MET, LEFT, NEXT = 44, 52, 56, 60
STATE = (ROOM, ROOM + 4, MET, LEFT, NEXT)  # the same, as words of four bytes
ALIGNED = 64  # bytes; a block of memory begins with its size, the aligned part comes after that
MOST_KEPT = 32 << 20  # bytes; a larger block is freed after the call
SPINS = 1 << 12  # iterations of a waiting thread before it yields its core


class Meeting:
    """The threads of one call of an operation.

    The memory of a call is kept for the next one. In a process that returns memory to the system at once, as a server
    does, allocating it anew for each product costs up to a quarter of the product's time.
    """

    def __init__(self, writer: Writer, node: Any, ith: Any, nth: Any) -> None:
        self.w, self.nth, self.is_first = writer, nth, writer.b.icmp_signed("==", ith, writer.integer(0))
        self.parameters = writer.b.gep(node, [writer.integer(TensorStruct.op_params.offset)])

    def room(self, n_bytes: Any) -> Any:
        """Allocates memory that all threads share, aligned to 64 bytes: thread 0 does, the others wait for it."""
        w, b = self.w, self.w.b
        with b.if_then(self.is_first):
            b.store_atomic(self._taken(b.add(n_bytes, w.integer(2 * ALIGNED))), self._at(ROOM, w.i64), "release", 8)
        self._wait(lambda: b.icmp_signed("!=", b.load_atomic(self._at(ROOM, w.i64), "acquire", 8), w.integer(0)))
        return self._aligned(b.add(b.load_atomic(self._at(ROOM, w.i64), "acquire", 8), w.integer(ALIGNED)))

    def own_room(self, n_bytes: Any) -> tuple[Any, Any]:
        """Returns memory of one thread, aligned to 64 bytes, and the pointer that it must free."""
        room = self._allocated(self.w.b.add(n_bytes, self.w.integer(ALIGNED)))
        return self._aligned(self.w.b.ptrtoint(room, self.w.i64)), room

    def free(self, room: Any) -> None:
        """Frees memory of one thread; a null pointer is allowed."""
        self.w.b.call(self.w.declare("free", self.w.ir.VoidType(), self.w.bytes), [room])

    def wait_for_all(self) -> None:
        """Waits until every thread has called this. Works once per call of the operation."""
        w, b = self.w, self.w.b
        b.atomic_rmw("add", self._at(MET, w.i32), w.integer(1, w.i32), "acq_rel")
        n = b.trunc(self.nth, w.i32)
        self._wait(lambda: b.icmp_signed("==", b.load_atomic(self._at(MET, w.i32), "acquire", 4), n))

    @contextmanager
    def shares(self, n: Any) -> Iterator[tuple[Any, Any]]:
        """Emits `for share in range(n)`, spread over the threads: each takes another share when it has done one. Also
        yields the thread's next share, which may be past the end."""
        w, b = self.w, self.w.b

        def taken() -> Any:
            return b.sext(b.atomic_rmw("add", self._at(NEXT, w.i32), w.integer(1, w.i32), "monotonic"), w.i64)

        first, before = taken(), b.block
        head, body, after = (b.function.append_basic_block() for _ in range(3))
        b.branch(head)
        b.position_at_end(head)
        share = b.phi(w.i64)
        share.add_incoming(first, before)
        b.cbranch(b.icmp_signed("<", share, n), body, after)
        b.position_at_end(body)
        following = taken()
        yield share, following
        share.add_incoming(following, b.block)
        b.branch(head)
        b.position_at_end(after)

    def leave(self) -> None:
        """Ends the call; the last thread to leave gives the memory back and sets the state to zero."""
        w, b = self.w, self.w.b
        n_left = b.atomic_rmw("add", self._at(LEFT, w.i32), w.integer(1, w.i32), "acq_rel")
        with b.if_then(b.icmp_signed("==", b.add(n_left, w.integer(1, w.i32)), b.trunc(self.nth, w.i32))):
            room = b.load_atomic(self._at(ROOM, w.i64), "acquire", 8)
            with b.if_then(b.icmp_signed("!=", room, w.integer(0))):
                self._give_back(room)
            b.store_atomic(w.integer(0), self._at(ROOM, w.i64), "release", 8)
            for place in (MET, LEFT, NEXT):
                b.store_atomic(w.integer(0, w.i32), self._at(place, w.i32), "release", 4)

    def _at(self, place: int, kind: Any) -> Any:
        return self.w.b.bitcast(self.w.b.gep(self.parameters, [self.w.integer(place)]), kind.as_pointer())

    def _wait(self, is_over: Any) -> None:
        w, b = self.w, self.w.b
        pause = w.declare("llvm.x86.sse2.pause", w.ir.VoidType())
        before, head, again, after = b.block, *(b.function.append_basic_block() for _ in range(3))
        b.branch(head)
        b.position_at_end(head)
        n = b.phi(w.i32)
        n.add_incoming(w.integer(1, w.i32), before)
        b.cbranch(is_over(), after, again)
        b.position_at_end(again)
        b.call(pause, [])
        if os.name == "posix":
            is_long = b.icmp_signed("==", b.and_(n, w.integer(SPINS - 1, w.i32)), w.integer(0, w.i32))
            with b.if_then(is_long, likely=False):
                b.call(w.declare("sched_yield", w.i32), [])
        n.add_incoming(b.add(n, w.integer(1, w.i32)), b.block)
        b.branch(head)
        b.position_at_end(after)

    # --- memory ---

    def _kept(self) -> Any:
        """Global variable with the address of the kept block, 0 if there is none. The first call to come takes it."""
        if "kept" not in self.w.module.globals:
            kept = self.w.ir.GlobalVariable(self.w.module, self.w.i64, "kept")
            kept.initializer, kept.linkage, kept.align = self.w.integer(0), "internal", 8
        return self.w.module.globals["kept"]

    def _taken(self, n_bytes: Any) -> Any:
        """Address of a block of at least `n_bytes`: the kept one if that is large enough, otherwise a new one."""
        w, b = self.w, self.w.b
        kept = b.atomic_rmw("xchg", self._kept(), w.integer(0), "acq_rel")
        none, is_kept, new, done = (b.function.append_basic_block() for _ in range(4))
        b.cbranch(b.icmp_signed("==", kept, w.integer(0)), new, is_kept)
        b.position_at_end(is_kept)
        size = w.load(b.inttoptr(kept, w.bytes), w.integer(0), w.i64, 8)
        b.cbranch(b.icmp_signed(">=", size, n_bytes), done, none)
        b.position_at_end(none)
        self._free(kept)
        b.branch(new)
        b.position_at_end(new)
        room = self._allocated(n_bytes)
        w.store(n_bytes, room, w.integer(0), 8)
        found = b.ptrtoint(room, w.i64)
        b.branch(done)
        last = b.block
        b.position_at_end(done)
        taken = b.phi(w.i64)
        taken.add_incoming(kept, is_kept)
        taken.add_incoming(found, last)
        return taken

    def _aligned(self, address: Any) -> Any:
        w, b = self.w, self.w.b
        return b.inttoptr(b.and_(b.add(address, w.integer(ALIGNED - 1)), w.integer(-ALIGNED)), w.bytes)

    def _allocated(self, n_bytes: Any) -> Any:
        w, b = self.w, self.w.b
        room = b.call(w.declare("malloc", w.bytes, w.i64), [n_bytes])
        with b.if_then(b.icmp_unsigned("==", room, w.ir.Constant(w.bytes, None)), likely=False):
            b.call(w.declare("abort", w.ir.VoidType()), [])  # as ggml does
        return room

    def _give_back(self, room: Any) -> None:
        w, b = self.w, self.w.b
        size = w.load(b.inttoptr(room, w.bytes), w.integer(0), w.i64, 8)
        with b.if_else(b.icmp_signed("<=", size, w.integer(MOST_KEPT))) as (is_small, is_large):
            with is_small:
                other = b.atomic_rmw("xchg", self._kept(), room, "acq_rel")
                with b.if_then(b.icmp_signed("!=", other, w.integer(0))):
                    self._free(other)
            with is_large:
                self._free(room)

    def _free(self, room: Any) -> None:
        self.free(self.w.b.inttoptr(room, self.w.bytes))
