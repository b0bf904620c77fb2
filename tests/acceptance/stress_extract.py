#!/usr/bin/env python3
"""Tries out what `granite4v extract` promises, on any model; one check a command.

    python -m tests.acceptance.stress_extract kill --pages 60 --kills 20  # killed at random moments, and gone on with
    python -m tests.acceptance.stress_extract memory --pages 300  # stays flat
    python -m tests.acceptance.stress_extract share  # a page is read once for all its tasks
    python -m tests.acceptance.stress_extract forms --generations 500  # answers are valid, whatever the model says
    python -m tests.acceptance.stress_extract fast-forward --model MODEL_DIR  # the same values, sooner

Without --model it makes a tiny one of random weights. What was seen is told on stderr; the last line on stdout is one
JSON object, and the status 1 when a promise is broken. Needs the `dev` extra.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.acceptance.stress_batch import (
    FORM,
    Batch,
    Json,
    Result,
    in_new_process,
    make_batch,
    model_directory,
    records_of,
    tell,
)
from tests.acceptance.stress_forms import forms
from tests.acceptance.stress_reading import SHARED_TASKS, fast_forward, share

KILL_TASKS = ("tables_html", "chart2csv", "kvp")
KILL_FORMATS = ("csv", "html", "json", "otsl", "md")
STAGES = ("records", "start", "records", "end", "records", "records", "start", "records")  # of kills, in turn
POLL_S = 0.005
N_TREND, WINDOW = 10, 10


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--model", type=Path, help="model directory; by default one of random weights is made")
    shared.add_argument("--threads", type=int, default=os.cpu_count())
    shared.add_argument("--seed", type=int, default=0, help="of pages, moments and answers")
    shared.add_argument("--work", type=Path, help="a directory that does not exist yet, kept; else a temporary one")
    commands = parser.add_subparsers(required=True, metavar="CHECK")

    def command(name: str, function: Any, text: str, max_tokens: int) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text, parents=[shared])
        made.add_argument("--max-tokens", type=int, default=max_tokens, help=f"of an answer ({max_tokens})")
        made.set_defaults(check=function)
        return made

    one = command("kill", kill, "a batch that is killed at random moments equals one that is not", 24)
    one.add_argument("--pages", type=int, default=60)
    one.add_argument("--kills", type=int, default=20)
    one = command("memory", memory, "memory stays flat over many pages in one process", 16)
    one.add_argument("--pages", type=int, default=300)
    one.add_argument("--from-page", type=int, default=20, help="the page that later ones are compared with (20)")
    one.add_argument("--tolerance", type=float, default=0.05, help="how much more there may be at the end (0.05)")
    one.add_argument("--width-px", type=int, default=850, help="of the pages, all of one size (850)")
    one = command("share", share, "three tasks on a page cost one encoding and one page prefill", 48)
    one.add_argument("image", type=Path, nargs="?", help="a picture; by default one is drawn")
    one.add_argument("--task", action="append", help=f"by default {', '.join(SHARED_TASKS)}")
    one.add_argument("--runs", type=int, default=3, help="of which medians of the time are told (3)")
    one = command("forms", forms, "constrained answers are valid, cut ones to their last whole part", 500)
    one.add_argument("--generations", type=int, default=500)
    one.add_argument("--first", type=int, default=0, help="number of the first generation, to repeat one")
    one.add_argument("--temperature", type=float, default=1.0)
    one.add_argument("--timeout", type=float, default=300.0, help="seconds after which a generation hangs (300)")
    one.add_argument("--show", action="store_true", help="print every answer on stderr")
    one = command("fast-forward", fast_forward, "text without a choice is not sampled, which changes no value", 512)
    one.add_argument("image", type=Path, nargs="*", help="pictures; by default forms are drawn")
    one.add_argument("--schema", help="of the fields on the pictures, a JSON Schema file")
    one.add_argument("--pages", type=int, default=8, help="forms to draw (8)")
    one.add_argument("--length", type=int, help="the most characters of a field: random weights find no end")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="stress-extract-") as directory:
        work = options.work or Path(directory)
        work.mkdir(parents=True, exist_ok=options.work is None)
        options.model = model_directory(options.model, work)
        result: Result = options.check(options, work)
    return result.print()


# --- kill ---


@dataclass(frozen=True)
class Pace:
    """Seconds of an undisturbed run: to its first record, for each record, from the last one to the end."""

    start_s: float
    record_s: float
    end_s: float
    status: int


@dataclass(frozen=True)
class Moment:
    """`after_s` seconds behind record `n_records`; `stage` 'start' means behind the start of the process instead."""

    n_records: int
    stage: str
    after_s: float


def kill(options: argparse.Namespace, work: Path) -> Result:
    batch = make_batch(work / "batch", options.pages, options.seed, faults=True)
    whole, broken = work / "whole", work / "broken"
    n_records = len(batch.pages) * len(KILL_TASKS)
    pace = run_undisturbed(_command(options, batch, work, whole), whole / "results.jsonl", n_records)
    expected = [_without_timings(record) for record in records_of(whole / "results.jsonl")]
    tell(f"undisturbed: {len(expected)} records, {pace.start_s:.1f} s to the first one, {pace.record_s:.2f} s each")
    resumed = [*_command(options, batch, work, broken), "--resume"]
    kills, problems = _kill_often(resumed, broken / "results.jsonl", options, pace, expected, n_records)
    status = subprocess.run(resumed, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode
    problems += compare(whole, broken, expected_keys(batch, KILL_TASKS))
    if status != pace.status:
        problems.append(f"the status was {status} at the end of the killed run, {pace.status} of the undisturbed one")
    stages = Counter(stage for stage, _ in kills)
    figures: Json = {
        "pages": options.pages,
        "records": len(list(records_of(broken / "results.jsonl"))),
        "kills": len(kills),
        "stages": dict(stages),
        "records_at_kills": [n for _, n in kills],
        "status": status,
    }
    told = ", ".join(f"{n} {where}" for where, n in stages.items())
    text = f"{figures['records']} records of {options.pages} pages after {len(kills)} kills ({told})"
    return Result("kill", figures, [text], problems)


def _command(options: argparse.Namespace, batch: Batch, work: Path, out: Path) -> list[str]:
    schema = work / "schema.json"
    schema.write_text(json.dumps(FORM))
    tasks = [text for task in KILL_TASKS for text in ("--task", task)]
    formats = [text for name in KILL_FORMATS for text in ("--format", name)]
    return [
        *(sys.executable, "-m", "granite4v", "extract", str(batch.folder), "--model", str(options.model), *tasks),
        *("--schema", str(schema), "--max-tokens", str(options.max_tokens), "--threads", str(options.threads)),
        *(*formats, "--report", "--out", str(out)),
    ]


def run_undisturbed(command: Sequence[str], results: Path, n_records: int) -> Pace:
    began = first = last = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    n = 0
    while process.poll() is None:
        n_before, n = n, n_lines(results)
        first = time.monotonic() if not n_before else first
        last = time.monotonic() if n_before < n_records else last
        time.sleep(POLL_S)
    ended = time.monotonic()
    if n_lines(results) == 0:
        raise SystemExit(
            f"status {process.returncode} and no records:\n{process.stderr.read() if process.stderr else ''}"
        )
    return Pace(first - began, (last - first) / n_records, ended - last, process.returncode)


def moments(rng: random.Random, n: int, n_records: int, pace: Pace) -> list[Moment]:
    """Most of them between and within records, some while a process starts or writes its last files."""
    found = []
    for stage in itertools.islice(itertools.cycle(STAGES), n):
        at = n_records if stage == "end" else rng.randrange(n_records)
        longest_s = {"start": 1.2 * pace.start_s, "records": 2 * pace.record_s, "end": 1.2 * pace.end_s}[stage]
        found.append(Moment(at, stage, rng.uniform(0, longest_s)))
    return sorted(found, key=lambda moment: moment.n_records)


def _kill_often(
    command: Sequence[str],
    results: Path,
    options: argparse.Namespace,
    pace: Pace,
    expected: list[Json],
    n_records: int,
) -> tuple[list[tuple[str, int]], list[str]]:
    """(stage, records on the disk) of each kill, and what was wrong on the disk after it."""
    rng = random.Random(options.seed)
    kills: list[tuple[str, int]] = []
    problems: list[str] = []
    waiting = moments(rng, options.kills, n_records, pace)
    while len(kills) < options.kills:
        # one that ended before it was killed is made good by a kill while it starts
        moment = waiting.pop(0) if waiting else Moment(0, "start", rng.uniform(0, 0.8 * pace.start_s))
        if moment.stage == "start" and died_within_a_page(results.parent):
            # a second death there would be the page's own, which is then left alone: let it be read first
            moment = Moment(0, "records", rng.uniform(0, 2 * pace.record_s))
        if not kill_at(moment, command, results, pace, n_records):
            continue
        kills.append((moment.stage, n_lines(results)))
        problems += [f"after kill {len(kills)}: {text}" for text in differences(expected, results)]
        tell(f"kill {len(kills)} of {options.kills}: {kills[-1][1]} of {n_records} records on the disk")
    return kills, problems


def kill_at(moment: Moment, command: Sequence[str], results: Path, pace: Pace, n_records: int) -> bool:
    """Runs the command and kills it then; False when it ended before."""
    n_before = n_lines(results)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if moment.stage != "start":
        wanted = min(max(moment.n_records, n_before + 1), n_records)
        while process.poll() is None and n_lines(results) < wanted:
            time.sleep(POLL_S)
    try:
        process.wait(moment.after_s + (pace.start_s if moment.stage != "start" and n_before == n_records else 0))
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait() < 0
    return False


def died_within_a_page(out: Path) -> bool:
    """Whether the run that was killed had begun a page, as it notes for the next one."""
    path = out / ".granite4v-attempts.json"
    return path.exists() and path.stat().st_size > 0


def n_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def expected_keys(batch: Batch, tasks: Sequence[str]) -> list[tuple[str, int | None, str]]:
    return [(source, page, task) for source, page in batch.pages for task in tasks]


def differences(expected: list[Json], results: Path) -> list[str]:
    """Where the records on the disk are not the first ones of those that are expected."""
    try:
        found = [_without_timings(record) for record in records_of(results)]
    except ValueError as error:
        return [f"'{results}' holds a line that is no JSON ({error})"]
    if len(found) > len(expected):
        return [f"there are {len(found)} records where {len(expected)} are expected"]
    return [
        f"record {i + 1} ({record['source']}, page {record['page']}, {record['task']}) differs in {', '.join(keys)}"
        for i, (record, other) in enumerate(zip(found, expected, strict=False))
        if (keys := [key for key in {**record, **other} if record.get(key) != other.get(key)])
    ]


def compare(whole: Path, broken: Path, keys: list[tuple[str, int | None, str]]) -> list[str]:
    """How the directory of a killed run differs from that of an undisturbed one, timings aside.

    `keys`: of all records that must be there, in order.
    """
    problems = []
    expected = [_without_timings(record) for record in records_of(whole / "results.jsonl")]
    for name, folder in (("undisturbed", whole), ("killed", broken)):
        try:
            found = [(r["source"], r["page"], r["task"]) for r in records_of(folder / "results.jsonl")]
        except ValueError:
            continue  # told below
        if found != keys:
            missing, more = Counter(keys) - Counter(found), Counter(found) - Counter(keys)
            problems.append(f"the {name} run lacks {sorted(map(str, missing))} and has {sorted(map(str, more))} more")
    problems += differences(expected, broken / "results.jsonl")
    names = [{path.relative_to(out) for path in out.rglob("*") if path.is_file()} for out in (whole, broken)]
    problems += [f"'{name}' is in one directory only" for name in sorted(names[0] ^ names[1])]
    problems += [
        f"'{name}' differs"
        for name in sorted(names[0] & names[1])
        if name != Path("results.jsonl") and _content(whole / name) != _content(broken / name)
    ]
    return problems


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    return re.sub(rb", \d+\.\d s\)", b")", content) if path.name == "report.html" else content


def _without_timings(record: Json) -> Json:
    return {key: value for key, value in record.items() if key != "timings"}


# --- memory ---


def memory(options: argparse.Namespace, work: Path) -> Result:
    if options.pages <= options.from_page:
        raise SystemExit(f"--pages is {options.pages}; expected more than {options.from_page}.")
    batch = make_batch(work / "batch", options.pages, options.seed, width_px=options.width_px)
    used = in_new_process(
        memory_by_page, batch.folder, options.model, work / "out", options.max_tokens, options.threads
    )
    rss = [middle_mb(used, page) for page in (options.from_page, len(used))]
    peaks = [used[page - 1][1] for page in (options.from_page, len(used))]
    figures: Json = {
        "pages": len(used),
        "from_page": options.from_page,
        "rss_mb": rss,
        "rss_ratio": round(rss[1] / rss[0], 4),
        "peak_mb": peaks,
        "peak_ratio": round(peaks[1] / peaks[0], 4) if peaks[0] and peaks[1] else None,
        "trend_mb": [middle_mb(used, page) for page in range(len(used), 0, -max(1, len(used) // N_TREND))][::-1],
    }
    problems = [f"{options.pages} pages were to be read, {len(used)} were"] if len(used) != options.pages else []
    for name in ("rss", "peak"):
        growth = (figures[f"{name}_ratio"] or 1) - 1
        if growth > options.tolerance:
            problems.append(
                f"{name} grew by {growth:.1%} from page {options.from_page} to {len(used)}; "
                f"expected at most {options.tolerance:.0%}"
            )
    lines = [
        f"{rss[0]} MB around page {options.from_page}, {rss[1]} MB around page {len(used)}, ratio "
        f"{figures['rss_ratio']}; peaks {peaks[0]} and {peaks[1]} MB, ratio {figures['peak_ratio']}"
    ]
    return Result("memory", figures, lines, problems)


def middle_mb(used: Sequence[tuple[float, float | None]], page: int) -> float:
    """Resident memory after the pages up to `page`, as many as `WINDOW`: it depends on what is just open."""
    return round(statistics.median(rss for rss, _ in used[max(0, page - WINDOW) : page]), 2)


def memory_by_page(
    folder: Path, model: Path, out: Path, max_tokens: int, threads: int
) -> list[tuple[float, float | None]]:
    """After each page, in MB (10^6 bytes): resident memory, and the most there was of it where the system tells."""
    import psutil

    import granite4v
    from granite4v.cli.bench import peak_rss_gb

    process, used = psutil.Process(), []
    tasks: tuple[str, ...] = ("tables_html", "chart2csv")
    options: Json = {"out": out, "report": True, "max_tokens": max_tokens, "n_threads": threads}
    for record in granite4v.extract(folder, tasks, model=model, **options):
        if record.task == tasks[-1]:
            peak = peak_rss_gb()
            used.append((round(process.memory_info().rss / 1e6, 2), None if peak is None else round(peak * 1e3, 2)))
    return used


if __name__ == "__main__":
    sys.exit(main())
