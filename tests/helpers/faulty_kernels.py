"""Replaces `granite4v.ggml.kernel_timing` in a child process with kernels that crash, hang, or take a known time.

The environment variable `FAULTY_KERNELS` says as JSON what each kernel does: {kernel: seconds, 'abort' or 'hang'}.
Every child appends its process id to the file `FAULTY_KERNELS_LOG`.
"""

from __future__ import annotations

import json
import os
import time

from granite4v.ggml import kernel_timing
from granite4v.ggml.kernel_timing import Trial


def _measure(trial: Trial, n_threads: int) -> float:
    does = json.loads(os.environ["FAULTY_KERNELS"])[trial.kernel]
    if does == "abort":
        os.abort()
    if does == "hang":
        time.sleep(60)
    return float(does) * trial.n_rows


def main(n_threads: str, trials: str) -> None:
    with open(os.environ["FAULTY_KERNELS_LOG"], "a") as log:
        log.write(f"{os.getpid()}\n")
    kernel_timing.measure = _measure
    kernel_timing.main(n_threads, trials)
