"""Renders the checkpoint's own Jinja chat template as transformers does; it is an error if the template drops text.

Environment: transformers 5.23, `utils/chat_template_utils.py`. A template is untrusted code, so it runs in a sandbox
with limits on time and size (`sandbox`) and gets only plain data.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jinja2
import jinja2.defaults
from jinja2.ext import loopcontrols

from granite4v.errors import ModelFileError, PromptError
from granite4v.runtime.prompt.sandbox import MAX_SOURCE, Environment, LimitError, bounded

TAG = re.compile(r"<[A-Za-z][A-Za-z0-9_]*>")  # matches what looks like a task tag, such as '<tables_json>'
_ADVICE = "Convert the checkpoint again with the template that belongs to it."
_MARK = "zq{}granite4vmark{}qz"  # a text that occurs in no template and no message


class ChatTemplate:
    """A compiled chat template and the special tokens it may name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        """`special_tokens`: 'bos_token', 'eos_token', ... Raises ModelFileError for a template with an error."""
        self.special_tokens = dict(special_tokens or {})
        reason = f"it has {len(source):,} characters, expected at most {MAX_SOURCE:,}"
        if len(source) <= MAX_SOURCE:
            try:
                self._template = _environment().from_string(source)
                return
            except Exception as error:  # Jinja's own errors, and Python's for code that is nested too deeply
                reason = f"{error or type(error).__name__}"
        raise ModelFileError(
            f"the model's chat template cannot be compiled: {reason:.300}; convert the checkpoint again with the "
            "template that belongs to it."
        )

    def render(self, messages: list[dict[str, Any]], /, *, add_generation_prompt: bool = True, **variables: Any) -> str:
        """The prompt text for normalized messages (see `messages.normalize`).

        `variables` may have any name but 'messages'.

        Raises PromptError when the template rejects the messages, and when it drops some of their text: a task tag
        replaces all other text of its message. To detect that, the messages are rendered once more with a mark after
        every text.
        """
        if "messages" in variables:
            raise PromptError("'messages' cannot be a variable of the chat template: it has the messages themselves.")
        text = self._render(messages, add_generation_prompt=add_generation_prompt, **variables)
        marked, marks = _mark(messages)
        if marks:
            check = self._render(marked, add_generation_prompt=add_generation_prompt, **variables)
            for mark, (number, written) in marks.items():
                if mark not in check:
                    raise PromptError(_lost(number, written, messages[number - 1]))
        return text

    def _render(self, messages: list[dict[str, Any]], /, **variables: Any) -> str:
        values = {"messages": messages, **self.special_tokens, **variables}
        try:
            return bounded(lambda: str(self._template.render(values)))
        except jinja2.TemplateError as error:
            raise PromptError(f"the model's chat template refuses these messages: {error}") from None
        except LimitError as error:
            raise PromptError(f"the model's chat template was stopped: {error}. {_ADVICE}") from None
        except Exception as error:
            # raised by the template's own Python calls (str.index, filters) on messages it was not written for
            raise PromptError(f"the model's chat template fails on these messages: {error!r:.300}. {_ADVICE}") from None


def task_tags(message: Mapping[str, Any]) -> list[str]:
    """The parts of the message's text that look like task tags."""
    return [tag for part in message["content"] if part["type"] == "text" for tag in TAG.findall(part["text"])]


def _mark(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, tuple[int, str]]]:
    """The messages with a mark after every text that must be rendered, and for each mark (message number, text).

    A text that is only a tag gets no mark: the template replaces it on purpose.
    """
    marks: dict[str, tuple[int, str]] = {}

    def marked(number: int, part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] != "text" or not TAG.sub("", part["text"]).strip():
            return part
        mark = _MARK.format(number, len(marks))
        marks[mark] = (number, part["text"])
        return {**part, "text": part["text"] + mark}

    copies = [
        {**message, "content": [marked(number, part) for part in message["content"]]}
        if message["role"] in ("user", "system")
        else message
        for number, message in enumerate(messages, 1)
    ]
    return copies, marks


def _lost(number: int, written: str, message: Mapping[str, Any]) -> str:
    tags = task_tags(message)
    if tags:
        return (
            f"message {number} has the task tag '{tags[0]}' beside other text ({written.strip()!r:.60}), which the "
            "model's chat template would drop; write the tag alone, or ask in words without it."
        )
    return (
        f"the model's chat template drops text of message {number} ({message['role']}): {written.strip()!r:.60}; "
        "put it into a message that the template renders."
    )


@functools.cache
def _environment() -> Any:
    class Generation(jinja2.ext.Extension):  # type: ignore[misc]  # jinja2 is not followed by the type checker
        """`{% generation %}...{% endgeneration %}`: marks the assistant's text for training; renders its body."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    filters = {**jinja2.defaults.DEFAULT_FILTERS, "tojson": _tojson}
    environment = Environment(filters, trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Does the same as in transformers: Jinja's own filter escapes HTML characters, but templates expect them as is."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> Iterator[None]:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
