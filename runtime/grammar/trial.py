"""Tries grammars in a child process, since some regular expressions keep llguidance busy forever.

The process is started for the first grammar that looks costly; most schemas have none. Run as a script, this module is
that child process: it reads each grammar as a line of JSON and answers it with a line.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import random
import resource
import subprocess
import sys
import threading
import time
from types import TracebackType
from typing import IO, Any

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from granite4v.runtime.grammar.grammar_text import Bytes, lark_grammar, limits, reason_of, validation_problem

SECONDS = 5  # of processor time, per grammar
MAX_SECONDS = 12  # for all costly grammars of a schema; the rest count as too costly
_MAX_WAIT_S = 60.0  # elapsed time, on a busy machine
_MEMORY_BYTES = 3 << 30
_N_STEPS = 200  # bytes of a random answer


class Trials:
    """Gets llguidance's verdicts on the parts of one schema. A context manager, since it may own a child process."""

    def __init__(self) -> None:
        self._child: _Child | None = None
        self._known: dict[str, str] = {}
        self._seconds_left: float = MAX_SECONDS

    def problem(self, schema: dict[str, Any], *, costly: bool = False) -> str:
        """Why llguidance cannot enforce a schema, in a few words; empty if it can.

        `costly`: try it in the child process.
        """
        text = json.dumps(schema)
        if text not in self._known:
            self._known[text] = self._tried_in_child(text) if costly else validation_problem(text)
        return self._known[text]

    def _tried_in_child(self, text: str) -> str:
        if self._seconds_left <= 0:
            return "it was not tried, as other parts took too much time"
        try:
            self._child = self._child or _Child()
        except OSError as error:
            return f"it could not be tried: {error}"
        answer = self._child.answer(lark_grammar(text))
        if answer is None:
            self._seconds_left -= SECONDS
            self.close()
            return "compiling it takes too much time or memory"
        problem, seconds = answer
        self._seconds_left -= seconds
        return reason_of(problem)

    def close(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None

    def __enter__(self) -> Trials:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _Child:
    """The child process, and a thread that reads its answers."""

    def __init__(self) -> None:
        """Starts the process. Raises OSError."""
        if not sys.executable:
            raise OSError("there is no Python executable")
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(SECONDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input: IO[bytes] = self._process.stdin
        self._answers: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=self._listen, args=(self._process.stdout,), daemon=True).start()

    def _listen(self, output: IO[bytes]) -> None:
        with output:
            for line in output:
                self._answers.put(line)
        self._answers.put(b"")

    def answer(self, grammar: str) -> tuple[str, float] | None:
        """What is wrong with a grammar, and the processor time it took (seconds); None if the process ended or hung."""
        try:
            self._input.write(json.dumps(grammar).encode() + b"\n")
            self._input.flush()
            line = self._answers.get(timeout=_MAX_WAIT_S)
        except (OSError, queue.Empty):
            return None
        if not line:
            return None
        problem, seconds = json.loads(line)
        return problem, seconds

    def close(self) -> None:
        self._process.kill()
        with contextlib.suppress(OSError):
            self._input.close()
        self._process.wait()


# --- the child process ---


def _main(seconds: int) -> None:
    tokenizer = LLTokenizer(TokenizerWrapper(Bytes()))
    _limit("RLIMIT_AS", _MEMORY_BYTES)
    for line in sys.stdin.buffer:
        grammar, start = json.loads(line), time.process_time()
        _limit("RLIMIT_CPU", math.ceil(start) + seconds)
        failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, None)
        problem = messages[0] if failed else ""
        if not failed:
            matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits())
            _walk(matcher)
            problem = str(matcher.get_error()) if matcher.is_error() else ""
        print(json.dumps((problem, time.process_time() - start)), flush=True)


def _limit(name: str, value: int) -> None:
    """Sets a resource limit, beyond which the system kills the process. Where there is no such limit, the parent kills
    it after a while."""
    with contextlib.suppress(AttributeError, ValueError, OSError):  # macOS does not let RLIMIT_AS be set
        kind = getattr(resource, name)
        resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))


def _walk(matcher: Any) -> None:
    """Generates random bytes: some grammars compile quickly and are slow only in use."""
    rng = random.Random(0)
    for _ in range(_N_STEPS):
        mask = matcher.compute_bitmask()
        allowed = [byte for byte in range(256) if mask[byte // 8] >> (byte % 8) & 1]
        if not allowed or not matcher.consume_token(rng.choice(allowed)):
            return


if __name__ == "__main__":
    _main(int(sys.argv[1]))
