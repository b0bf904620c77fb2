"""Tries grammars in a process of its own, as some regular expressions keep llguidance busy without end.

The process is started for the first grammar that looks costly; most schemas have none. Run as a script, the module is
that process: it reads a grammar as a line of JSON, and answers with a line.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import random
import subprocess
import sys
import threading
import time
from types import TracebackType
from typing import IO, Any

from granite4v.runtime.constraint.grammar_text import Bytes, lark_grammar, limits, reason_of, validation_problem

SECONDS = 5.0  # for one grammar
MAX_SECONDS = 12.0  # for all that look costly; what comes later counts as too costly
_MEMORY_BYTES = 3 << 30
_N_STEPS = 200  # of a walk through a grammar


class Trials:
    """What llguidance says of the parts of one schema. Holds a process until it is left."""

    def __init__(self) -> None:
        self._child: _Child | None = None
        self._known: dict[str, str] = {}
        self._seconds_left = MAX_SECONDS

    def problem(self, schema: dict[str, Any], *, costly: bool = False) -> str:
        """Why answers cannot be held to a schema, in a few words; empty if they can. `costly`: tried apart."""
        text = json.dumps(schema)
        if text not in self._known:
            self._known[text] = self._tried_apart(text) if costly else validation_problem(text)
        return self._known[text]

    def _tried_apart(self, text: str) -> str:
        if self._seconds_left <= 0:
            return "it was not tried, as others took too much time"
        start = time.monotonic()
        try:
            self._child = self._child or _Child()
            answer = self._child.answer(lark_grammar(text), min(SECONDS, self._seconds_left))
        except OSError as error:
            return f"it could not be tried: {error}"
        self._seconds_left -= time.monotonic() - start
        if answer is None:
            self.close()
            return "compiling it takes too much time or memory"
        return reason_of(answer)

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
    """The process, and a thread that waits for its answers."""

    def __init__(self) -> None:
        """Raises OSError."""
        if not sys.executable:
            raise OSError("there is no Python executable")
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
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

    def answer(self, grammar: str, seconds: float) -> str | None:
        """None if it does not come in time, or the process ended."""
        try:
            self._input.write(json.dumps(grammar).encode() + b"\n")
            self._input.flush()
            line = self._answers.get(timeout=seconds)
        except (OSError, queue.Empty):
            return None
        return str(json.loads(line)) if line else None

    def close(self) -> None:
        self._process.kill()
        with contextlib.suppress(OSError):
            self._input.close()
        self._process.wait()


# --- the process ---


def _main() -> None:
    from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

    with contextlib.suppress(ImportError, ValueError, OSError):  # not every system has the limit
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    tokenizer = LLTokenizer(TokenizerWrapper(Bytes()))
    for line in sys.stdin.buffer:
        grammar = json.loads(line)
        failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, None)
        problem = messages[0] if failed else ""
        if not failed:
            matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits())
            _walk(matcher)
            problem = str(matcher.get_error()) if matcher.is_error() else ""
        print(json.dumps(problem), flush=True)


def _walk(matcher: Any) -> None:
    """One answer at random, as far as it goes."""
    rng = random.Random(0)
    for _ in range(_N_STEPS):
        mask = matcher.compute_bitmask()
        allowed = [byte for byte in range(256) if mask[byte // 8] >> (byte % 8) & 1]
        if not allowed or not matcher.consume_token(rng.choice(allowed)):
            return


if __name__ == "__main__":
    _main()
