"""Which tasks a model's chat template knows, and how a model is asked for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import PIL.Image

from granite4v.clip_projector.images import ImageSource
from granite4v.errors import PromptError
from granite4v.runtime.formats.tasks import QUESTION, Task
from granite4v.runtime.prompt.spans import Prompt


class Prepares(Protocol):
    """What can make a prompt, as a Model does."""

    def prepare(self, prompt: str, images: Sequence[ImageSource]) -> Prompt: ...


def is_known(model: Prepares, task: Task) -> bool:
    """Whether the model's template replaces the task's tag by words; one that does not know it leaves it as it is."""
    return task.tag is None or _replaces(model, task.tag)


def words_for(model: Prepares, task: Task) -> str:
    """What to ask a model with: the task's tag, also in place of the task's own prompt where the template knows one."""
    tag = f"<{task.name}>"
    if task.tag is None and not task.takes_schema and task is not QUESTION and _replaces(model, tag):
        return tag
    return task.question()


def _replaces(model: Prepares, tag: str) -> bool:
    try:
        return tag not in model.prepare(tag, [PIL.Image.new("RGB", (32, 32))]).text
    except PromptError:
        return False
