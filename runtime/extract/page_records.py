"""Turns one page and one prompt into one record: runs the model, parses the answer, turns failures into records."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace

from granite4v.errors import DeviceError, Granite4vError, ModelFileError
from granite4v.runtime.answer import Answer
from granite4v.runtime.confidence import confidence, confidence_as_json
from granite4v.runtime.documents import Page, PageFailure
from granite4v.runtime.engine.stream import Progress, Stream
from granite4v.runtime.extract.attempts import MAX_DEATHS
from granite4v.runtime.extract.document_files import described
from granite4v.runtime.extract.drafts import Drafts
from granite4v.runtime.extract.options import ExtractOptions
from granite4v.runtime.extract.parsed_answer import parse_answer
from granite4v.runtime.extract.questions import Question
from granite4v.runtime.extract.record import Record
from granite4v.runtime.model import Model
from granite4v.runtime.options import GenerationOptions

MAX_TOKENS = 4096  # of an answer by default, if the context has room; the limit that the model family generates up to


class PageQuestion:
    """One question about one page, from the page to its record; one thread can follow many of them.

    The page's pixels are held until the model has been asked.
    """

    def __init__(
        self,
        page: Page,
        question: Question,
        hashes: Mapping[str, str],
        model: Model,
        options: ExtractOptions,
        drafts: Drafts | None = None,
    ) -> None:
        """`drafts`: the source of draft tokens, to which the answer is added."""
        self.question = question
        self._record = begun(page, question, hashes)
        self._page: Page | None = page
        self._model, self._options, self._drafts, self._digest = model, options, drafts, page.digest
        self._stream: Stream | None = None
        self._start = 0.0
        self.was_cancelled = False
        self._raised: BaseException | None = None  # by the caller's `progress`: passed on, not made a record

    @property
    def n_tokens(self) -> int:
        """Number of tokens of the answer so far."""
        return 0 if self._stream is None else len(self._stream.answer.tokens)

    def ask(self, *, progress: Progress | None, listener: Callable[[], None]) -> Record | None:
        """Asks the model. Returns a record, with its `error`, only if the page cannot be asked about. Raises what
        `poll` raises.

        `listener` is called in the engine's thread when there is something to poll.
        """
        self._start = time.perf_counter()
        drafts = () if self._drafts is None else self._drafts.sources(self._digest, self.question)

        def watched(stage: str, done: int, total: int) -> None:
            try:
                if progress is not None:
                    progress(stage, done, total)
            except BaseException as error:
                self._raised = error
                raise

        def submit() -> None:
            page, model = self._page, self._model
            assert page is not None
            prompt = model.prepare(self.question.prompt, [page.image])
            options = GenerationOptions(
                max_tokens=self._options.max_tokens or max(1, min(MAX_TOKENS, model.n_ctx - prompt.n_tokens)),
                constraint=self.question.constraint,
                fast_forward=self._options.fast_forward,
                drafting=self._drafts is not None,
                repetition=self.question.task,
                lora=self._options.lora,
                logprobs=0 if self._options.confidence else None,
            )
            self._stream = model.submit(prompt, options, progress=watched, drafts=drafts, listener=listener)
            self._stream.let_run()
            self._page = None

        return self._guarded(submit)

    def poll(self) -> Record | None:
        """Returns the record once there is one; with `error` if the page failed.

        Raises ModelFileError and DeviceError, which would fail any other page too, what `progress` raises, and
        ValueError if the model was closed in the meantime.
        """
        return self._guarded(self._poll)

    def _poll(self) -> Record | None:
        assert self._stream is not None
        if not self._stream.poll():
            return None
        record = self._finished(self._stream.answer)
        if self._drafts is not None:
            self._drafts.add(self._digest, self.question, self._stream.answer.tokens, record.value)
        return record

    @property
    def is_done(self) -> bool:
        return self._stream is not None and self._stream.is_done

    def cancel(self) -> None:
        """Stops the answer soon."""
        self.was_cancelled = True
        if self._stream is not None:
            self._stream.cancel()

    def close(self) -> None:
        """Stops the answer and waits for its end."""
        if self._stream is not None:
            self._stream.close()

    def _guarded(self, step: Callable[[], Record | None]) -> Record | None:
        try:
            return step()
        except (ModelFileError, DeviceError, KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # a failure of this page; a panic of a native library is no Exception
            if error is self._raised or self._model.closed:
                raise
            record, self._page = self._record, None
            if not isinstance(error, Granite4vError):
                logging.getLogger("granite4v").info("page %s of '%s'", record.page, record.source, exc_info=True)
            timings = {"seconds": _rounded(time.perf_counter() - self._start)}
            return replace(record, error=described(error), error_type=type(error).__name__, timings=timings)

    def _finished(self, answer: Answer) -> Record:
        text = answer.text.removesuffix(answer.closing or "")  # without what the grammar added to close it
        parsed = parse_answer(self.question.task, text, answer.finish_reason, self.question.schema)
        timings = {name: _rounded(value) for name, value in asdict(answer.timings).items()}
        return replace(
            self._record,
            text=text,
            value=parsed.value,
            valid=parsed.valid,
            validity_error=parsed.validity_error,
            salvaged=parsed.salvaged,
            finish_reason=answer.finish_reason,
            confidence=self._confidence(answer) if parsed.value is not None else None,
            timings={**timings, "seconds": _rounded(time.perf_counter() - self._start)},
        )

    def _confidence(self, answer: Answer) -> dict[str, dict[str, float]] | None:
        if answer.logprobs is None:
            return None
        found = confidence_as_json(confidence(answer, self.question.task))
        return {key: {name: _rounded(value) for name, value in figures.items()} for key, figures in found.items()}


def failed_page(failure: PageFailure, question: Question, hashes: Mapping[str, str]) -> Record:
    """Returns the record of a page that could not be opened."""
    return Record(
        source=failure.source,
        page=failure.number,
        n_pages=None,
        task=question.task,
        prompt_sha256=question.prompt_sha256,
        schema_sha256=question.schema.sha256 if question.schema else None,
        model=hashes,
        error=str(failure.error),
        error_type=type(failure.error).__name__,
        file_state=failure.file_state,
    )


def abandoned_page(page: Page, question: Question, hashes: Mapping[str, str]) -> Record:
    """Returns the record of a page that is not tried again, because the process died `MAX_DEATHS` times on it."""
    error = (
        f"the process ended {MAX_DEATHS} times on this page (killed, out of memory, or a crash in native "
        "code), so it is skipped; try it again with --resume --retry-failed."
    )
    return replace(begun(page, question, hashes), error=error, error_type="ProcessDied")


def copied_page(page: Page, question: Question, hashes: Mapping[str, str], like: Record) -> Record:
    """Returns the record of a page whose pixels have been read before for this task, copied from the record `like`."""
    new = begun(page, question, hashes)
    return replace(
        like,
        source=new.source,
        page=new.page,
        n_pages=new.n_pages,
        size_px=new.size_px,
        dpi=new.dpi,
        warnings=new.warnings,
        copy_of={"source": like.source, "page": like.page},
        file_state=new.file_state,
        stem=None,
        timings=dict.fromkeys(like.timings, 0),
    )


def begun(page: Page, question: Question, hashes: Mapping[str, str]) -> Record:
    """Returns the record of a question that has no answer yet."""
    return Record(
        source=page.source,
        page=page.number,
        n_pages=page.n_pages,
        size_px=page.size_px,
        dpi=page.dpi,
        digest=page.digest,
        task=question.task,
        prompt_sha256=question.prompt_sha256,
        schema_sha256=question.schema.sha256 if question.schema else None,
        model=hashes,
        warnings=page.warnings,
        file_state=page.file_state,
    )


def _rounded(value: float) -> float:
    return round(value, 4) if isinstance(value, float) else value
