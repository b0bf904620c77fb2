"""Token counts, times and finish reasons of answers, as the API reports them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from granite4v.runtime.answer import LENGTH, REPETITION, Answer
from granite4v.runtime.server.generation import Generation
from granite4v.runtime.server.replies import FinishReason, PromptDetails, Timings, Usage


def finish_reason(answer: Answer, *, has_schema: bool) -> FinishReason:
    """OpenAI's finish reason.

    'stop' also for JSON by a schema or `json_object` that the grammar closed within the token limit: it is complete,
    and openai's `parse` refuses 'length'. An answer to a task tag that was closed lacks rows, and one that was stopped
    for looping is incomplete, so they have 'length'.
    """
    if has_schema and answer.finish_reason == LENGTH and answer.closing is not None:
        return "stop"
    return "length" if answer.finish_reason in (LENGTH, REPETITION) else "stop"


def stopped_by(answer: Answer) -> str | None:
    """What `finish_reason` does not say: 'repetition' if the answer was stopped for looping, 'closed' if the grammar
    closed it; otherwise None."""
    if answer.finish_reason == LENGTH and answer.closing is not None:
        return "closed"
    return REPETITION if answer.finish_reason == REPETITION else None


def ending(generation: Generation, index: int) -> dict[str, Any]:
    """The fields of a choice that say how an answer ended, and whether it matches the requested schema."""
    answer = generation.answers[index]
    return {
        "finish_reason": finish_reason(answer, has_schema=generation.warnings is not None),
        "stopped_by": stopped_by(answer),
        "warnings": generation.warnings,
        "schema_error": generation.schema_errors[index],
    }


def usage(generation: Generation) -> Usage:
    """Token counts of all answers. Cached tokens were not computed: they come from other requests or stored pages."""
    prompt, answers = generation.prompt, generation.answers
    first = answers[0].timings
    n_generated = sum(answer.timings.n_generated for answer in answers)
    return Usage(
        prompt_tokens=prompt.n_tokens,
        completion_tokens=n_generated,
        total_tokens=prompt.n_tokens + n_generated,
        prompt_tokens_details=PromptDetails(
            cached_tokens=first.n_reused + first.n_stored, image_tokens=prompt.n_image_tokens
        ),
    )


def timings(answers: Sequence[Answer]) -> Timings:
    """Sums over all answers to a request; time that several of them shared is counted once for each."""
    each = [answer.timings for answer in answers]
    n_prompt = sum(one.n_prompt - one.n_reused - one.n_stored for one in each)
    prompt_s = sum(one.prefill_s for one in each)
    n_decoded, decode_s = sum(one.n_decoded for one in each), sum(one.decode_s for one in each)
    return Timings(
        cache_n=sum(one.n_reused + one.n_stored for one in each),
        stored_n=sum(one.n_stored for one in each),
        prompt_n=n_prompt,
        prompt_ms=_ms(prompt_s),
        prompt_per_second=_rate(n_prompt, prompt_s),
        predicted_n=sum(one.n_generated for one in each),
        predicted_ms=_ms(decode_s),
        predicted_per_second=_rate(n_decoded, decode_s),
        encode_ms=_ms(sum(one.encode_s for one in each)),
        load_ms=_ms(sum(one.load_s for one in each)),
        forced_n=sum(one.n_forced for one in each),
        draft_n=sum(one.n_drafted for one in each),
        draft_n_accepted=sum(one.n_accepted for one in each),
    )


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def _rate(n: int, seconds: float) -> float:
    return round(n / seconds, 3) if seconds > 0 else 0.0
