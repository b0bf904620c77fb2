"""Finds out which tasks a model's chat template knows, and which words ask a model for a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import PIL.Image

from granite4v.clip_projector.images import ImageSource
from granite4v.errors import PromptError
from granite4v.runtime.formats.tasks import QUESTION, Task
from granite4v.runtime.prompt.spans import Prompt


class Prepares(Protocol):
    """Anything that can prepare a prompt, such as a `Model`."""

    def prepare(self, prompt: str, images: Sequence[ImageSource]) -> Prompt: ...


def is_known(model: Prepares, task: Task) -> bool:
    """Whether the model's template replaces the task's tag with words. A template that does not know a tag leaves it as
    is.

    True for a task without a tag.
    """
    return task.tag is None or _replaces(model, task.tag)


def words_for(model: Prepares, task: Task) -> str:
    """Returns what to ask a model with: the task's tag, or its own prompt if it has no tag.

    A task with its own prompt is also asked for by its tag if the template knows one.
    """
    tag = f"<{task.name}>"
    if task.tag is None and not task.takes_schema and task is not QUESTION and _replaces(model, tag):
        return tag
    return task.question()


def _replaces(model: Prepares, tag: str) -> bool:
    try:
        return tag not in model.prepare(tag, [PIL.Image.new("RGB", (32, 32))]).text
    except PromptError:
        return False
