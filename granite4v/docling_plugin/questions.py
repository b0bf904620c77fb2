"""Asks the model about the images of a document. All questions are submitted before the first answer is awaited."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import PIL.Image

from granite4v.errors import AnswerError, Granite4vError
from granite4v.runtime.answer import STOP, Answer
from granite4v.runtime.confidence import confidence
from granite4v.runtime.engine.draft import DraftSource
from granite4v.runtime.engine.stream import Cancel, Stream
from granite4v.runtime.formats import read, salvage
from granite4v.runtime.formats.task_grammar import grammar_for
from granite4v.runtime.formats.tasks import QUESTION, find_task
from granite4v.runtime.model import Model
from granite4v.runtime.options import GenerationOptions

MAX_TOKENS = 4096  # of an answer, as in `granite4v extract`


@dataclass(frozen=True)
class Reply:
    """The model's answer about an image.

    `value`: the parsed answer, as `formats.read` returns it; None if there is none. `confidence`: the mean token
    probability of its cells, or of its text; None if unknown. `problem`: why the value is missing or incomplete.
    """

    value: Any = None
    confidence: float | None = None
    problem: str | None = None


class Question:
    """A task, or a question in words, about one image; submitted on construction. An error of one image never raises,
    so that other images are not affected."""

    def __init__(
        self, asker: Asker, image: PIL.Image.Image, texts: Iterable[str] = (), cancel: Cancel | None = None
    ) -> None:
        """`texts`: pieces of text that the answer may repeat. `cancel`: polled while the answer is pending; when it
        returns true, the answer is cut off at that point."""
        self._asker = asker
        self._stream: Stream | None = None
        self._problem: str | None = None
        try:
            self._stream = asker.submit(image, texts, cancel)
        except Exception as error:  # of any kind: images come from untrusted files
            self._problem = _described(error)

    @property
    def is_answered(self) -> bool:
        return self._stream is None or self._stream.is_done

    def cancel(self) -> None:
        """Cuts the answer off soon. Callable from any thread."""
        if self._stream is not None:
            self._stream.cancel()

    def reply(self) -> Reply:
        """Waits for the answer and parses it. Call once."""
        if self._stream is None:
            return Reply(problem=self._problem)
        try:
            return self._asker.read(self._stream.result())
        except Exception as error:
            return Reply(problem=_described(error))


class Asker:
    """Asks one model about images. Thread-safe.

    The contents of a table often repeat the text of its page or earlier answers. Both are draft sources: they change
    no answer, only the time it takes.
    """

    def __init__(self, model: Model, task: str, *, prompt: str = "", max_tokens: int | None = None) -> None:
        """`task`: one of `formats.TASKS`, or 'prompt' for the question in `prompt`. `max_tokens`: None for
        `MAX_TOKENS`."""
        self.model, self._task = model, find_task(task)
        self._prompt = prompt if self._task is QUESTION else self._task.question()
        self._grammar = None if self._task is QUESTION else grammar_for(task)
        self._max_tokens = max_tokens
        self._answers = DraftSource()

    def submit(self, image: PIL.Image.Image, texts: Iterable[str], cancel: Cancel | None) -> Stream:
        """Starts the answer about an image. Raises what `Model.prepare` and `Model.submit` raise."""
        prompt = self.model.prepare(self._prompt, [image])
        most = max(1, min(MAX_TOKENS, self.model.n_ctx - prompt.n_tokens))
        options = GenerationOptions(
            max_tokens=most if self._max_tokens is None else min(self._max_tokens, most),
            constraint=self._grammar,
            drafting=self.model.n_parallel > 1,
            repetition=self._task.name,
            logprobs=0,
        )
        sources = [self._answers]
        if pieces := [text for text in dict.fromkeys(texts) if text]:
            tokenizer, on_page = self.model.prompts.tokenizer(), DraftSource()
            for piece in pieces:
                on_page.add(tokenizer.encode_plain(piece))
            sources.append(on_page)
        stream = self.model.submit(prompt, options, cancel=cancel, drafts=sources)
        stream.let_run()
        return stream

    def read(self, answer: Answer) -> Reply:
        """Parses an answer, or the complete part of one that was cut off."""
        if answer.finish_reason == STOP:
            self._answers.add_answer(answer.tokens)
        text, task = answer.text.removesuffix(answer.closing or ""), self._task.name
        problem = None if answer.finish_reason == STOP else f"the answer did not end by itself ({answer.finish_reason})"
        if problem is None:
            try:
                return Reply(read(task, text), self._sure(answer))
            except AnswerError as error:
                problem = str(error)
        saved = salvage(task, text)
        if saved is None:
            return Reply(problem=problem)
        return Reply(saved.value, self._sure(answer), problem if saved.cut else None)

    def _sure(self, answer: Answer) -> float | None:
        means = [one.mean for one in confidence(answer, self._task.name).values()]
        return sum(means) / len(means) if means else None


def _described(error: Exception) -> str:
    if isinstance(error, Granite4vError):
        return str(error)
    logging.getLogger("granite4v").info("a question of docling's", exc_info=True)
    return f"{type(error).__name__}: {error}"
