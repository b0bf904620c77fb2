"""Tries grammars in a process of its own, as some regular expressions keep llguidance busy without end.

Only grammars that look costly are tried here, as a process takes a quarter of a second. Run as a script, the module
is that process.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence

SECONDS = 8.0  # for all grammars of a trial
_MEMORY_BYTES = 3 << 30
_N_STEPS = 200  # of a walk through a grammar


def try_grammars(grammars: Sequence[str]) -> list[str]:
    """Why each grammar cannot be used; empty if it can be. What no process could be started for cannot."""
    problems: list[str] = []
    n_failures = 0
    while len(problems) < len(grammars):
        if n_failures > 2:
            return [*problems, *["it was not tried, as others took too much time"] * (len(grammars) - len(problems))]
        answers, failure = _run(grammars[len(problems) :])
        problems += answers
        if failure and len(problems) < len(grammars):
            problems.append(failure)
            n_failures += 1
    return problems


def _run(grammars: Sequence[str]) -> tuple[list[str], str]:
    """The answers that the process gave, and why it gave no more."""
    if not sys.executable:
        return [], "it could not be tried, as there is no Python executable"
    try:
        done = subprocess.run(
            [sys.executable, __file__],
            input=json.dumps(grammars).encode(),
            capture_output=True,
            timeout=SECONDS,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
    except subprocess.TimeoutExpired as expired:
        return _answers(expired.stdout), f"compiling it takes more than {SECONDS:.0f} seconds"
    except OSError as error:
        return [], f"it could not be tried: {error}"
    failure = "" if done.returncode == 0 else "compiling it takes too much memory"
    return _answers(done.stdout), failure


def _answers(output: bytes | None) -> list[str]:
    lines = (output or b"").split(b"\n")[:-1]
    return [json.loads(line) for line in lines]


# --- the process ---


class _Bytes:
    """A vocabulary of single bytes, for llguidance."""

    eos_token_id, bos_token_id, special_token_ids = 256, None, (256,)
    tokens = (*(bytes((byte,)) for byte in range(256)), b"<end>")

    def __call__(self, text: str) -> list[int]:
        return list(text.encode())


def _main() -> None:
    from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

    with contextlib.suppress(ImportError, ValueError, OSError):  # not every system has the limit
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    tokenizer = LLTokenizer(TokenizerWrapper(_Bytes()))
    for grammar in json.loads(sys.stdin.buffer.read()):
        failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, None)
        problem = messages[0] if failed else ""
        if not failed:
            matcher = LLMatcher(tokenizer, grammar, log_level=0)
            _walk(matcher)
            problem = str(matcher.get_error()) if matcher.is_error() else ""
        print(json.dumps(problem), flush=True)


def _walk(matcher: object) -> None:
    """One answer at random, as far as it goes."""
    rng = random.Random(0)
    for _ in range(_N_STEPS):
        mask = matcher.compute_bitmask()  # type: ignore[attr-defined]
        allowed = [byte for byte in range(256) if mask[byte // 8] >> (byte % 8) & 1]
        if not allowed or not matcher.consume_token(rng.choice(allowed)):  # type: ignore[attr-defined]
            return


if __name__ == "__main__":
    _main()
