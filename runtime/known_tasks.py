"""Which tasks a model's chat template knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import PIL.Image

from granite4v.clip_projector.images import ImageSource
from granite4v.errors import PromptError
from granite4v.runtime.formats.tasks import Task
from granite4v.runtime.prompt.spans import Prompt


class Prepares(Protocol):
    """What can make a prompt, as a Model does."""

    def prepare(self, prompt: str, images: Sequence[ImageSource]) -> Prompt: ...


def is_known(model: Prepares, task: Task) -> bool:
    """Whether the model's template replaces the task's tag by words; one that does not know it leaves it as it is."""
    if task.tag is None:
        return True
    try:
        return task.tag not in model.prepare(task.tag, [PIL.Image.new("RGB", (32, 32))]).text
    except PromptError:
        return False
