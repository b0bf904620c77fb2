"""Converts request fields to generation options; fields that would have no effect are refused rather than ignored."""

from __future__ import annotations

from typing import Any

from granite4v.runtime.server.errors import invalid
from granite4v.runtime.server.requests import CompletionFields, Sampled, Stop
from granite4v.runtime.server.structure import Form

_CONSTRAINTS = (
    "grammar", "json_schema", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs",
)  # fmt: skip
_TAKEN = ("temperature", "top_p", "top_k", "min_p", "repeat_penalty", "lora", "drafting", "ignore_eos")


def options_of(body: Sampled, stop: Stop | None = None) -> dict[str, Any]:
    """The keyword arguments for `GenerationOptions`; fields that the client left out keep their defaults."""
    given = {name: getattr(body, name) for name in _TAKEN}
    fields = {name: value for name, value in given.items() if value is not None}
    if stop is not None:
        fields["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    return fields


def wants_confidence(body: Sampled, form: Form) -> bool:
    """Whether to return confidences: only for an answer to a task or a schema, which has cells or fields."""
    return bool(form.task) and body.confidence is not False


def check_foreign_fields(body: Sampled) -> None:
    """Raises ApiError for fields of other servers (llama.cpp's, vLLM's) that would change the answer there."""
    for name in _CONSTRAINTS:
        if getattr(body, name) not in (None, ""):  # "" is llama.cpp's default of 'grammar'
            raise _unsupported(name, "use 'response_format' with a JSON schema (in responses: 'text.format')")
    if body.repetition_penalty not in (None, 1):
        raise _unsupported("repetition_penalty", "use 'repeat_penalty'")
    if body.best_of not in (None, 1):
        raise _unsupported("best_of", "use 'n'")


def refuse_tools(body: Any, *names: str) -> None:
    """Raises ApiError if the request offers tools that the model may choose to call."""
    if body.tool_choice != "none":
        refuse(body, *names)


def check_completion_fields(body: CompletionFields, n_most: int) -> None:
    """Raises ApiError for options that the server does not support, and for more than `n_most` answers."""
    check_foreign_fields(body)
    for name in ("frequency_penalty", "presence_penalty"):
        if getattr(body, name):
            raise _unsupported(name, "use 'repeat_penalty'")
    if body.logit_bias:
        raise _unsupported("logit_bias", "leave it out")
    if body.n is not None and body.n > n_most:
        raise invalid(f"'n' is {body.n}, but the server gives at most {n_most} answers to a request.", "n", "too_many")


def refuse(body: Any, *names: str) -> None:
    """Raises ApiError if one of these fields is set, because the server does not support them."""
    for name in names:
        if getattr(body, name):
            raise _unsupported(name, "leave it out")


def _unsupported(name: str, advice: str) -> Exception:
    return invalid(f"'{name}' is not supported by this server; {advice}.", name, "unsupported")
