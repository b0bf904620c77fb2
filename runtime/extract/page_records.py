"""One page and one prompt to one record: runs the model, parses the answer, turns failures into records."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace

from granite4v.errors import DeviceError, Granite4vError, ModelFileError
from granite4v.runtime.answer import Answer
from granite4v.runtime.documents import Page, PageFailure
from granite4v.runtime.engine.stream import Progress
from granite4v.runtime.extract.attempts import MAX_DEATHS
from granite4v.runtime.extract.document_files import described
from granite4v.runtime.extract.options import ExtractOptions
from granite4v.runtime.extract.parsed_answer import parse_answer
from granite4v.runtime.extract.questions import Question
from granite4v.runtime.extract.record import Record
from granite4v.runtime.model import Model

MAX_TOKENS = 4096  # of an answer, where the context has room and nobody says otherwise; what the family generates up to
OnToken = Callable[[int], None]  # how many tokens the answer has by now


def answer_page(
    model: Model,
    page: Page,
    question: Question,
    hashes: Mapping[str, str],
    options: ExtractOptions,
    on_token: OnToken,
    progress: Progress | None = None,
) -> Record:
    """The record of one question about one page; with `error` when the page cannot be asked about.

    Raises ModelFileError and DeviceError, after which no other page would fare better, what `on_token` raises,
    and ValueError for a model that was closed meanwhile.
    """
    record = _begin(page, question, hashes)
    start = time.perf_counter()
    raised: list[BaseException] = []  # by the caller, whose business it is

    def tell(n: int) -> None:
        try:
            on_token(n)
        except BaseException as error:
            raised.append(error)
            raise

    def watched(stage: str, done: int, total: int) -> None:
        try:
            if progress is not None:
                progress(stage, done, total)
        except BaseException as error:
            raised.append(error)
            raise

    try:
        return _answered(record, model, page, question, options, tell, start, watched)
    except (ModelFileError, DeviceError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # MemoryError, and what a native library panics with, which is no Exception
        if error in raised or model.closed:
            raise
        if not isinstance(error, Granite4vError):
            logging.getLogger("granite4v").info("page %s of '%s'", page.number, page.source, exc_info=True)
        timings = {"seconds": _rounded(time.perf_counter() - start)}
        return replace(record, error=described(error), error_type=type(error).__name__, timings=timings)


def _answered(
    record: Record,
    model: Model,
    page: Page,
    question: Question,
    options: ExtractOptions,
    on_token: OnToken,
    start: float,
    progress: Progress,
) -> Record:
    answer = _ask(model, page, question, options, on_token, progress)
    text = answer.text.removesuffix(answer.closing or "")  # without what a constraint added to close it
    parsed = parse_answer(question.task, text, answer.finish_reason, question.schema)
    timings = {name: _rounded(value) for name, value in asdict(answer.timings).items()}
    return replace(
        record,
        text=text,
        value=parsed.value,
        valid=parsed.valid,
        validity_error=parsed.validity_error,
        salvaged=parsed.salvaged,
        finish_reason=answer.finish_reason,
        timings={**timings, "seconds": _rounded(time.perf_counter() - start)},
    )


def failed_page(failure: PageFailure, question: Question, hashes: Mapping[str, str]) -> Record:
    """The record of a page that could not be opened."""
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
    """The record of a page that is not tried again, because the process died whenever it was read."""
    error = (
        f"the process ended {MAX_DEATHS} times on this page (killed, out of memory, or a crash in native "
        "code), so it is skipped; try it again with --resume --retry-failed."
    )
    return replace(_begin(page, question, hashes), error=error, error_type="ProcessDied")


def copied_page(page: Page, question: Question, hashes: Mapping[str, str], like: Record) -> Record:
    """The record of a page whose pixels have been read before, in this run and for this task."""
    begun = _begin(page, question, hashes)
    return replace(
        like,
        source=begun.source,
        page=begun.page,
        n_pages=begun.n_pages,
        size_px=begun.size_px,
        dpi=begun.dpi,
        warnings=begun.warnings,
        copy_of={"source": like.source, "page": like.page},
        file_state=begun.file_state,
        stem=None,
        timings=dict.fromkeys(like.timings, 0),
    )


def _ask(
    model: Model, page: Page, question: Question, options: ExtractOptions, on_token: OnToken, progress: Progress
) -> Answer:
    prompt = model.prepare(question.prompt, [page.image])
    max_tokens = options.max_tokens
    if max_tokens is None:
        max_tokens = max(1, min(MAX_TOKENS, model.n_ctx - prompt.n_tokens))
    stream = model.stream(
        prompt,
        max_tokens=max_tokens,
        constraint=question.constraint,
        fast_forward=options.fast_forward,
        repetition=question.task,
        lora=options.lora,
        progress=progress,
    )
    for _ in stream:
        on_token(len(stream.answer.tokens))
    return stream.answer


def _begin(page: Page, question: Question, hashes: Mapping[str, str]) -> Record:
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
