"""How an answer is generated: one set of options for the Python API, the command line and the records of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from granite4v.choices import whole_number
from granite4v.errors import ArgumentError
from granite4v.runtime.engine.logprobs import MAX_ALTERNATIVES
from granite4v.runtime.engine.sampler import Sampling
from granite4v.runtime.grammar.grammar import Grammar


@dataclass(frozen=True)
class GenerationOptions(Sampling):
    """How an answer is generated; the defaults are greedy. The sampling options are fields of `Sampling`.

    `max_tokens`: the most tokens the answer may have. `stop`: texts that end the answer and are not part of it.
    `ignore_eos`: generate `max_tokens` tokens regardless of end-of-text tokens (for benchmarks). `constraint`: a
    grammar from `granite4v.grammar_for`; the answer follows it and can end only where it is valid. `fast_forward`:
    tokens that the grammar forces are decoded in one batch instead of being sampled one by one. `drafting`: text that
    the answer may repeat is decoded ahead (speculatively) where that is likely to save time; it changes an answer no
    more than concurrent requests do (docs/benchmarks.md). `repetition`: whether an answer that repeats the same rows
    endlessly is stopped; a task name defines what a row is if there is no constraint. `logprobs`: whether
    `Answer.logprobs` has the log-probability of each token, and with how many of the likeliest alternatives, 0 to 20;
    None is off. `lora`: whether a separate adapter is applied; None follows the model's policy. Raises ArgumentError
    or TypeError for a value out of range.
    """

    max_tokens: int = 512
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    constraint: Grammar | None = None
    fast_forward: bool = True
    drafting: bool = False
    repetition: bool | str = True
    logprobs: int | None = None
    lora: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "max_tokens", whole_number("max_tokens", self.max_tokens, 0))
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        if self.logprobs is not None and whole_number("logprobs", self.logprobs, 0) > MAX_ALTERNATIVES:
            raise ArgumentError(f"logprobs is {self.logprobs}; expected None (off) or 0 to {MAX_ALTERNATIVES}.")
        if self.constraint is not None and not isinstance(self.constraint, Grammar):
            raise TypeError(f"the constraint is {self.constraint!r:.60}; expected what granite4v.grammar_for returns.")

    @classmethod
    def of(cls, options: GenerationOptions | None, changes: Any) -> GenerationOptions:
        """Returns `options`, or the defaults, with some fields changed. Raises TypeError for an unknown field."""
        return cls(**changes) if options is None else dataclasses.replace(options, **changes)


class GenerationFields(TypedDict, total=False):
    """The fields of `GenerationOptions` as keyword arguments, for type checkers. A test keeps the two in sync."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    repeat_last_n: int
    seed: int | None
    max_tokens: int
    stop: Sequence[str]
    ignore_eos: bool
    constraint: Grammar | None
    fast_forward: bool
    drafting: bool
    repetition: bool | str
    logprobs: int | None
    lora: bool | None
