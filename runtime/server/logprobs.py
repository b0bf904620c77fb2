"""Log-probabilities of tokens and confidences of cells and fields, in the formats of the APIs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from granite4v.runtime.answer import Answer, TokenLogprob
from granite4v.runtime.confidence import confidence, confidence_as_json
from granite4v.runtime.server.replies import CompletionLogprobs, Confidence, Logprobs, TopLogprob
from granite4v.runtime.server.replies import TokenLogprob as TokenReply

Spell = Callable[[int], bytes]  # the bytes of a token's text


def token_replies(entries: Sequence[TokenLogprob], spell: Spell) -> list[TokenReply]:
    return [
        TokenReply(
            token=entry.text,
            logprob=entry.logprob,
            bytes=list(entry.utf8),
            top_logprobs=[_alternative(spell(token), logprob) for token, logprob in entry.top],
        )
        for entry in entries
    ]


def chat_logprobs(entries: Sequence[TokenLogprob], spell: Spell) -> Logprobs:
    return Logprobs(content=token_replies(entries, spell))


def completion_logprobs(entries: Sequence[TokenLogprob], offset: int, spell: Spell) -> CompletionLogprobs:
    """`offset`: where the first token starts, in characters of the answer's text."""
    offsets = [offset, *(entry.end for entry in entries)][: len(entries)]
    return CompletionLogprobs(
        tokens=[entry.text for entry in entries],
        token_logprobs=[entry.logprob for entry in entries],
        top_logprobs=[{_text(spell(token)): logprob for token, logprob in entry.top} for entry in entries],
        text_offset=offsets,
    )


def confidences(answer: Answer, task: str) -> dict[str, Confidence] | None:
    """Confidences of the cells or fields of an answer to a task; None without a task or log-probabilities."""
    if not task or answer.logprobs is None:
        return None
    found = confidence_as_json(confidence(answer, task))
    return {key: Confidence(**values) for key, values in found.items()}


def _alternative(utf8: bytes, logprob: float) -> TopLogprob:
    return TopLogprob(token=_text(utf8), logprob=logprob, bytes=list(utf8))


def _text(utf8: bytes) -> str:
    return utf8.decode("utf-8", "replace")
