"""Loads a model's text file, tokenizer and adapter in a child process before this process loads them.

Some files make llama.cpp, ggml or a tokenizer abort the process, exhaust memory, or never return, and no check short of
loading can recognize them. In a child process, this becomes an error message. It costs a quarter of a second, plus for
a file of gigabytes the time to read it, which the following load saves because the file is then in the system's cache.
It is done once for each state of the files.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np

from granite4v.child import Ended, run_main
from granite4v.errors import DeviceError, Granite4vError, ModelFileError
from granite4v.ggml.gguf_file import GgufFile
from granite4v.paths import read_json_cache, write_json_cache
from granite4v.runtime.llama.context import BatchRows, LlamaContext
from granite4v.runtime.llama.file_checks import check_text
from granite4v.runtime.llama.files import ModelFiles
from granite4v.runtime.llama.model import LlamaModel
from granite4v.runtime.prompt.tokenizer import load_tokenizer

CACHE = "trials.json"
VERSION = 1  # increment when a trial does more than before
MAX_KNOWN = 1000
BASE_CPU_S = 60.0  # CPU time, which does not depend on other load on the machine
PATIENCE = 10  # wall-clock limit as a multiple of the CPU time
BYTES_A_SECOND = 10e6  # on the slowest core
BASE_MEMORY, MEMORY_A_BYTE = 4 << 30, 3
MAX_TOKENS_A_CHARACTER = 16
SAMPLE = "Invoice No. 2026-11-28: 1234567.89 EUR (19 %)\n\tTotal\N{EM DASH}paid\N{CJK UNIFIED IDEOGRAPH-6F22} " * 4
_ERRORS = {"ModelFileError": ModelFileError, "DeviceError": DeviceError}


def try_once(files: ModelFiles, announce: Callable[[], None] | None = None) -> None:
    """Raises ModelFileError for files that would end a process that loads them, or the error that the load itself
    raises.

    Does nothing for files that passed before. `announce` is called when it takes longer than a second.
    """
    key, n_bytes = _state(files)
    if not key or key in read_json_cache(CACHE):
        return
    check_text(files.text)
    cpu_s, memory = BASE_CPU_S + n_bytes / BYTES_A_SECOND, BASE_MEMORY + MEMORY_A_BYTE * n_bytes
    adapter = str(files.adapter.path) if files.adapter else ""
    arguments = [str(files.text.path), adapter, str(int(cpu_s)), str(memory)]
    try:
        ended = run_main(__name__, arguments, cpu_s * PATIENCE, announce)
    except OSError:  # no process can be started: the load itself must tell
        return
    _judge(ended, files)
    known = read_json_cache(CACHE)
    known[key] = time.time()
    newest = sorted(known.items(), key=lambda item: item[1] if isinstance(item[1], float) else 0.0)[-MAX_KNOWN:]
    write_json_cache(CACHE, dict(newest))


def _judge(ended: Ended, files: ModelFiles) -> None:
    if ended.status == 0 and ended.stdout.strip() == "ok":
        return
    try:
        kind, message = json.loads(ended.stdout.splitlines()[-1])
        error: Granite4vError = _ERRORS[kind](str(message))
    except (ValueError, IndexError, KeyError, TypeError):
        names = f"'{files.text.path}'" + (f" with the adapter '{files.adapter.path}'" if files.adapter else "")
        reason = f" ({ended.reason:.300})" if ended.reason else ""
        found = f"a process that loads {names} ends {ended.how}{reason}, expected it to load and to compute a token."
        if ended.lacked_memory:
            error = DeviceError(f"{found} Memory is short: close other programs, or raise the limit ('ulimit -v').")
        else:
            error = ModelFileError(
                f"{found} The file is damaged or unsupported: convert it again with 'granite4v convert', or "
                "download it again."
            )
    raise error


def _state(files: ModelFiles) -> tuple[str, int]:
    """Returns what the outcome of a trial depends on, and the size of the files in bytes; an empty key if a file is
    gone."""
    parts = [f"{VERSION} llama-cpp-python {version('llama-cpp-python')} tokenizers {version('tokenizers')}"]
    n_bytes = 0
    try:
        for path in (*files.text_paths, *([files.adapter.path] if files.adapter else [])):
            status = path.stat()
            n_bytes += status.st_size
            parts.append(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}")
    except OSError:
        return "", 0
    return " | ".join(parts), n_bytes


# --- in the child ---


def main(text: str, adapter: str, cpu_s: str, memory: str) -> None:
    """Runs in the child process: prints 'ok', or one of our errors as JSON."""
    _limit(int(cpu_s), int(memory))
    try:
        _load(Path(text), Path(adapter) if adapter else None)
    except Granite4vError as error:
        print(json.dumps([type(error).__name__, str(error)]))
    else:
        print("ok")


def _limit(cpu_s: int, memory: int) -> None:
    """Limits the child's CPU time and memory, and keeps it from writing a core file."""
    wants = ((resource.RLIMIT_CPU, cpu_s), (resource.RLIMIT_AS, memory), (resource.RLIMIT_CORE, 0))
    for limit, wanted in wants:
        soft, hard = resource.getrlimit(limit)
        allowed = [value for value in (soft, hard, wanted) if value != resource.RLIM_INFINITY]
        resource.setrlimit(limit, (min(allowed), hard))


def _load(text: Path, adapter: Path | None) -> None:
    with GgufFile.open(text) as file:
        tokenizer = load_tokenizer(file, text)
    tokens = tokenizer.encode(SAMPLE)
    if len(tokens) > MAX_TOKENS_A_CHARACTER * len(SAMPLE):
        raise ModelFileError(
            f"the tokenizer of '{text}' makes {len(tokens):,} tokens of {len(SAMPLE)} characters, expected at most "
            f"{MAX_TOKENS_A_CHARACTER} a character; convert it again with 'granite4v convert'."
        )
    tokenizer.decode(tokens)
    with LlamaModel(text) as model:
        if adapter is not None:
            model.load_adapter(adapter)
        with LlamaContext(model, 256, 8, 1) as context:
            context.set_adapter(adapter is not None)
            context.decode(BatchRows.of(np.zeros(1, np.int32), 0, 0, output=True))
            context.decode(BatchRows.of(np.zeros((1, model.n_embd_inp), np.float32), 1, 0, output=True))
            context.logits(0)
