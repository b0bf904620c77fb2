"""Loads a tokenizer.json in a child process, as the runtime will, before a conversion relies on it.

The tokenizers package panics on some files and may abort the process on others, and its memory for a large vocabulary
would add to the conversion's peak. In a child process neither matters.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tokenizers import Tokenizer

from granite4v.child import run_main
from granite4v.errors import CheckpointError

TIMEOUT_S = 300.0


def check_loads(text: str, path: Path) -> None:
    """Raises a CheckpointError that names `path` if the tokenizers package cannot read the tokenizer."""
    with tempfile.NamedTemporaryFile(prefix="granite4v-", suffix=".json") as file:
        file.write(text.encode("utf-8", "surrogatepass"))
        file.flush()
        ended = run_main(__name__, [file.name], TIMEOUT_S)
    if ended.status == 0:
        return
    reason = ended.stdout.strip() or f"a process that loads it ends {ended.how} ({ended.reason:.300})"
    raise CheckpointError(f"'{path}' cannot be read by the tokenizers package: {reason}.")


def main(path: str) -> None:
    """Entry point of the child process: exits with status 1 and the reason on stdout if the file does not load."""
    try:
        Tokenizer.from_file(path)
    except BaseException as error:  # its panics are BaseExceptions
        print(error)
        raise SystemExit(1) from None
