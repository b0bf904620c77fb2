"""Serves the application with uvicorn until a signal comes."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator
from typing import Any

import uvicorn

from granite4v.errors import DeviceError
from granite4v.runtime.server.app import Application

_M_ARENA_MAX, _N_ARENAS = -8, 2  # of glibc's mallopt
_LATEST_S = 1.0  # beyond the time that answers are given at the end, for connections to close


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; with port 0, at a free one. Raises DeviceError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, OverflowError, UnicodeError) as error:  # UnicodeError: of a name that no host can have
        why = getattr(error, "strerror", None) or error
        raise DeviceError(
            f"the server cannot listen at {host}, port {port}: {why}; choose another one with --host and --port."
        ) from None


def run(app: Application, listening: socket.socket, announce: Callable[[str], None]) -> None:
    """Serves until SIGINT, SIGTERM or SIGHUP, which is raised again once what was in flight is answered or refused.

    `announce` gets the address when the server listens. Raises what kept the model from being loaded.
    """
    _bound_arenas()
    options = app.dispatcher.options
    config = uvicorn.Config(
        app,
        http="h11",  # `_close_idle` knows its connections
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=round(options.shutdown_s + _LATEST_S),
    )
    host, port = listening.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    server = _Server(config, app, lambda: announce(address))
    server.run(sockets=[listening])
    if app.failure is not None:
        raise app.failure


def _bound_arenas() -> None:
    """glibc gives threads heaps of their own and keeps in each what was once needed there: memory would grow by some
    tens of megabytes over the first thousand requests, which threads take in turn."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, _N_ARENAS)


class _Server(uvicorn.Server):
    """Ends as well when the model cannot be loaded, gives answers some time at the end, and closes connections on which
    no request comes to be: uvicorn does that only between an answer and the first byte of the next request."""

    def __init__(self, config: uvicorn.Config, app: Application, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self._app, self._announce = app, announce
        # connections without a request: the one before, and when that was noticed
        self._idle: dict[Any, tuple[Any, float]] = {}

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._announce()  # not before: signals are uvicorn's from now on

    async def on_tick(self, counter: int) -> bool:
        self._close_idle(time.monotonic())
        return await super().on_tick(counter) or self._app.failure is not None

    def _close_idle(self, now: float) -> None:
        """Closes connections without a request after a while; cuts those that do not take their last bytes then."""
        before, self._idle = self._idle, {}
        connections: list[Any] = list(self.server_state.connections)
        for connection in filter(_is_idle, connections):
            last, since = before.get(connection, (None, now))
            if last is not connection.cycle:  # one has come and gone meanwhile
                since = now
            if now - since > self._app.dispatcher.options.stall_s:
                transport = connection.transport
                (transport.abort if transport.is_closing() else transport.close)()
                since = now
            self._idle[connection] = (connection.cycle, since)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """SIGHUP, as of a terminal that is closed, ends it as SIGTERM does; uvicorn knows nothing of it."""
        number = getattr(signal, "SIGHUP", None)  # Windows has none
        with super().capture_signals():
            is_main = threading.current_thread() is threading.main_thread()
            if number is None or not is_main or signal.getsignal(number) is signal.SIG_IGN:  # as nohup arranges
                yield
                return
            before = signal.signal(number, self.handle_exit)
            try:
                yield
            finally:
                signal.signal(number, before)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        dispatcher = self._app.dispatcher
        dispatcher.is_ending = True
        ending = asyncio.get_running_loop().call_later(dispatcher.options.shutdown_s, dispatcher.ended.set)
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()


def _is_idle(connection: Any) -> bool:
    """`connection`: uvicorn's H11Protocol."""
    cycle = connection.cycle
    return cycle is None or cycle.response_complete or connection.transport.is_closing()
