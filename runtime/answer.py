"""The result of a request: the answer, why it ended, and its timings."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

STOP, LENGTH, CANCELLED, REPETITION = "stop", "length", "cancelled", "repetition"


@dataclass
class Timings:
    """Timings of one answer in seconds, and token counts.

    `load_s`: reading weights and choosing kernels for them, which only the first request does, and finding and reading
    stored pages; `encode_s`: images to embeddings; `prefill_image_s` and `prefill_text_s`: the prompt; `decode_s`: the
    batches that this answer was part of, which may be shared with other answers; `constraint_s`: the grammar's masks
    and forced tokens. `n_reused` prompt tokens came from the prefix cache, and `n_stored` others from the page store;
    `n_encoded` images were in neither. `n_forced` tokens of the answer were the only ones that the grammar allowed, and
    were not sampled. `n_decoded` tokens of the answer were decoded in `decode_s`: all except the last ones, which
    nothing followed. `n_drafted` tokens were decoded before they were sampled; `n_accepted` of them were right.
    """

    load_s: float = 0.0
    encode_s: float = 0.0
    prefill_image_s: float = 0.0
    prefill_text_s: float = 0.0
    decode_s: float = 0.0
    constraint_s: float = 0.0
    n_prompt: int = 0
    n_image: int = 0
    n_reused: int = 0
    n_stored: int = 0
    n_encoded: int = 0
    n_generated: int = 0
    n_forced: int = 0
    n_steps: int = 0  # decodes in `decode_s`; the first token of an answer costs none
    n_decoded: int = 0
    n_drafted: int = 0
    n_accepted: int = 0

    @property
    def prefill_s(self) -> float:
        return self.prefill_image_s + self.prefill_text_s

    @property
    def decode_tok_s(self) -> float:
        """Decoded tokens per second; 0 before the second token."""
        return self.n_decoded / self.decode_s if self.decode_s > 0 else 0.0


@dataclass(frozen=True)
class TokenLogprob:
    """The natural log-probability of one token of an answer.

    `logprob`: under the model's own distribution over its whole vocabulary, before temperature, filters, repeat penalty
    and grammar. `top`: the most likely tokens of that distribution with their log-probabilities, best first. `forced`:
    the model had no choice, because a grammar allowed only this token or forced its text, or because the token closes
    the answer at its limit; `logprob` is then 0.0 and `top` is empty. `utf8`: the bytes that the token writes, possibly
    part of a character; for a special token, which writes nothing, its name. `end`: the length of the answer's text up
    to and including this token, in characters; with a stop string that spans several tokens it may exceed the length of
    the text.
    """

    token: int
    utf8: bytes
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    forced: bool = False
    end: int = 0

    @property
    def text(self) -> str:
        """The token on its own as text, with U+FFFD in place of partial characters."""
        return self.utf8.decode("utf-8", "replace")

    def as_dict(self) -> dict[str, Any]:
        """The entry as JSON data."""
        return {**asdict(self), "utf8": list(self.utf8), "text": self.text}


@dataclass
class Answer:
    """A generated answer. `tokens` are the generated ids without the one that ended the answer.

    `finish_reason`: 'stop' (the model, its grammar or a stop string ended it), 'length' (`max_tokens`), 'repetition'
    (it repeated the same rows) or 'cancelled'. Under a grammar, an answer that would exceed `max_tokens` is closed
    within that limit: `closing` is the end of `text` that the model did not generate, possibly empty. `closing` is None
    otherwise, and also if no valid answer is that short; the text is then truncated. `logprobs` has an entry for each
    of `tokens` where `GenerationOptions.logprobs` asks for them, and is None otherwise.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = ""
    closing: str | None = None
    timings: Timings = field(default_factory=Timings)
    warnings: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None

    def as_dict(self) -> dict[str, Any]:
        """The answer as JSON data."""
        timings = {
            **asdict(self.timings),
            "prefill_s": self.timings.prefill_s,
            "decode_tok_s": self.timings.decode_tok_s,
        }
        logprobs = None if self.logprobs is None else [entry.as_dict() for entry in self.logprobs]
        return {**asdict(self), "timings": timings, "logprobs": logprobs}
