"""What a request comes to: the answer, why it ended, and where its time went."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

STOP, LENGTH, CANCELLED, REPETITION = "stop", "length", "cancelled", "repetition"


@dataclass
class Timings:
    """Where the time of one answer went, in seconds, and how many tokens took it.

    `load_s` reading weights, which only a first request does; `encode_s` images to embeddings; `prefill_image_s` and
    `prefill_text_s` the prompt; `decode_s` the steps that the answer took part in, which other answers may share;
    `constraint_s` masks and forced tokens of the grammar.
    `n_reused` prompt tokens were in the cache already, `n_encoded` images were not. `n_forced` tokens of the answer
    were the only ones the grammar allowed, and not sampled.
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
    n_encoded: int = 0
    n_generated: int = 0
    n_forced: int = 0
    n_steps: int = 0  # decodes in `decode_s`; the first token of an answer costs none

    @property
    def prefill_s(self) -> float:
        return self.prefill_image_s + self.prefill_text_s

    @property
    def decode_tok_s(self) -> float:
        """Tokens a second while answering; 0 before the second token."""
        return (self.n_steps + self.n_forced) / self.decode_s if self.decode_s > 0 else 0.0


@dataclass
class Answer:
    """`tokens` are the generated ids without the one that ended the answer.

    `finish_reason`: 'stop' (the model, its grammar or a stop string ended it), 'length' (`max_tokens`),
    'repetition' (it repeated the same rows) or 'cancelled'. Under a grammar an answer that reaches `max_tokens` is
    completed before that: `closing` is the end of `text` that the model did not choose, perhaps empty. It is None
    otherwise, and where no valid answer is that short; then the text is cut.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = ""
    closing: str | None = None
    timings: Timings = field(default_factory=Timings)
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The answer as JSON data."""
        timings = {
            **asdict(self.timings),
            "prefill_s": self.timings.prefill_s,
            "decode_tok_s": self.timings.decode_tok_s,
        }
        return {**asdict(self), "timings": timings}
