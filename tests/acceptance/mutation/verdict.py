"""Judges how commands ended: clean, refused with a message, or with one of the faults."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass

from .case import Result

CLEAN, REFUSED = "clean", "refused"
FAULTS = ("traceback", "signal", "hang", "noise", "wrong")  # worst known cause first; the table's columns
TRACEBACK = "Traceback (most recent call last)"
# Output of C and C++ libraries, and Python's warnings, that bypasses the product.
NOISE = re.compile(
    r"^(gguf_|ggml_|GGML_|llama_|clip_|load_tensors|print_info|init_tokenizer|graph_|libpng|libtiff|TIFF\w*:|JPEG|"
    r"terminate called|malloc|free\(\)|double free|corrupt|munmap|thread '.*' panicked|thread '.*' \(\d+\) panicked|"
    r"note: run with `RUST_BACKTRACE|Exception ignored|.{0,300}:\d+: \w*Warning: )",
    re.MULTILINE,
)
_FRAME = re.compile(r'File "([^"]*)", line (\d+)(?:,)? in (\S+)')


_GRAVITY = (*FAULTS, REFUSED, CLEAN)


@dataclass(frozen=True)
class Verdict:
    """How a command ended. `cause` groups cases that end alike."""

    kind: str
    cause: str = ""

    @property
    def gravity(self) -> int:
        return -_GRAVITY.index(self.kind)


def judge(result: Result) -> Verdict:
    """Judges how one command ended."""
    where = " ".join(result.command[:1])
    if result.timed_out:
        return Verdict("hang", f"{where}: {_place(result.stack, innermost_last=False)}")
    if result.signal is not None:
        name = signal.Signals(result.signal).name
        return Verdict("signal", f"{where}: {name} in {_place(result.stack, innermost_last=False)}")
    if TRACEBACK in result.stderr or result.status not in (0, 1, 2):
        lines = [line for line in result.stderr.strip().splitlines() if line and not line.startswith((" ", "\t"))]
        last = re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "_", lines[-1])[:100] if lines else f"status {result.status}"
        return Verdict("traceback", f"{where}: {last} in {_place(result.stderr, innermost_last=True)}")
    if noise := NOISE.search(result.stderr) or NOISE.search(result.stdout):
        line = noise.string[noise.start() :].splitlines()[0]
        return Verdict("noise", f"{where}: {re.split('[0-9:]', line)[0]:.60}")
    if result.left_running:
        return Verdict("wrong", f"{where}: processes are left running")
    if result.left_behind:
        name = re.sub("[0-9]+", "_", result.left_behind[0])
        return Verdict("wrong", f"{where}: a temporary file is left behind: {name:.60}")
    if result.status == 0:
        return Verdict(CLEAN)
    if result.status == 1 and not result.stderr.strip():
        return Verdict("wrong", f"{where}: status 1 without a message")
    if result.status == 2 and "Usage:" not in result.stderr:
        return Verdict("wrong", f"{where}: status 2 without 'Usage:'")
    return Verdict(REFUSED)


def _place(stack: str, innermost_last: bool) -> str:
    """Returns the innermost frame of the product, else the innermost of all. faulthandler lists the innermost first."""
    if not innermost_last and "Current thread" in stack:  # of several threads, the one that got the signal
        stack = stack[stack.index("Current thread") :].split("\n\n")[0]
    frames = _FRAME.findall(stack)
    if innermost_last:
        frames.reverse()
    rooms = re.compile(r"/(granite4v|runtime|converter|clip_projector)/(?!cli/main)")
    ours = [frame for frame in frames if rooms.search(frame[0]) and "site-packages" not in frame[0]]
    for path, line, function in [*ours, *frames][:1]:
        return f"{'/'.join(path.split('/')[-2:])}:{line} {function}"
    return "no Python frame"
