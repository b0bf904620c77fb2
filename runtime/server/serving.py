"""Serves the application with uvicorn until a signal arrives."""

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

_M_ARENA_MAX, _N_ARENAS = -8, 2  # parameter number and value for glibc's mallopt
_LATEST_S = 1.0  # for connections to close, added to `shutdown_s`, the time that answers get at shutdown


def listen(host: str, port: int) -> socket.socket:
    """Opens a listening socket at `host` and `port`; port 0 picks a free port. Raises DeviceError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, OverflowError, UnicodeError) as error:  # UnicodeError: an invalid host name
        why = getattr(error, "strerror", None) or error
        raise DeviceError(
            f"the server cannot listen at {host}, port {port}: {why}; choose another one with --host and --port."
        ) from None


def run(app: Application, listening: socket.socket, announce: Callable[[str], None]) -> None:
    """Serves until SIGINT, SIGTERM or SIGHUP. The signal is raised again once the requests in flight are answered or
    refused.

    `announce` is called with the address once the server listens. Raises the exception that kept the model from being
    loaded, if any.
    """
    _bound_arenas()
    options = app.dispatcher.options
    config = uvicorn.Config(
        app,
        http="h11",  # `_close_idle` relies on the attributes of its connections
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
    """Limits glibc malloc to two arenas.

    By default glibc gives threads separate arenas and does not shrink them. As requests move from thread to thread,
    memory would grow by some tens of megabytes over the first thousand requests.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, _N_ARENAS)


class _Server(uvicorn.Server):
    """uvicorn server with three additions.

    It stops when the model cannot be loaded, gives answers in flight some time at shutdown, and closes connections
    that never complete a request. uvicorn closes idle connections only between an answer and the first byte of the
    next request.
    """

    def __init__(self, config: uvicorn.Config, app: Application, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self._app, self._announce = app, announce
        # connections without a current request: their last request cycle (or None), and when it was first seen idle
        self._idle: dict[Any, tuple[Any, float]] = {}

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._announce()  # only now: uvicorn's signal handlers are installed

    async def on_tick(self, counter: int) -> bool:
        self._close_idle(time.monotonic())
        return await super().on_tick(counter) or self._app.failure is not None

    def _close_idle(self, now: float) -> None:
        """Closes connections that have had no request for `stall_s`; aborts those that are still closing `stall_s`
        later, because the client does not read the remaining bytes."""
        before, self._idle = self._idle, {}
        connections: list[Any] = list(self.server_state.connections)
        for connection in filter(_is_idle, connections):
            last, since = before.get(connection, (None, now))
            if last is not connection.cycle:  # a request came and was answered since the last look
                since = now
            if now - since > self._app.dispatcher.options.stall_s:
                transport = connection.transport
                (transport.abort if transport.is_closing() else transport.close)()
                since = now
            self._idle[connection] = (connection.cycle, since)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Handles SIGHUP, sent when the terminal closes, like SIGTERM; uvicorn does not handle it."""
        number = getattr(signal, "SIGHUP", None)  # does not exist on Windows
        with super().capture_signals():
            is_main = threading.current_thread() is threading.main_thread()
            if number is None or not is_main or signal.getsignal(number) is signal.SIG_IGN:  # ignored under nohup
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
    """Whether a connection has no request in progress. `connection`: uvicorn's H11Protocol."""
    cycle = connection.cycle
    return cycle is None or cycle.response_complete or connection.transport.is_closing()
