"""The endpoints: each reads a request body, and replies in one piece or as a stream of events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import Response

from granite4v.runtime.formats.tasks import TASKS
from granite4v.runtime.known_tasks import is_known, words_for
from granite4v.runtime.model import Model
from granite4v.runtime.server import chat, completions, errors, responses
from granite4v.runtime.server.bodies import BodyReader
from granite4v.runtime.server.content import ContentReader
from granite4v.runtime.server.dispatcher import Ask, Dispatcher
from granite4v.runtime.server.errors import ApiError, invalid
from granite4v.runtime.server.live_response import JSON, LiveResponse, Pace
from granite4v.runtime.server.openapi import Operation
from granite4v.runtime.server.parsing import parsed
from granite4v.runtime.server.replies import (
    ChatCompletion,
    Completion,
    Health,
    InputTokens,
    ModelEntry,
    ModelList,
    Parsed,
    Reply,
    ResponseReply,
    TokenPiece,
    Tokens,
)
from granite4v.runtime.server.requests import (
    ChatRequest,
    CompletionFields,
    CompletionRequest,
    ParseRequest,
    ResponseRequest,
    TokenizeRequest,
)

# A JSON value can take a thousand times its own length in memory: as parsed data, and as one of the validation errors
# that pydantic collects for a body.
MAX_VALUES = 250_000
_BEFORE_VALUES = (b",", b"[", b"{")

B = TypeVar("B", bound=BaseModel)
Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Named:
    """What replies report about the model: its name, its fingerprint, and its creation time (in Unix seconds)."""

    name: str
    fingerprint: str
    created: int


class Endpoints:
    """The request handlers of one server."""

    def __init__(self, dispatcher: Dispatcher, named: Callable[[], Named]) -> None:
        self._dispatcher, self._named = dispatcher, named
        options = dispatcher.options
        self._limits = options.limits
        self._pace = Pace(options.patience_s, options.keepalive_s, options.limits.time_s, dispatcher.ended)
        self._bodies = BodyReader(self._limits.body_bytes, options.stall_s, self._limits.time_s, dispatcher.ended)
        self._reader = ContentReader(options.media_paths)
        self._known_tasks: list[dict[str, Any]] | None = None  # computed on first use

    def table(self) -> dict[tuple[str, str], tuple[Handler, Operation]]:
        """The handler of each (path, method), with its description for the OpenAPI document."""
        busy = (429, 503, 504)
        chats = Operation("Answers a conversation.", ChatCompletion, ChatRequest, events=True, statuses=busy)
        plain = Operation("Continues a text.", Completion, CompletionRequest, events=True, statuses=busy)
        states = Operation("Answers a conversation.", ResponseReply, ResponseRequest, events=True, statuses=busy)
        counts = Operation("Counts the tokens of a conversation.", InputTokens, ChatRequest, statuses=busy)
        tokens = Operation("Splits a text into tokens.", Tokens, TokenizeRequest, statuses=(503,))
        parses = Operation("Reads an answer to a task: its tables, fields or text.", Parsed, ParseRequest)
        models = Operation("Lists the model.", ModelList, statuses=(503,))
        model = Operation("Describes the model.", ModelEntry, parameters=("model",), statuses=(404, 503))
        health = Operation("Tells whether the model is loaded.", Health, statuses=(503,))
        metrics = Operation("What the server has counted.", "text/plain")
        return {
            ("/v1/chat/completions", "POST"): (self.chat, chats),
            ("/v1/chat/completions/input_tokens", "POST"): (self.count_chat, counts),
            ("/v1/responses", "POST"): (self.responses, states),
            ("/v1/completions", "POST"): (self.completions, plain),
            ("/v1/models", "GET"): (self.models, models),
            ("/v1/models/{model}", "GET"): (self.model, model),
            ("/tokenize", "POST"): (self.tokenize, tokens),
            ("/parse", "POST"): (self.parse, parses),
            ("/health", "GET"): (self.health, health),
            ("/metrics", "GET"): (self.metrics, metrics),
        }

    # --- answers ---

    async def chat(self, request: Request) -> Response:
        body = await self._body(request, ChatRequest)
        ask, named = chat.asked(body, self._reader, self._limits.n_choices), self._named()
        leave = self._dispatcher.take()
        writer = chat.ChatWriter(named.name, named.fingerprint, include_usage=_wants_usage(body))
        content = (writer.events if body.stream else writer.whole)(self._dispatcher, ask)
        return LiveResponse(content, self._pace, is_stream=bool(body.stream), leave=leave)

    async def completions(self, request: Request) -> Response:
        body = await self._body(request, CompletionRequest)
        ask, named = completions.asked(body, self._limits.n_choices), self._named()
        leave = self._dispatcher.take()
        writer = completions.CompletionWriter(named.name, named.fingerprint, include_usage=_wants_usage(body))
        content = (writer.events if body.stream else writer.whole)(self._dispatcher, ask)
        return LiveResponse(content, self._pace, is_stream=bool(body.stream), leave=leave)

    async def responses(self, request: Request) -> Response:
        body = await self._body(request, ResponseRequest)
        ask, named = responses.asked(body, self._reader), self._named()
        leave = self._dispatcher.take()
        writer = responses.ResponseWriter(named.name, body)
        content = (writer.events if body.stream else writer.whole)(self._dispatcher, ask)
        return LiveResponse(content, self._pace, is_stream=bool(body.stream), leave=leave)

    async def count_chat(self, request: Request) -> Response:
        body = await self._body(request, ChatRequest)
        return self._counted(chat.asked(body, self._reader, self._limits.n_choices))

    def _counted(self, ask: Ask) -> Response:
        return LiveResponse(self._count(ask), self._pace, is_stream=False, leave=self._dispatcher.take())

    async def _count(self, ask: Ask) -> AsyncGenerator[bytes, None]:
        prompt = await self._dispatcher.count(ask)
        yield InputTokens(input_tokens=prompt.n_tokens, image_tokens=prompt.n_image_tokens).model_dump_json().encode()

    # --- the rest ---

    async def tokenize(self, request: Request) -> Response:
        body = await self._body(request, TokenizeRequest)
        return _json(await self._dispatcher.in_thread(_tokenized, self._dispatcher.model, body))

    async def parse(self, request: Request) -> Response:
        body = await self._body(request, ParseRequest)
        return _json(await self._dispatcher.in_thread(parsed, body))

    async def models(self, request: Request) -> Response:
        return _json(ModelList(data=[await self._entry()]))

    async def model(self, request: Request) -> Response:
        entry, asked = await self._entry(), request.path_params["model"]
        if asked != entry.id:
            raise ApiError(404, f"there is no model {asked!r:.80} here; this server has '{entry.id}'.", param="model")
        return _json(entry)

    async def _entry(self) -> ModelEntry:
        model, named = self._dispatcher.model, self._named()
        meta = {
            "n_ctx": model.n_ctx,
            "n_parallel": model.n_parallel,
            "has_vision": model.has_vision,
            "has_adapter": model.has_lora,
            "tasks": await self._dispatcher.in_thread(self._tasks, model),
        }
        return ModelEntry(id=named.name, created=named.created, owned_by="granite4v", meta=meta)

    def _tasks(self, model: Model) -> list[dict[str, Any]]:
        """The tasks that the model was trained for. `tag`: the text that asks for the task; None if it takes a
        schema."""
        if self._known_tasks is None:
            known = [task for task in TASKS.values() if is_known(model, task)] if model.has_vision else []
            self._known_tasks = [
                {
                    "name": task.name,
                    "tag": None if task.takes_schema else words_for(model, task),
                    "kind": task.kind,
                    "takes_schema": task.takes_schema,
                }
                for task in known
            ]
        return self._known_tasks

    async def health(self, request: Request) -> Response:
        _ = self._dispatcher.model
        return _json(Health())

    async def metrics(self, request: Request) -> Response:
        return Response(self._dispatcher.metrics.text(), media_type="text/plain; version=1.0.0")

    # --- bodies ---

    async def _body(self, request: Request, kind: type[B]) -> B:
        """Reads and validates a JSON body. Raises ApiError."""
        given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if given != JSON:  # also forces web pages of other origins to send a preflight request
            raise ApiError(415, f"the body has the type {given!r:.60}; send JSON with 'Content-Type: {JSON}'.")
        content = await self._bodies.read(request)
        if sum(map(content.count, _BEFORE_VALUES)) > MAX_VALUES:
            raise invalid(
                f"the body holds more than {MAX_VALUES:,} commas and brackets, which no context has room for; send "
                "less.",
                code="too_many_values",
            )
        try:
            return kind.model_validate_json(content, strict=True)
        except ValidationError as error:
            raise errors.of_validation(error, _data(content)) from None


def _data(content: bytearray) -> Any:
    """Parses a body; None if it is not JSON."""
    try:
        return from_json(content)
    except ValueError:
        return None


def _tokenized(model: Model, body: TokenizeRequest) -> Tokens:
    prompts = model.prompts
    tokens = prompts.plain(body.content, add_special=body.add_special).text_tokens
    if not body.with_pieces:
        return Tokens(tokens=list(tokens))
    pieces = prompts.tokenizer().vocabulary().pieces
    return Tokens(
        tokens=[
            TokenPiece(id=token, piece=None if piece is None else piece.decode("utf-8", "replace"))
            for token in tokens
            for piece in (pieces[token] if token < len(pieces) else None,)
        ]
    )


def _wants_usage(body: CompletionFields) -> bool:
    return body.stream_options is not None and bool(body.stream_options.include_usage)


def _json(reply: Reply) -> Response:
    return Response(reply.model_dump_json(), media_type=JSON)
