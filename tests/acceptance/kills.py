"""A batch that is killed at random moments and resumed ends like one that never was: same records, same files.

    python -m tests.acceptance.kills --pages 60 --kills 20

`granite4v extract` runs once undisturbed, then again and again with SIGKILL: during startup, between and within
records, and while it writes its last files. After every kill the records on disk must be a prefix of those of the
undisturbed run, however many pages were in flight.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.acceptance.harness import FORM, Json, Result, options_parser, records_of, run_check, tell
from tests.acceptance.pages import Batch, make_batch

TASKS = ("tables_html", "chart2csv", "kvp")
FORMATS = ("csv", "html", "json", "otsl", "md")
STAGES = ("records", "start", "records", "end", "records", "records", "start", "records")  # of the kills, in turn
POLL_S = 0.005


def main(arguments: Sequence[str] | None = None) -> int:
    parser = options_parser(__doc__ or "", max_tokens=24)
    parser.add_argument("--pages", type=int, default=60)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--parallel", type=int, help="answers at once (what extract chooses)")
    return run_check(kills, parser.parse_args(arguments), "F16")


@dataclass(frozen=True)
class Pace:
    """The times of an undisturbed run in seconds: until its first record, per record, from the last record to the
    end."""

    start_s: float
    record_s: float
    end_s: float
    status: int


@dataclass(frozen=True)
class Moment:
    """When to kill: `after_s` seconds after record `n_records`, but no later than at record `latest`. With `stage`
    'start' the time counts from the start of the process."""

    n_records: int
    stage: str
    after_s: float
    latest: int


@dataclass(frozen=True)
class Kill:
    """The state after a kill: records on disk, and pages of which any one may have ended the process."""

    stage: str
    n_records: int
    n_suspects: int


def kills(options: argparse.Namespace, work: Path) -> Result:
    batch = make_batch(work / "batch", options.pages, options.seed, faults=True)
    whole, broken = work / "whole", work / "broken"
    n_records = len(batch.pages) * len(TASKS)
    pace = run_timed(extract_command(options, batch, work, whole), whole / "results.jsonl", n_records)
    expected = records_without_timings(whole / "results.jsonl")
    tell(f"undisturbed: {len(expected)} records, {pace.start_s:.1f} s to the first one, {pace.record_s:.2f} s each")
    resumed = [*extract_command(options, batch, work, broken), "--resume"]
    landed, problems = kill_often(resumed, broken / "results.jsonl", options, pace, expected, n_records)
    status = subprocess.run(resumed, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode
    problems += compare(whole, broken, expected_keys(batch, TASKS))
    if status != pace.status:
        problems.append(f"the status was {status} at the end of the killed run, {pace.status} of the undisturbed one")
    stages = Counter(kill.stage for kill in landed)
    figures: Json = {
        "pages": options.pages,
        "records": len(list(records_of(broken / "results.jsonl"))),
        "kills": len(landed),
        "stages": dict(stages),
        "records_at_kills": [kill.n_records for kill in landed],
        "suspects_at_kills": [kill.n_suspects for kill in landed],
        "status": status,
    }
    told = ", ".join(f"{n} {where}" for where, n in stages.items())
    n_together = sum(kill.n_suspects > 1 for kill in landed)
    text = f"{figures['records']} records of {options.pages} pages after {len(landed)} kills ({told})"
    text += f", {n_together} of them with several pages in flight"
    return Result("kills", figures, [text], problems)


def extract_command(options: argparse.Namespace, batch: Batch, work: Path, out: Path) -> list[str]:
    schema = work / "schema.json"
    schema.write_text(json.dumps(FORM))
    tasks = [text for task in TASKS for text in ("--task", task)]
    formats = [text for name in FORMATS for text in ("--format", name)]
    return [
        *(sys.executable, "-m", "granite4v", "extract", str(batch.folder), "--model", str(options.model), *tasks),
        *("--schema", str(schema), "--max-tokens", str(options.max_tokens), "--threads", str(options.threads)),
        *([] if options.parallel is None else ["--parallel", str(options.parallel)]),
        *(*formats, "--report", "--out", str(out)),
    ]


def run_timed(command: Sequence[str], results: Path, n_records: int) -> Pace:
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
    """Returns moments mostly between and within records, and some at startup or while the last files are written."""
    found = []
    for stage in itertools.islice(itertools.cycle(STAGES), n):
        at = n_records if stage == "end" else rng.randrange(n_records)
        longest_s = {"start": 1.2 * pace.start_s, "records": 2 * pace.record_s, "end": 1.2 * pace.end_s}[stage]
        found.append((at, stage, rng.uniform(0, longest_s)))
    found.sort()
    # if the machine has become faster since the pace was measured, a run must not get past the next kill's record
    latest = [at for at, _, _ in found[1:]] + [n_records]
    return [Moment(*one, most) for one, most in zip(found, latest, strict=True)]


def kill_often(
    command: Sequence[str],
    results: Path,
    options: argparse.Namespace,
    pace: Pace,
    expected: list[Json],
    n_records: int,
) -> tuple[list[Kill], list[str]]:
    """Returns the kills that hit a running process, and what was wrong on disk after them."""
    rng = random.Random(options.seed)
    kills: list[Kill] = []
    problems: list[str] = []
    waiting = moments(rng, options.kills, n_records, pace)
    while len(kills) < options.kills:
        # a run that ended before its kill is made up for by a kill at startup
        moment = waiting.pop(0) if waiting else Moment(0, "start", rng.uniform(0, 0.8 * pace.start_s), n_records)
        if moment.stage == "start" and deaths(results.parent):
            # a second death on that page would be blamed on the page, which would then be skipped: let it be read first
            moment = Moment(0, "records", rng.uniform(0, 2 * pace.record_s), moment.latest)
        if not kill_at(moment, command, results, pace, n_records):
            continue
        kills.append(Kill(moment.stage, n_lines(results), len(suspects(results.parent))))
        problems += [f"after kill {len(kills)}: {text}" for text in differences(expected, results)]
        told = f"{kills[-1].n_records} of {n_records} records on the disk, {kills[-1].n_suspects} suspects"
        tell(f"kill {len(kills)} of {options.kills}: {told}")
    return kills, problems


def kill_at(moment: Moment, command: Sequence[str], results: Path, pace: Pace, n_records: int) -> bool:
    """Runs the command and kills it at the given moment, but not during a page on which it has died before. Returns
    False if it ended first."""
    n_before, out = n_lines(results), results.parent
    spared = deaths(out)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if moment.stage != "start":
        wanted = min(max(moment.n_records, n_before + 1), n_records)
        while process.poll() is None and (n_lines(results) < wanted or spared & deaths(out, unknown=spared)):
            time.sleep(POLL_S)
    wait_s = moment.after_s + (pace.start_s if moment.stage != "start" and n_before == n_records else 0)
    most = moment.latest if moment.latest < n_records else n_records + 1
    until = time.monotonic() + wait_s
    while process.poll() is None and time.monotonic() < until and n_lines(results) < max(most, n_before + 1):
        time.sleep(POLL_S)
    process.kill()  # does nothing if the process has ended
    return process.wait() < 0


def deaths(out: Path, unknown: set[str] | None = None) -> set[str]:
    """Returns the pages that were in flight alone when a process died, as a run records them for the next one;
    `unknown` while it writes that file."""
    content = _attempts(out)
    return (unknown or set()) if content is None else {key for key, n in content.items() if isinstance(n, int)}


def suspects(out: Path) -> list[str]:
    """Returns the pages that were in flight together when a process died."""
    return list((_attempts(out) or {}).get("suspects", ()))


def _attempts(out: Path) -> Json | None:
    path = out / ".granite4v-attempts.json"
    try:
        return dict(json.loads(path.read_bytes() or b"{}")) if path.exists() else {}
    except ValueError:
        return None


def n_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def expected_keys(batch: Batch, tasks: Sequence[str]) -> list[tuple[str, int | None, str]]:
    return [(source, page, task) for source, page in batch.pages for task in tasks]


def differences(expected: list[Json], results: Path) -> list[str]:
    """Describes where the records on disk differ from the beginning of the expected ones."""
    try:
        found = records_without_timings(results)
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
    """Describes how the directory of a killed run differs from that of an undisturbed one, apart from timings.

    `keys`: those of all records that must be there, in order.
    """
    problems = []
    expected = records_without_timings(whole / "results.jsonl")
    for name, folder in (("undisturbed", whole), ("killed", broken)):
        try:
            found = [(r["source"], r["page"], r["task"]) for r in records_of(folder / "results.jsonl")]
        except ValueError:
            continue  # reported below
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


def records_without_timings(path: Path) -> list[Json]:
    return [{key: value for key, value in record.items() if key != "timings"} for record in records_of(path)]


if __name__ == "__main__":
    sys.exit(main())
