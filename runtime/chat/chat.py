"""Runs a conversation with a model: streams answers to questions, and checks the context before it overflows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from granite4v.clip_projector.files import shown
from granite4v.clip_projector.views import AnyLayout, views_of
from granite4v.errors import ContextOverflowError, DocumentError, PasswordError, PromptError
from granite4v.runtime.chat.conversation import ChatError, Conversation, Question, Stats, Turn
from granite4v.runtime.chat.pages import ChatPage, FileSpec, FrameSampling, file_spec, read_pages, regular_file
from granite4v.runtime.documents import PageRanges
from granite4v.runtime.engine.stream import Progress, Stream
from granite4v.runtime.formats.task_grammar import grammar_for
from granite4v.runtime.formats.tasks import TASKS
from granite4v.runtime.grammar.json_schema import JsonSchema
from granite4v.runtime.model import Model
from granite4v.runtime.options import GenerationOptions
from granite4v.runtime.prompt.messages import counted
from granite4v.runtime.prompt.spans import Prompt

MAX_TOKENS = 4096  # of an answer, by default
MIN_ANSWER = 64  # tokens; a question is refused if it would leave fewer for its answer
NEARLY_FULL = 512  # tokens; if fewer are left, this is announced after every answer
REGEN_TEMPERATURE = 0.7  # greedy decoding would give the same answer again


class ContextFull(ContextOverflowError):
    """Raised when the context has no room for a question or a page; the message says what can be dropped."""


class Schema(Protocol):
    """A checked schema of fields, as `extract.schema.load_schema` returns it."""

    @property
    def content(self) -> dict[str, Any]: ...
    @property
    def checked(self) -> JsonSchema: ...
    @property
    def warnings(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Usage:
    """How many tokens of the context are used when the next question is asked, and how many are left for its answer."""

    used: int
    n_ctx: int

    @property
    def left(self) -> int:
        return max(0, self.n_ctx - self.used)


class Chat:
    """One conversation with a loaded model. Not thread-safe.

    `options`: for every answer, but not their `max_tokens`: an answer gets what is left of the context, up to
    `max_tokens` (MAX_TOKENS if not given). `load_schema` reads the schema that '/schema' names. `frames` or `fps`: how
    many frames to take of each video, as in `load_video`. `password`: tried on encrypted PDFs.
    """

    def __init__(
        self,
        model: Model,
        *,
        system: str | None = None,
        options: GenerationOptions | None = None,
        max_tokens: int | None = None,
        password: str | None = None,
        load_schema: Callable[[str], Schema] | None = None,
        frames: int | None = None,
        fps: float | None = None,
    ) -> None:
        self.model = model
        self.conversation = Conversation(system)
        self.options = options or GenerationOptions()
        self.saved_as: Path | None = None  # the file that the conversation was saved to, or loaded from
        # asks for the password of an encrypted PDF, given its name; None: without the right `password` it is an error
        self.ask_password: Callable[[str], str | None] | None = None
        self._max_tokens, self._password, self._load_schema = max_tokens, password, load_schema
        self._sampling = FrameSampling(frames, fps)

    @property
    def adapter(self) -> bool | None:
        """Whether a separate adapter is applied; None: the model's policy decides."""
        return self.options.lora

    @adapter.setter
    def adapter(self, wanted: bool | None) -> None:
        self.options = replace(self.options, lora=wanted)

    # --- pages ---

    def attach(self, text: str, progress: Progress | None = None) -> tuple[list[ChatPage], list[str]]:
        """Attaches the pages of 'FILE' or 'FILE#PAGES', or a video. Returns the pages attached, and notes for the user.

        Without PAGES, attaches all pages if they fit into the context, else the first. If there is no new page, one
        that is already attached becomes the current page. Raises DocumentError, ImageError, ModelFileError for a model
        without a vision file, ContextFull; then nothing is attached.
        """
        self.model.files.need_vision()
        spec = file_spec(text)
        found: list[ChatPage] = []
        notes: list[str] = []
        again: ChatPage | None = None
        room = self.usage(progress).left - MIN_ANSWER
        n_before, n_tokens = self._n_tokens_of(self.conversation.pages), 0
        for page in self._read(spec, self._sampling):
            if isinstance(page, DocumentError):
                notes.append(str(page))
                continue
            known = self.conversation.find(page)
            if known is not None:
                notes.append(f"{page.name} is attached already")
                again = known
                continue
            notes += page.warnings
            found.append(page)
            # attached pages may take a different number of tokens once there are more of them
            n_tokens = self._n_tokens_of([*self.conversation.pages, *found]) - n_before
            if n_tokens > room:
                raise self._no_room(spec, found, n_tokens)  # now, before a thousand more are read
            if spec.pages is None and page.n_pages > 1:
                n_each = self._layouts([page, page])[0].n_tokens  # next to other pages
                if page.n_pages * n_each > room:
                    notes.append(_first_alone(spec, page.n_pages, room // n_each))
                    break
            if progress is not None:
                progress("read", page.number, page.n_pages)
        if not found and again is None:
            raise DocumentError(notes[0] if notes else f"'{shown(spec.path.name)}' has no pages.")
        for page in found:
            self.conversation.attach(page)
        if not found:
            self.conversation.chosen = again
        return found, notes

    def read_page(self, path: str, number: int, n_frames: int | None = None) -> ChatPage:
        """Reads one page of a file, or `n_frames` frames of a video, without attaching it.

        Raises DocumentError, ImageError.
        """
        spec = FileSpec(regular_file(path), PageRanges(((number, number),)))
        for page in self._read(spec, FrameSampling(n_frames)):
            if isinstance(page, DocumentError):
                raise page
            return page
        raise DocumentError(f"'{shown(path)}' has no page {number}.")

    def _read(self, spec: FileSpec, sampling: FrameSampling) -> Iterator[ChatPage | DocumentError]:
        """Like `read_pages`, but asks for the password of an encrypted PDF until one fits or none is given. The last
        password that fitted is tried first on the next PDF."""
        password = self._password
        while True:
            try:
                for page in read_pages(spec, self.model.files.vision_config, password, sampling):
                    self._password = password
                    yield page
                return
            except PasswordError:
                password = None if self.ask_password is None else self.ask_password(shown(spec.path.name))
                if not password:
                    raise

    def n_tokens(self, page: ChatPage) -> int:
        """The tokens of the context that a page takes, next to the attached pages."""
        return 0 if self.model.files.vision_config is None else self.layout(page).n_tokens

    def layout(self, page: ChatPage) -> AnyLayout:
        """How the model sees a page next to the attached ones: its tiles. Raises ModelFileError for a model without a
        vision file."""
        return self._layouts([page, *(other for other in self.conversation.pages if other is not page)])[0]

    def _layouts(self, pages: list[ChatPage]) -> list[AnyLayout]:
        """How the model sees these pages in one prompt."""
        self.model.files.need_vision()
        config = self.model.files.vision_config
        assert config is not None
        return [view.layout(config) for view in views_of([page.image for page in pages], config)]

    def _n_tokens_of(self, pages: list[ChatPage]) -> int:
        return sum(layout.n_tokens for layout in self._layouts(pages))

    # --- room ---

    def usage(self, progress: Progress | None = None) -> Usage:
        """How much of the context the conversation takes, including the pages that wait for the next question."""
        if not self.conversation.turns and not self.conversation.waiting:
            return Usage(0, self.model.n_ctx)
        messages, pages = self.conversation.messages("?")
        prompt = self.model.prepare(messages, [page.image for page in pages], progress=progress)
        return Usage(prompt.n_tokens, self.model.n_ctx)

    def shortage(self) -> str | None:
        """A message that the context is nearly full and what can be dropped; None while there is room."""
        usage = self.usage()
        if usage.left >= min(NEARLY_FULL, self.model.n_ctx // 4):
            return None
        return f"the context is nearly full ({usage.left:,} of {usage.n_ctx:,} tokens left). {self._droppable()}"

    def _no_room(self, spec: FileSpec, found: Sequence[ChatPage], n_tokens: int) -> ContextFull:
        """The error for the pages that `spec` names; those in `found`, which were read, take `n_tokens`."""
        n_frames, n_pages = found[0].n_frames, found[0].n_pages
        n_wanted = max(len(found), n_pages if spec.pages is None else spec.pages.count(n_pages))
        what = counted(n_wanted, "page") if n_frames is None else counted(n_frames, "frame")
        n_needed = n_tokens * n_wanted // len(found) + MIN_ANSWER
        return self._full(f"{what} of '{shown(spec.path.name)}'", n_needed)

    def _full(self, what: str, n_needed: int) -> ContextFull:
        usage = self.usage()
        return ContextFull(
            f"no room for {what}: {n_needed:,} tokens with an answer, but {usage.left:,} of {usage.n_ctx:,} are left. "
            f"{self._droppable(usage.used + n_needed)}"
        )

    def _droppable(self, n_needed: int = 0) -> str:
        """What the user can do about a context that is full, or has fewer than `n_needed` tokens."""
        ways = [
            f"/detach {number} ({page.name}, {self.n_tokens(page):,} tokens)"
            for number, page in enumerate(self.conversation.pages, 1)
        ][:3]
        if self.conversation.turns:
            ways += ["/undo (the last question)", "/clear (all questions, pages stay)"]
        ways.append(f"restart with --ctx-size {max(2 * self.model.n_ctx, n_needed)}")
        return f"To make room: {', '.join(ways)}."

    # --- questions ---

    def question(self, text: str) -> Question:
        """The question in a line: a task if the line is its tag, otherwise the text itself. Raises PromptError for an
        empty line, and for a tag next to other text, which the model's template would drop."""
        text = text.strip()
        if not text:
            raise PromptError("the question is empty.")
        task = next((task for task in TASKS.values() if task.tag == text), None)
        if task is None:
            beside = next((task.tag for task in TASKS.values() if task.tag is not None and task.tag in text), None)
            if beside is not None:
                raise PromptError(f"the task tag {beside} stands beside other text; write it alone, or ask in words.")
            return Question(text)
        return Question(text, task.name, constraint=grammar_for(task.name))

    def fields_question(self, source: str) -> tuple[Question, tuple[str, ...]]:
        """The question for the fields of a schema file, and warnings about the schema.

        Raises SchemaError, ConstraintError, and ChatError without `load_schema`.
        """
        if self._load_schema is None:
            raise ChatError("schemas cannot be read here.")
        schema = self._load_schema(source)
        return schema_question(schema.content, schema.checked), schema.warnings

    def ask(
        self,
        question: Question,
        progress: Progress | None = None,
        *,
        about: ChatPage | None = None,
        temperature: float | None = None,
    ) -> Reply:
        """Starts the answer to a question. When the answer ends, both become a turn.

        A task reads a single page, the current one or `about`, as `ask` and `extract` do; earlier turns do not affect
        its answer. Raises ChatError for a task without a page, ContextFull when prompt and answer do not fit, and what
        `Model.prepare` and `Model.submit` raise; then the conversation is unchanged.
        """
        if question.is_task:
            about = about or self.conversation.current
            if about is None:
                raise ChatError(f"{question.label} reads a page, and none is attached; '/attach FILE' attaches one.")
            messages, pages = self.conversation.messages_about(question.text, about)
        else:
            messages, pages = self.conversation.messages(question.text)
        prompt = self._prepared(question, messages, pages, progress)
        attached = tuple(page for page in self.conversation.waiting if page in pages)
        options = replace(
            self.options,
            max_tokens=min(self._max_tokens or MAX_TOKENS, self.model.n_ctx - prompt.n_tokens),
            constraint=question.constraint,
            repetition=question.task,
        )
        if temperature is not None:
            options = replace(options, temperature=temperature, seed=None)
        began, stop = time.perf_counter(), _Flag()
        stream = self.model.submit(prompt, options, progress=progress, cancel=stop)
        turn = Turn(question, attached, "", about=about if question.is_task else None)
        return Reply(self.conversation, turn, stream, stop, began)

    def _prepared(
        self, question: Question, messages: list[dict[str, Any]], pages: list[ChatPage], progress: Progress | None
    ) -> Prompt:
        """The prompt. Raises ContextFull unless the context has room for it and an answer, and PromptError for a task
        that the model's template does not know."""
        try:
            prompt = self.model.prepare(messages, [page.image for page in pages], progress=progress)
        except ContextOverflowError as error:
            raise ContextFull(f"{error} {self._droppable()}") from None
        tag = question.kind.tag
        if tag is not None and tag in prompt.text:
            raise PromptError(f"the model's chat template does not know the task {tag}; ask in words.")
        n_needed = prompt.n_tokens + min(MIN_ANSWER, self._max_tokens or MIN_ANSWER)
        if n_needed > self.model.n_ctx and question.is_task:
            raise ContextFull(
                f"the page and {question.label} need {n_needed:,} tokens, but the context has {self.model.n_ctx:,}; "
                f"restart with --ctx-size {n_needed + MAX_TOKENS}."
            )
        if n_needed > self.model.n_ctx:
            raise self._full("this question", n_needed - self.usage().used)
        return prompt

    def again(self, progress: Progress | None = None, temperature: float | None = None) -> Reply:
        """Starts another answer to the last question, which replaces the current one when it ends. With greedy
        decoding, it is sampled at REGEN_TEMPERATURE. Raises ChatError without turns, and for a task whose page was
        detached."""
        conversation = self.conversation
        if not conversation.turns:
            raise ChatError("there is no question to answer again.")
        turn, others = conversation.turns[-1], conversation.waiting
        if turn.question.is_task and turn.about not in conversation.pages:
            raise ChatError(f"the page that {turn.question.label} read is no longer attached.")
        if temperature is None and self.options.temperature == 0:
            temperature = REGEN_TEMPERATURE
        conversation.turns, conversation.waiting = conversation.turns[:-1], list(turn.pages)
        try:
            reply = self.ask(turn.question, progress, about=turn.about, temperature=temperature)
        finally:
            conversation.turns, conversation.waiting = [*conversation.turns, turn], others
        reply.replaces_last = True
        return reply


class _Flag:
    """The flag that a stream polls to learn whether it is cancelled."""

    def __init__(self) -> None:
        self.is_set = False

    def __call__(self) -> bool:
        return self.is_set


class Reply:
    """An answer that is being generated: iterate over its text. When the answer ends, for whatever reason, the turn is
    added to the conversation. An answer without any text adds no turn, and its pages keep waiting.

    `replaces_last`: the turn replaces the last one.
    """

    def __init__(self, conversation: Conversation, turn: Turn, stream: Stream, stop: _Flag, began: float) -> None:
        """`turn`: without its answer. `stop`: the flag that the stream polls. `began`: by time.perf_counter."""
        self.question = turn.question
        self.replaces_last = False
        self.turn: Turn | None = None
        self._conversation, self._begun, self._stream, self._stop = conversation, turn, stream, stop
        self._began, self._first_s = began, 0.0
        self._pieces = self._read()

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def cancel(self) -> None:
        """Stops the answer soon, also while the page is being encoded or the prompt prefilled; may be called from a
        signal handler."""
        self._stop.is_set = True

    @property
    def text(self) -> str:
        """The answer so far."""
        return self._stream.answer.text

    @property
    def finish_reason(self) -> str:
        """See `Answer`."""
        return self._stream.answer.finish_reason

    def _read(self) -> Iterator[str]:
        try:
            for piece in self._stream:
                self._first_s = self._first_s or time.perf_counter() - self._began
                yield piece
        finally:
            self._stream.close()
            self._record()

    def _record(self) -> None:
        answer = self._stream.answer
        if not answer.text:
            return
        timings = answer.timings
        stats = Stats(
            n_prompt=timings.n_prompt,
            n_image=timings.n_image,
            n_reused=timings.n_reused,
            n_stored=timings.n_stored,
            n_encoded=timings.n_encoded,
            n_generated=len(answer.tokens),
            first_token_s=self._first_s,
            total_s=time.perf_counter() - self._began,
            tokens_per_s=timings.decode_tok_s,
            encode_s=timings.encode_s,
            prefill_s=timings.prefill_s,
        )
        finish_reason = answer.finish_reason or "cancelled"
        self.turn = replace(self._begun, answer=answer.text, finish_reason=finish_reason, stats=stats)
        if self.replaces_last:
            self._conversation.undo()
        self._conversation.add(self.turn)


def schema_question(content: Mapping[str, Any], checked: JsonSchema | None = None) -> Question:
    """The key-value question for the fields of a JSON schema. Raises ConstraintError for an invalid one."""
    task = next(task for task in TASKS.values() if task.takes_schema)
    return Question(
        task.question(content),
        task.name,
        dict(content),
        grammar_for(task.name, content if checked is None else checked),
    )


def _first_alone(spec: FileSpec, n_pages: int, n_fitting: int) -> str:
    name = shown(spec.path.name)
    advice = f"'/attach {name}#2'" if n_fitting < 3 else f"'/attach {name}#2-{n_fitting}'"
    return f"'{name}' has {n_pages:,} pages, too many for the context; attached page 1. {advice} for others."
