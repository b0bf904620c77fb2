"""Error replies to failed requests: an HTTP status, and an error in the format of OpenAI's API."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from granite4v.errors import (
    ConstraintError,
    ContextOverflowError,
    DocumentError,
    Granite4vError,
    ImageError,
    PromptError,
)

LOG = logging.getLogger("granite4v.server")
_MOST_SHOWN = 200  # characters of the location of a problem, because a client can send keys of any length
# Exceptions that a bad request can cause, with their error codes; the others count as failures of the server.
_OF_REQUESTS: dict[type[Granite4vError], str] = {
    ContextOverflowError: "context_length_exceeded",
    PromptError: "invalid_prompt",
    ImageError: "invalid_image",
    DocumentError: "invalid_document",
    ConstraintError: "invalid_schema",
}
RETRY, GIVE_UP = {"x-should-retry": "true"}, {"x-should-retry": "false"}  # headers that openai's clients obey


class ApiError(Exception):
    """A request was refused or failed. `param`: the field of the request that is at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.headers = headers or {}

    @property
    def kind(self) -> str:
        known = {401: "authentication_error", 429: "rate_limit_error", 503: "unavailable_error", 504: "timeout_error"}
        return known.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def content(self) -> dict[str, Any]:
        message = str(self)
        return {"error": {"message": message, "type": self.kind, "param": self.param, "code": self.code}}

    def json(self) -> bytes:
        return json.dumps(self.content()).encode()  # ASCII: a message may quote lone surrogates


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, code=code, param=param)


def no_path(path: str, known: Sequence[str]) -> ApiError:
    """A path that does not exist; names the one that was probably meant."""
    shown = path[:_MOST_SHOWN].rstrip("/")
    ends = [one for one in known if shown.strip("/") and one.endswith(f"/{shown.strip('/')}")]
    near = next(iter([*ends, *difflib.get_close_matches(shown, known, 1, 0.75)]), None)
    advice = f"expected one of {', '.join(known)}." if near is None else f"did you mean '{near}'?"
    return ApiError(404, f"there is no path {shown!r} here; {advice}", code="no_such_path")


def loading() -> ApiError:
    return ApiError(
        503,
        "the model is still loading; ask again in a moment.",
        code="model_loading",
        headers={"retry-after": "2", **RETRY},
    )


def shutting_down() -> ApiError:
    return ApiError(
        503,
        "the server is shutting down; the answer was given up.",
        code="shutting_down",
        headers={"retry-after": "5", **RETRY},
    )


def too_busy() -> ApiError:
    return ApiError(
        429,
        "too many large requests are on their way to the server; send this one again later.",
        code="too_busy",
        headers={"connection": "close", "retry-after": "5", **RETRY},
    )


def took_too_long(time_s: float) -> ApiError:
    return ApiError(
        504,
        f"the answer took longer than {time_s:g} s, the server's limit; ask for a shorter one (max_tokens), or raise "
        "--max-time.",
        code="timeout",
        headers=GIVE_UP,
    )


def of_validation(error: ValidationError, body: object) -> ApiError:
    """Describes what is wrong with a parsed body: one problem with its location, and the number of other problems."""
    problems = error.errors(include_url=False, include_input=False)
    # the deepest one: for a union, that is in the alternative that fits best
    first = max(problems, key=lambda problem: len(problem["loc"]))
    where = _place(first["loc"], body, is_missing=first["type"] == "missing")
    told = f"'{where}': {_message(first)}" if where else _message(first)
    if len(problems) > 1:
        told += f" ({len(problems) - 1} more problem{'s' if len(problems) > 2 else ''})"
    return invalid(told, param=where or None, code=first["type"])


def _message(problem: ErrorDetails) -> str:
    context = problem.get("ctx", {})
    if problem["type"] == "union_tag_not_found":
        return f"{context['discriminator']} is missing"
    if problem["type"] == "union_tag_invalid":
        return f"{context['discriminator']} is {context['tag']!r:.80}, expected one of {context['expected_tags']}"
    return problem["msg"]


def _place(location: Sequence[int | str], body: object, *, is_missing: bool) -> str:
    """The path of a problem in the client's own JSON, such as 'messages[0].content[1].text'.

    Leaves out the union tags in pydantic's location: parts that are no index or key of `body` are skipped.
    """
    where = ""
    for i, part in enumerate(location):
        if isinstance(part, int) and isinstance(body, list) and part < len(body):
            where, body = f"{where}[{part}]", body[part]
        elif isinstance(part, str) and isinstance(body, dict) and part in body:
            where, body = f"{where}.{part}", body[part]
        elif is_missing and i == len(location) - 1:
            where = f"{where}.{part}"
    return where.lstrip(".")[:_MOST_SHOWN]


def of(error: BaseException) -> ApiError:
    """Converts an exception to the ApiError for the client. Unexpected exceptions are logged with their traceback."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ConstraintError) and error.advice:  # its advice is about options that clients do not have
        return invalid(f"{error.problem} Change the schema, or leave it out.", code=_OF_REQUESTS[ConstraintError])
    for kind, code in _OF_REQUESTS.items():
        if isinstance(error, kind):
            return invalid(str(error), code=code)
    if isinstance(error, Granite4vError):
        LOG.error("%s", error)
        return ApiError(500, str(error), code=type(error).__name__, headers=GIVE_UP)
    if isinstance(error, MemoryError):
        return ApiError(
            503,
            "the server has too little memory for this request; send smaller images, or ask for fewer tokens.",
            code="out_of_memory",
            headers=GIVE_UP,
        )
    LOG.error("a request failed", exc_info=error)
    return ApiError(
        500, f"the server failed: {type(error).__name__}; its log says more.", code="internal_error", headers=GIVE_UP
    )
