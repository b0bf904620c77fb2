"""Metrics of a server in Prometheus' format."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from granite4v.runtime.model import Model
from granite4v.runtime.server.generation import Generation

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)


class Metrics:
    """Counters and histograms of one server; two servers in one process share none."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "granite4v_requests", "Requests, by path and status.", ["path", "status"], registry=self._registry
        )
        self._tokens = Counter(
            "granite4v_tokens",
            "Tokens of prompts: computed, taken from the cache, or from stored pages; and generated ones.",
            ["kind"],
            registry=self._registry,
        )
        self._first_token = Histogram(
            "granite4v_first_text_seconds",
            "From the arrival of a request to the first text of its answer.",
            registry=self._registry,
            buckets=_SECONDS,
        )
        self._answer = Histogram(
            "granite4v_answer_seconds",
            "From the arrival of a request to the end of its answers.",
            registry=self._registry,
            buckets=_SECONDS,
        )
        self._finished = Counter(
            "granite4v_answers", "Answers, by what ended them.", ["reason"], registry=self._registry
        )

    def watch(self, model: Model, n_in_flight: Callable[[], int]) -> None:
        """Adds the metrics of the engine."""
        self._registry.register(_Engine(model, n_in_flight))

    def note_request(self, path: str, status: int) -> None:
        self._requests.labels(path, str(status)).inc()

    def note_answers(self, generation: Generation, began: float) -> None:
        """Counts the answers to a request, after they have ended. `began`: when the request began (monotonic clock)."""
        if generation.first_text_at is not None:
            self._first_token.observe(generation.first_text_at - began)
        self._answer.observe(time.monotonic() - began)
        for answer in generation.answers:
            timings = answer.timings
            self._tokens.labels("prompt_cached").inc(timings.n_reused)
            self._tokens.labels("prompt_stored").inc(timings.n_stored)
            self._tokens.labels("prompt_computed").inc(timings.n_prompt - timings.n_reused - timings.n_stored)
            self._tokens.labels("generated").inc(timings.n_generated)
            self._finished.labels(answer.finish_reason or "cancelled").inc()

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _Engine(Collector):
    """Collects the engine's counters and gauges at the time of each scrape."""

    def __init__(self, model: Model, n_in_flight: Callable[[], int]) -> None:
        self._model, self._n_in_flight = model, n_in_flight

    def collect(self) -> Iterator[Metric]:
        counters = self._model.counters
        for name, value, what in (
            ("prefilled_rows", counters.n_prefilled, "Rows of prompts that were computed."),
            ("decoded_rows", counters.n_decoded, "Rows of answers that were computed."),
            ("decode_steps", counters.n_steps, "Calls that decoded answers."),
            ("drafted_tokens", counters.n_drafted, "Tokens of drafts."),
            ("accepted_tokens", counters.n_accepted, "Tokens of drafts that were right."),
            ("preempted", counters.n_preempted, "Answers whose sequence was given to another."),
        ):
            yield CounterMetricFamily(f"granite4v_{name}", what, value=value)
        in_use = self._model.engine.n_sequences_in_use
        yield GaugeMetricFamily(
            "granite4v_requests_in_flight", "Requests that are answered or wait.", self._n_in_flight()
        )
        yield GaugeMetricFamily("granite4v_sequences_in_use", "Sequences of the KV cache in use.", in_use)
        yield GaugeMetricFamily("granite4v_sequences", "Sequences that there can be.", self._model.n_parallel)
