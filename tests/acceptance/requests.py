"""A server under thousands of requests, good and bad, many at once, a third of which hang up early.

    python -m tests.acceptance.requests --requests 2000

`granite4v serve` runs with the embedded model, or `--model`. Documents are asked about alone first. Then the same
questions, and requests that must be refused, come over many connections at once. A client that hangs up does so while
sending, while waiting, or in the middle of an answer. Every complete answer must equal the one given alone, and every
refusal must have its status and a reason. At the end no request may be in flight, no sequence in use, and no more
memory, threads or open files in use than after the first requests.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import http.client
import random
import socket
import statistics
import struct
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.acceptance.harness import Json, Result, tell
from tests.acceptance.questions import Question, bad_questions, good_questions
from tests.helpers.serving import Server

SAMPLE_EVERY = 25  # requests
_RETRY_S = 120  # how long a request is retried while the queue refuses it


@dataclass
class Seen:
    """The outcomes of all requests."""

    outcomes: collections.Counter[str] = field(default_factory=collections.Counter)
    problems: list[str] = field(default_factory=list)
    rss_mb: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, outcome: str, problem: str | None = None) -> None:
        with self.lock:
            self.outcomes[outcome] += 1
            if problem is not None:
                self.problems.append(problem)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model directory; by default the embedded one")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--from-request", type=int, default=200, help="the one that memory is compared with (200)")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--documents", type=int, default=4, help="of each kind (4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tolerance", type=float, default=0.05, help="how much memory may grow (0.05)")
    return check(parser.parse_args(arguments)).print()


def check(options: argparse.Namespace) -> Result:
    chosen = [] if options.model is None else ["--model", str(options.model)]
    with Server(*chosen, "--max-queue", "8", "--max-images", "3") as server:
        good, bad = good_questions(options.documents, options.seed), bad_questions()
        expected = {question.name: answer_alone(server, question) for question in good}
        tell(f"{len(good)} questions were answered alone")
        seen = Seen()
        begin = time.monotonic()
        ask_all(server, good, bad, expected, options, seen)
        seconds = time.monotonic() - begin
        problems = [*seen.problems, *left_behind(server)]
        for question in good:  # whatever has happened, the answers are the same
            if (text := answer_alone(server, question)) != expected[question.name]:
                problems.append(f"{question.name} at the end: {text:.80}")
    early = middle(seen.rss_mb, options.from_request)
    late = middle(seen.rss_mb, options.requests)
    if late / early - 1 > options.tolerance:
        problems.append(f"memory grew from {early} to {late} MB; expected at most {options.tolerance:.0%}")
    figures: Json = {
        "requests": options.requests,
        "seconds": round(seconds, 1),
        "outcomes": dict(sorted(seen.outcomes.items())),
        "rss_mb": [early, late],
        "rss_ratio": round(late / early, 4),
        "trend_mb": seen.rss_mb[:: max(1, len(seen.rss_mb) // 10)],
    }
    lines = [f"{options.requests} requests in {seconds:.0f} s: {figures['outcomes']}; {early} MB, then {late} MB"]
    return Result("requests", figures, lines, problems)


def answer_alone(server: Server, question: Question) -> str:
    status, body = exchange(server.port, question)
    if status != 200:
        raise SystemExit(f"{question.name}: status {status}, {body[:200]!r}")
    return question.text(body)


def middle(rss_mb: Sequence[float], n_requests: int) -> float:
    """Returns the memory around a request: the median of some samples."""
    end = max(1, n_requests // SAMPLE_EVERY)
    return round(statistics.median(rss_mb[max(0, end - 4) : end]), 2)


def ask_all(
    server: Server,
    good: Sequence[Question],
    bad: Sequence[Question],
    expected: dict[str, str],
    options: argparse.Namespace,
    seen: Seen,
) -> None:
    numbers = iter(range(options.requests))
    process = psutil.Process(server.pid)

    def work() -> None:
        while True:
            with seen.lock:
                number = next(numbers, None)
                if number is None:
                    return
                if number % SAMPLE_EVERY == SAMPLE_EVERY - 1:
                    seen.rss_mb.append(round(process.memory_info().rss / 1e6, 2))
            rng = random.Random(f"{options.seed} {number}")
            kind = rng.random()
            try:
                if kind < 1 / 3:
                    hang_up(server.port, rng.choice(good), rng)
                    seen.note("hung up")
                elif kind < 0.5:
                    refused(server.port, rng.choice(bad), seen)
                else:
                    answered(server.port, rng.choice(good), expected, seen)
            except OSError as error:
                seen.note("no connection", f"request {number}: {error!r}")

    threads = [threading.Thread(target=work) for _ in range(options.concurrency)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def answered(port: int, question: Question, expected: dict[str, str], seen: Seen) -> None:
    until = time.monotonic() + _RETRY_S
    while True:
        status, body = exchange(port, question)
        if status != 429 or time.monotonic() > until:
            break
        seen.note("told to come back", None if b"queue_full" in body else f"429 without its reason: {body[:80]!r}")
        time.sleep(0.05)  # sooner than the server asks for, to keep the queue full
    text = question.text(body) if status == 200 else ""
    problem = None if text == expected[question.name] else f"{question.name}: status {status}, {body[:300]!r}"
    seen.note("answered", problem)


def refused(port: int, question: Question, seen: Seen) -> None:
    status, body = exchange(port, question)
    is_error = status == question.status or (status == 200 and body.lstrip().startswith(b'{"error"'))  # after headers
    is_why = is_error and question.code in body.decode()
    is_full = status == 429 and b"queue_full" in body
    seen.note("refused", None if is_why or is_full else f"{question.name}: status {status}, {body[:200]!r}")


def exchange(port: int, question: Question) -> tuple[int, bytes]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
        connection.request(question.method, question.path, question.body, question.headers)
        response = connection.getresponse()
        return response.status, response.read()


def hang_up(port: int, question: Question, rng: random.Random) -> None:
    """Disconnects while sending, while waiting, or while reading, with or without a reset."""
    head = "".join(f"{name}: {value}\r\n" for name, value in question.headers.items())
    length = f"Content-Length: {len(question.body or b'')}\r\n"
    sent = f"{question.method} {question.path} HTTP/1.1\r\nHost: localhost\r\n{head}{length}\r\n".encode()
    sent += question.body or b""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        if rng.random() < 0.5:  # closed with a reset
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stage = rng.choice(("sending", "waiting", "reading"))
        if stage == "sending":
            connection.sendall(sent[: rng.randrange(len(sent))])
            return
        connection.sendall(sent)
        if stage == "reading":
            connection.recv(rng.randint(1, 2000))
        time.sleep(rng.uniform(0, 0.6) ** 2)


def left_behind(server: Server) -> list[str]:
    """Returns what is still in flight or in use after some seconds."""
    until = time.monotonic() + 20
    while True:
        metrics = server.metrics()
        busy = {name: metrics[f"granite4v_{name}"] for name in ("requests_in_flight", "sequences_in_use")}
        process = psutil.Process(server.pid)
        connections = [one for one in process.net_connections() if one.status == psutil.CONN_ESTABLISHED]
        if not any(busy.values()) and len(connections) <= 1:
            break
        if time.monotonic() > until:
            return [f"left behind: {busy}, {len(connections)} connections"]
        time.sleep(0.1)
    children = process.children(recursive=True)
    found = {"threads": process.num_threads(), "files": process.num_fds(), "processes": len(children)}
    tell(f"at the end: {found}")
    return [] if found["processes"] <= 2 and found["files"] < 100 else [f"left behind: {found}"]


if __name__ == "__main__":
    sys.exit(main())
