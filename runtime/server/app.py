"""Builds the ASGI application: routes, error handlers, loading and closing of the model, and the web page at '/'."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Message, Receive, Scope, Send

from granite4v.clip_projector.files import shown
from granite4v.errors import Granite4vError
from granite4v.runtime.model import Model
from granite4v.runtime.options import GenerationOptions
from granite4v.runtime.server import errors, openapi
from granite4v.runtime.server.dispatcher import Dispatcher
from granite4v.runtime.server.endpoints import Endpoints, Named
from granite4v.runtime.server.errors import ApiError
from granite4v.runtime.server.guard import Guard
from granite4v.runtime.server.live_response import json_error
from granite4v.runtime.server.metrics import Metrics
from granite4v.runtime.server.options import ServerOptions

LOG = logging.getLogger("granite4v.server")
WEB = Path(__file__).parent / "web"
# The web page loads only its own files, and no other page can embed it in a frame.
_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_WEB_HEADERS = {
    "content-security-policy": _CSP,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


class Application(Starlette):
    """The server's Starlette application.

    `dispatcher`: queues the requests and runs them on the model. `failure`: the exception that kept the model from
    being loaded; None if there was none.
    """

    dispatcher: Dispatcher
    failure: BaseException | None = None


def create_app(model: Model | Callable[[], Model], options: ServerOptions | None = None) -> Application:
    """Builds an OpenAI-compatible server as an ASGI application.

    `model`: a loaded model, which the application leaves open; or a function that loads one. The function is called
    in a thread when the server starts. Until it returns, requests that need the model are answered with 503. The
    application closes a model that it loaded itself.
    """
    options = options or ServerOptions()
    metrics = Metrics()
    dispatcher = Dispatcher(options, metrics)
    created = int(time.time())
    endpoints = Endpoints(dispatcher, lambda: _named(dispatcher.model, options, created))
    table = endpoints.table()
    api = [
        Route(path.replace("{model}", "{model:path}"), handler, methods=[method])
        for (path, method), (handler, _) in table.items()
    ]
    served = openapi.document({place: operation for place, (_, operation) in table.items()}, options)

    async def describe(request: Request) -> Response:
        return JSONResponse(served)

    middleware = [Middleware(Guard, options=options, metrics=metrics, paths=[path for path, _ in table])]
    if options.cors_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=options.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=("retry-after", "x-request-id"),
        )
        middleware.insert(0, cors)
    app = Application(
        routes=[
            *api,
            Route("/openapi.json", describe),
            Route("/", _index),
            Mount("/web", _WebFiles(directory=WEB)),
        ],
        middleware=middleware,
        exception_handlers=dict.fromkeys((ApiError, Granite4vError, HTTPException, Exception), _refuse),
        lifespan=lambda app: _lifespan(app, model),
    )
    app.dispatcher = dispatcher
    return app


def _named(model: Model, options: ServerOptions, created: int) -> Named:
    path = model.files.text.path.absolute()
    # file names may hold bytes that are not UTF-8, which cannot be encoded in a JSON reply
    return Named(shown(options.model_name or path.parent.name), shown(path.stem), created)


@contextlib.asynccontextmanager
async def _lifespan(app: Application, model: Model | Callable[[], Model]) -> AsyncIterator[None]:
    if isinstance(model, Model):
        app.dispatcher.attach(model)
        loader = None
    else:
        loader = _Loader(app, model)
        loader.start()
    try:
        yield
    finally:
        app.dispatcher.close()
        if loader is not None:
            await asyncio.to_thread(loader.close)


class _Loader(threading.Thread):
    """Thread that loads the model, warms it up and attaches it to the dispatcher; `close` closes the model."""

    def __init__(self, app: Application, load: Callable[[], Model]) -> None:
        super().__init__(name="granite4v-load", daemon=True)  # daemon: shutdown does not wait for a load to finish
        self._app, self._load, self._loop = app, load, asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._model: Model | None = None
        self._is_closed = False

    def run(self) -> None:
        try:
            model = self._load()
            with self._lock:
                self._model = model
                if self._is_closed:
                    model.close()
                    return
            _warm_up(model)
            self._loop.call_soon_threadsafe(self._app.dispatcher.attach, model)
        except BaseException as error:
            if not self._is_closed:
                self._app.failure = error

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            if self._model is not None:
                self._model.close()


def _warm_up(model: Model) -> None:
    """Reads the weights from disk by answering two prompts at once.

    Two at once make the context allocate all its sequences from the start. With a single sequence, clients that
    alternate would evict each other's pages from the KV cache.
    """
    prompts = [model.prepare(text) for text in ("Hello.", "Good morning.")]
    options = GenerationOptions(max_tokens=1)
    # `call` submits both between two engine steps; submitted one by one from this thread, the first could be finished
    # before the second arrives
    streams = model.engine.call(lambda _: [model.submit(prompt, options) for prompt in prompts])
    for stream in streams:
        stream.result()


async def _refuse(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException) and error.status_code == 404:
        return json_error(errors.no_path(request.url.path, [*_paths(request.app.routes)]))
    if isinstance(error, HTTPException):
        return json_error(ApiError(error.status_code, f"{error.detail}", headers=dict(error.headers or {})))
    return json_error(errors.of(error))


def _paths(routes: Iterable[BaseRoute]) -> Iterator[str]:
    """The paths of all endpoints, as clients write them."""
    return (route.path.replace(":path", "") for route in routes if isinstance(route, Route))


async def _index(request: Request) -> Response:
    return FileResponse(WEB / "index.html", headers=_WEB_HEADERS)


class _WebFiles(StaticFiles):
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [(name.encode(), value.encode()) for name, value in _WEB_HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *headers]
            await send(message)

        await super().__call__(scope, receive, send_with_policy)
