"""A batch that is interrupted with Ctrl-C ends within seconds, keeps what is finished, and resumes to the same end.

    python -m tests.acceptance.interrupts --pages 40 --interrupts 10
    python -m tests.acceptance.interrupts --model build/full-model --pages 4 --interrupts 4 --max-tokens 8

`granite4v extract` runs once undisturbed, then again and again with SIGINT at moments spread over its run time, with
several pages in flight. After each interrupt the results must be records of the undisturbed run, without duplicates and
in the same order. They may include records after a page that was not finished.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.acceptance.harness import Json, Result, options_parser, run_check, tell
from tests.acceptance.kills import TASKS, compare, expected_keys, extract_command, records_without_timings, run_timed
from tests.acceptance.pages import make_batch

# of an interrupted command; the second occurs while Python itself starts or ends, and shells report it as the first
STATUSES = (128 + signal.SIGINT, -signal.SIGINT)
Key = tuple[str, int | None, str]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = options_parser(__doc__ or "", max_tokens=60)
    parser.add_argument("--pages", type=int, default=40)
    parser.add_argument("--interrupts", type=int, default=10)
    parser.add_argument("--parallel", type=int, help="answers at once (what extract chooses)")
    parser.add_argument("--within", type=float, default=2.0, metavar="SECONDS", help="of an end (2)")
    return run_check(interrupts, parser.parse_args(arguments), "F16")


def interrupts(options: argparse.Namespace, work: Path) -> Result:
    batch = make_batch(work / "batch", options.pages, options.seed, faults=True)
    whole, broken = work / "whole", work / "broken"
    keys = expected_keys(batch, TASKS)
    pace = run_timed(extract_command(options, batch, work, whole), whole / "results.jsonl", len(keys))
    whole_s = pace.start_s + pace.record_s * len(keys)
    expected = records_without_timings(whole / "results.jsonl")
    tell(f"undisturbed: {len(expected)} records in {whole_s:.1f} s")
    command = [*extract_command(options, batch, work, broken), "--resume"]
    rng = random.Random(options.seed)
    ended_s: list[float] = []
    kept: list[int] = []
    problems: list[str] = []
    for i in range(options.interrupts):
        # a share of the remaining time, so that the last interrupt still has something to interrupt
        left_s = (whole_s - pace.start_s) * (1 - (kept or [0])[-1] / len(keys)) / (options.interrupts - i)
        after_s = rng.uniform(0.3, 1) * (pace.start_s + left_s)
        # the first one waits for a record, even if the machine has become faster since the undisturbed run
        status, seconds = interrupt(command, after_s, broken / "results.jsonl" if i == 0 else None)
        found = records_without_timings(broken / "results.jsonl")
        kept.append(len(found))
        if status in STATUSES:
            ended_s.append(round(seconds, 3))
            tell(f"interrupt {i + 1}: ended in {seconds:.2f} s, {len(found)} records are kept")
        elif status != pace.status:
            problems.append(f"interrupt {i + 1}: the status is {status}, expected one of {STATUSES}")
        if seconds > options.within:
            problems.append(f"interrupt {i + 1}: ended in {seconds:.2f} s; expected at most {options.within:g}")
        problems += [f"interrupt {i + 1}: {text}" for text in strangers(expected, found)]
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    problems += compare(whole, broken, keys)
    figures: Json = {"pages": options.pages, "records": len(keys), "ended_s": ended_s, "kept": kept}
    text = f"{len(ended_s)} interrupts, each ended in at most {max(ended_s, default=0):.2f} s"
    if not ended_s:
        problems.append("no interrupt came before the end")
    return Result("interrupts", figures, [text], problems)


def interrupt(command: Sequence[str], after_s: float, records: Path | None = None) -> tuple[int, float]:
    """Returns the status, and the seconds from Ctrl-C to the end (0 if the process ended first). Ctrl-C is sent after
    `after_s` seconds, or as soon as the file `records` is not empty."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + after_s
    while records is not None and process.poll() is None and time.monotonic() < until:
        if records.is_file() and records.stat().st_size > 0:
            until = time.monotonic()
        time.sleep(0.01)
    try:
        process.wait(max(0.0, until - time.monotonic()))
        return process.returncode, 0.0
    except subprocess.TimeoutExpired:
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        return process.wait(), time.monotonic() - begin


def strangers(expected: Sequence[Json], found: Sequence[Json]) -> list[str]:
    """Describes what is wrong with records that should be a subset of the expected ones, in the same order."""
    places = {(record["source"], record["page"], record["task"]): i for i, record in enumerate(expected)}
    problems, last = [], -1
    for record in found:
        key = record["source"], record["page"], record["task"]
        place = places.get(key)
        if place is None:
            problems.append(f"there is a record of {key}, which the undisturbed run has not")
        elif expected[place] != record:
            names = [name for name in record if record[name] != expected[place].get(name)]
            problems.append(f"the record of {key} differs in {', '.join(names)}")
        elif place <= last:
            problems.append(f"the record of {key} is there twice or out of order")
        last = max(last, -1 if place is None else place)
    return problems


if __name__ == "__main__":
    sys.exit(main())
