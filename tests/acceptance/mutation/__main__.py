"""Runs mutation cases and counts how they end.

    python -m tests.acceptance.mutation --cases 2000 --seed 1
    python -m tests.acceptance.mutation --kind gguf --seed 1 --only 417 --keep /tmp/case

Progress and a table go to stderr, one line of JSON to stdout. The status is 1 if any case ended in a traceback, a
signal or a hang, printed a library's messages, or left something wrong behind.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import selectors
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .case import Case, Kind, Result, rng_of
from .isolation import Limits, isolated
from .product import IMPORTS, command_line
from .samples import write_page
from .verdict import CLEAN, FAULTS, REFUSED, Verdict, judge

KINDS = ("gguf", "checkpoints", "images", "pdfs", "schemas", "output")
COLUMNS = (CLEAN, REFUSED, *FAULTS)
# Set before libraries start thread pools, which a fork would lose.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass
class Report:
    """How one case ended."""

    kind: str
    index: int
    verdict: str
    cause: str
    seconds: float = 0.0
    edits: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    said: str = ""  # the end of the failing command's stderr


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    os.environ.update(ENVIRONMENT)
    with _work_folder(options.work) as work:
        os.environ["GRANITE4V_CACHE"] = str(work / "cache")
        kinds = {name: _kind(name) for name in options.kind or KINDS}
        for module in IMPORTS:
            with contextlib.suppress(ImportError):  # a module that this version does not have, or an extra's
                importlib.import_module(module)
        if threading.active_count() > 1:
            raise RuntimeError(f"an import started threads: {threading.enumerate()}")
        limits = Limits(options.seconds_per_case, round(options.memory_gb * (1 << 30)))
        _prepare(kinds, work)
        reports = list(_progress(_reports(kinds, options, work, limits), len(kinds) * len(_indices(options))))
    _tell(reports, list(kinds))
    figures = {name: dict(Counter(r.verdict for r in reports if r.kind == name)) for name in kinds}
    failures = [asdict(report) for report in reports if report.verdict in FAULTS]
    print(json.dumps({"seed": options.seed, "cases": len(reports), "kinds": figures, "failures": failures}))
    return 1 if failures else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tests.acceptance.mutation", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kind", action="append", choices=KINDS, help="kinds of input; may be repeated (all)")
    parser.add_argument("--cases", type=int, default=2000, help="cases of each kind (%(default)s)")
    parser.add_argument("--first", type=int, default=0, help="index of the first case (%(default)s)")
    parser.add_argument("--only", type=int, action="append", help="only the case of this index; may be repeated")
    parser.add_argument("--seed", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--seconds-per-case", type=float, default=20.0, help="CPU of a command (%(default)s)")
    parser.add_argument("--memory-gb", type=float, default=8.0, help="address space of a command (%(default)s)")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="cases at once (%(default)s)")
    parser.add_argument("--keep", type=Path, help="keep the files of cases that fail here, with --only of all")
    parser.add_argument("--work", type=Path, help="folder for sound inputs, used again by later runs (a new one)")
    return parser.parse_args(arguments)


def _indices(options: argparse.Namespace) -> list[int]:
    return options.only or list(range(options.first, options.first + options.cases))


def _kind(name: str) -> Kind:
    return importlib.import_module(f".kinds.{name}", __package__)  # type: ignore[return-value]


@contextlib.contextmanager
def _work_folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
        return
    made = tempfile.mkdtemp(prefix="mutation-")  # TemporaryDirectory's finalizer would run in every child, too
    try:
        yield Path(made).resolve()
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _prepare(kinds: dict[str, Kind], work: Path) -> None:
    """Makes the unmutated inputs and fills the cache, in child processes, so that this one has no threads when cases
    fork."""
    folder = work / f"job{os.getpid()}" / "case"  # per process: several runs may share unmutated inputs
    folder.mkdir(parents=True)
    write_page(folder / "page.png")
    for kind in kinds.values():

        def make(kind: Kind = kind) -> None:
            kind.prepare(work)

        _must_work(isolated(make, folder, kind.name, Limits(300, 1 << 36)))
    ask = ["ask", "page.png", "Total?", "--max-tokens", "1", "--threads", "1"]
    _must_work(isolated(lambda: command_line(ask), folder, "ask", Limits(300, 1 << 36), ask))
    shutil.rmtree(folder.parent, ignore_errors=True)


def _must_work(result: Result) -> None:
    if result.status != 0:
        raise RuntimeError(f"a sound input fails ({' '.join(result.command)}):\n{result.stderr}{result.stack}")


# --- cases ---


def _reports(kinds: dict[str, Kind], options: argparse.Namespace, work: Path, limits: Limits) -> Iterator[Report]:
    """Yields the reports of all cases, in the order in which `options.jobs` processes deliver them."""
    todo = [(name, index) for name in kinds for index in _indices(options)]
    jobs = min(options.jobs, len(todo)) or 1
    selector = selectors.DefaultSelector()
    children = []
    for job in range(jobs):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            _worker(
                [(kinds[name], index) for name, index in todo[job::jobs]],
                options,
                work / f"job{os.getpid()}",
                limits,
                writer,
            )
        os.close(writer)
        children.append(pid)
        selector.register(os.fdopen(reader, "rb"), selectors.EVENT_READ)
    try:
        while selector.get_map():
            for key, _ in selector.select():
                line = key.fileobj.readline()  # type: ignore[union-attr]
                if line:
                    yield Report(**json.loads(line))
                else:
                    selector.unregister(key.fileobj)
    except BaseException:
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        raise
    statuses = [os.waitpid(pid, 0)[1] for pid in children]
    if any(statuses):
        raise RuntimeError(f"a worker of the harness itself failed (status {statuses})")


def _worker(todo: list[tuple[Kind, int]], options: argparse.Namespace, work: Path, limits: Limits, writer: int) -> None:
    """Runs the cases of one job and writes their reports to a pipe. Never returns."""
    try:
        with os.fdopen(writer, "wb") as file:
            for kind, index in todo:
                report = _run_case(kind, index, options, work, limits)
                file.write(json.dumps(asdict(report)).encode() + b"\n")
                file.flush()
        shutil.rmtree(work, ignore_errors=True)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _run_case(kind: Kind, index: int, options: argparse.Namespace, work: Path, limits: Limits) -> Report:
    began = time.monotonic()
    shutil.rmtree(work, ignore_errors=True)
    folder = work / "case"
    folder.mkdir(parents=True)
    bases = work.parent

    def build() -> None:
        case = kind.build(rng_of(kind.name, options.seed, index), bases, folder)
        (work / "case.json").write_text(json.dumps(asdict(case)))

    built = isolated(build, folder, "build", Limits(20, 1 << 36))
    if built.timed_out or built.signal:  # the library that builds the case failed on it: nothing of ours to test
        return Report(kind.name, index, CLEAN, "the case cannot be built")
    if built.status != 0:
        return Report(
            kind.name, index, "wrong", f"the case cannot be built: {judge(built).cause}", said=built.stderr[-3000:]
        )
    case = Case(**json.loads((work / "case.json").read_text()))
    results: list[Result] = []
    verdict = Verdict(CLEAN)
    for i, command in enumerate(case.commands):
        results.append(isolated(lambda command=command: kind.run(command), folder, f"{i}", limits, command))
        verdict = max(verdict, judge(results[-1]), key=lambda found: found.gravity)
    verdict = max(verdict, _check(kind, folder, case, results, limits), key=lambda found: found.gravity)
    report = Report(kind.name, index, verdict.kind, verdict.cause, round(time.monotonic() - began, 3))
    if verdict.kind in FAULTS or options.only:
        report.edits, report.commands = case.edits, [" ".join(command) for command in case.commands]
        report.said = "\n".join(f"$ {' '.join(r.command)}\n{r.stderr[-2500:]}{r.stack[:600]}" for r in results)
        if options.keep:
            target = options.keep / f"{kind.name}-{options.seed}-{index}"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(work, target, symlinks=True, ignore=_no_pipes)
    return report


def _no_pipes(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if not (os.path.isfile(p := f"{folder}/{name}") or os.path.isdir(p))]


def _check(kind: Kind, folder: Path, case: Case, results: list[Result], limits: Limits) -> Verdict:
    """Checks what the commands left behind, in a child process as well, because matching a schema's pattern may never
    end."""
    found = folder.parent / "problems.json"

    def look() -> None:
        found.write_text(json.dumps(kind.check(folder, case, results)))

    result = isolated(look, folder, "check", limits)
    if result.status != 0:
        judged = judge(result)
        return Verdict(judged.kind if judged.kind in FAULTS else "wrong", f"check: {judged.cause}")
    problems = json.loads(found.read_text())
    return Verdict("wrong", problems[0]) if problems else Verdict(CLEAN)


# --- what a person sees ---


def _progress(reports: Iterator[Report], n_total: int) -> Iterator[Report]:
    began = last = time.monotonic()
    n_failed = 0
    for n_done, report in enumerate(reports, 1):
        if report.verdict in FAULTS:
            n_failed += 1
            print(f"{report.kind} {report.index}: {report.verdict}: {report.cause}", file=sys.stderr, flush=True)
        now = time.monotonic()
        if now - last > 10 or n_done == n_total:
            last = now
            print(f"{n_done} of {n_total} cases, {n_failed} failed, {now - began:.0f} s", file=sys.stderr, flush=True)
        yield report


def _tell(reports: list[Report], kinds: list[str]) -> None:
    causes: dict[tuple[str, str, str], list[Report]] = {}
    for report in reports:
        if report.verdict in FAULTS:
            causes.setdefault((report.kind, report.verdict, report.cause), []).append(report)
        elif report.said:
            print(f"\n{report.kind} {report.index}: {report.verdict}; {report.edits}\n{report.said}", file=sys.stderr)
    for (kind, verdict, cause), found in sorted(causes.items(), key=lambda item: (item[0][0], -len(item[1]))):
        numbers = " ".join(str(report.index) for report in sorted(found, key=lambda report: report.index)[:8])
        print(f"\n{kind}: {len(found)} x {verdict}: {cause}\n  cases {numbers}", file=sys.stderr)
        print(f"  {found[0].edits!s:.300}\n  {found[0].said[-500:]}".replace("\n", "\n  "), file=sys.stderr)
    head = "".join(f"{name:>11}" for name in COLUMNS)
    print(f"\n{'kind':<12}{'cases':>8}{head}   seconds a case, slowest", file=sys.stderr)
    for kind in kinds:
        own = [report for report in reports if report.kind == kind]
        counts = Counter(report.verdict for report in own)
        row = "".join(f"{counts[name]:>11}" for name in COLUMNS)
        slowest = max(own, key=lambda report: report.seconds)
        mean = sum(report.seconds for report in own) / len(own)
        times = f"{mean:.2f}, {slowest.seconds:.1f} (case {slowest.index})"
        print(f"{kind:<12}{len(own):>8}{row}   {times}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
