"""Builds the server's OpenAPI document from the pydantic models of request and reply bodies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from granite4v.runtime.server.options import ServerOptions
from granite4v.runtime.server.replies import ErrorReply

_REF = "#/components/schemas/{model}"
# before OpenAPI 3.2, the schema of a stream is interpreted as the schema of each event
_EVENT = {
    "type": "object",
    "properties": {
        "event": {"type": "string"},
        "data": {"type": "string", "description": "One JSON document; '[DONE]' at the end of completions."},
    },
    "required": ["data"],
}


@dataclass(frozen=True)
class Operation:
    """Describes one method of one path. `reply`: a model, or the media type of a text reply. `events`: whether the body
    can ask for a stream of server-sent events instead. `statuses`: HTTP statuses of its errors."""

    summary: str
    reply: type[BaseModel] | str
    body: type[BaseModel] | None = None
    events: bool = False
    parameters: Sequence[str] = ()
    statuses: Sequence[int] = field(default=())


_ERRORS = {
    400: "The request cannot be answered; the message says why.",
    401: "The API key is missing or wrong.",
    404: "There is no such thing.",
    408: "The body stopped before its end.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    421: "The server does not answer for this host.",
    429: "Too many requests wait already.",
    503: "The model is loading, or the server is ending.",
    504: "The answer took too long.",
}


def document(operations: Mapping[tuple[str, str], Operation], options: ServerOptions) -> dict[str, Any]:
    """Builds the OpenAPI document. `operations`: by (path, method)."""
    used: set[type[BaseModel]] = {ErrorReply}
    for operation in operations.values():
        used |= {model for model in (operation.body, operation.reply) if isinstance(model, type)}
    inputs = {operation.body for operation in operations.values()}
    kinds = [(model, "validation" if model in inputs else "serialization") for model in sorted(used, key=_name)]
    _, schemas = models_json_schema(kinds, ref_template=_REF)  # type: ignore[arg-type]
    paths: dict[str, dict[str, Any]] = {}
    for (path, method), operation in operations.items():
        paths.setdefault(path, {})[method.lower()] = _operation(path, operation, options)
    components: dict[str, Any] = {"schemas": schemas["$defs"]}
    if options.api_key is not None:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "granite4v", "version": version("granite4v")},
        "paths": paths,
        "components": components,
    }


def _name(model: type[BaseModel]) -> str:
    return model.__name__


def _operation(path: str, operation: Operation, options: ServerOptions) -> dict[str, Any]:
    contents: dict[str, Any] = (
        {operation.reply: {"schema": {"type": "string"}}}
        if isinstance(operation.reply, str)
        else {"application/json": {"schema": _reference(operation.reply)}}
    )
    if operation.events:
        contents["text/event-stream"] = {"schema": _EVENT}
    responses: dict[str, Any] = {"200": {"description": operation.summary, "content": contents}}
    is_open = path == "/health"
    statuses = {*operation.statuses, *({401} if options.api_key and not is_open else ())}
    statuses |= {421} if options.hosts else set()
    statuses |= {400, 408, 413, 415, 429, 503} if operation.body is not None else set()
    for status in sorted(statuses):
        content = {"application/json": {"schema": _reference(ErrorReply)}}
        responses[str(status)] = {"description": _ERRORS[status], "content": content}
    found: dict[str, Any] = {"summary": operation.summary, "responses": responses}
    if operation.body is not None:
        content = {"application/json": {"schema": _reference(operation.body)}}
        found["requestBody"] = {"required": True, "content": content}
    if operation.parameters:
        found["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in operation.parameters
        ]
    if options.api_key is not None and not is_open:
        found["security"] = [{"key": []}]
    return found


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REF.format(model=model.__name__)}
