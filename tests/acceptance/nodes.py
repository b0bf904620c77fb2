"""A batch read by two nodes of a Ray cluster gives the records of one process, whatever is killed meanwhile.

    python -m tests.acceptance.nodes --pages 200 --kills 10
    python -m tests.acceptance.nodes --pages 100 --kills 0 --timings

Ray's cluster utility starts the nodes on this machine, each with one core. Workers get SIGKILL at random moments, a
node is killed with everything on it, the process that writes the results is killed and resumed, and one page kills
every process that reads it. `--timings` compares the pages per hour of one process, one worker and two workers, each
with one core, counted from the first record.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

import granite4v
from granite4v.default_model import find_model
from granite4v.runtime.extract import extract
from granite4v.runtime.extract.asking import ModelAsker
from granite4v.runtime.extract.cluster import OnRay
from tests.acceptance.harness import Json, Result, records_of, tell
from tests.acceptance.pages import make_batch

TASK = "tables_html"
WORKER = "ray::Worker"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=200)
    parser.add_argument("--kills", type=int, default=10, help="of workers (10)")
    parser.add_argument("--driver-kills", type=int, default=3, help="of the process that writes (3)")
    parser.add_argument("--parallel", type=int, default=4, help="answers at once of one worker (4)")
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timings", action="store_true", help="compare the speed instead")
    parser.add_argument("--work", type=Path, required=True, help="a directory that does not exist yet")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True)
    batch = make_batch(options.work / "batch", options.pages, options.seed)
    with Nodes() as nodes:
        check = Check(options, batch.folder, nodes, options.work)
        return (check.timings if options.timings else check.deaths)().print()


class Nodes:
    """A cluster on this machine: a head node without cores, and nodes with one core each."""

    def __init__(self) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        import ray
        from ray.cluster_utils import Cluster

        self._ray = ray
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.address = str(self._cluster.address)
        self._nodes: list[Any] = []
        ray.init(address=self.address, log_to_driver=False, configure_logging=False)

    @property
    def n_nodes(self) -> int:
        return len(self._nodes)

    def add(self) -> None:
        self._nodes.append(self._cluster.add_node(num_cpus=1, object_store_memory=400 << 20))

    def kill(self) -> None:
        """Kills the oldest node, with everything that runs on it."""
        self._cluster.remove_node(self._nodes.pop(0), allow_graceful=False)

    def workers(self) -> list[int]:
        """Returns the process ids of the workers, which hold a model."""
        found = (process.info for process in psutil.process_iter(["pid", "cmdline"]))
        return [one["pid"] for one in found if one["cmdline"] and one["cmdline"][0].startswith(WORKER)]

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()
        self._cluster.shutdown()


@dataclass
class Check:
    options: argparse.Namespace
    batch: Path
    nodes: Nodes
    work: Path

    @property
    def settings(self) -> Json:
        return {"n_threads": 1, "parallel": self.options.parallel, "max_tokens": self.options.max_tokens}

    def deaths(self) -> Result:
        result = Result("nodes", {"pages": self.options.pages})
        whole = self._run("whole", None)
        self.nodes.add()
        self.nodes.add()
        for name, run in (("quiet", self._quiet), ("killed", self._killed), ("resumed", self._resumed)):
            began = time.monotonic()
            run(result)
            found = compare(whole, records(self.work / name))
            tell(f"{name}: {len(whole)} records, {time.monotonic() - began:.0f} s, {found or 'the same'}")
            result.broken += [f"{name}: {problem}" for problem in found]
        self._poisonous(result, whole)
        return result

    def _quiet(self, result: Result) -> None:
        self._run("quiet", self.nodes.address)

    def _killed(self, result: Result) -> None:
        """Kills workers at random record counts, and a node at half of the batch."""
        rng, n = random.Random(self.options.seed), self.options.pages
        moments = sorted(rng.sample(range(1, n), self.options.kills))
        killed: list[int] = []
        self._has_node_died = False

        def at(n_records: int) -> None:
            if n_records > n // 2 and not self._has_node_died:
                self._has_node_died = True
                self.nodes.kill()
                self.nodes.add()
            if moments and n_records >= moments[0] and (pids := self.nodes.workers()):
                moments.pop(0)
                killed.append(rng.choice(pids))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(killed[-1], signal.SIGKILL)

        self._run("killed", self.nodes.address, at)
        result.figures |= {"worker_kills": len(killed), "node_kills": int(self._has_node_died)}
        if len(killed) < self.options.kills or not self._has_node_died:
            result.broken.append(f"only {len(killed)} workers were killed, node: {self._has_node_died}")

    def _resumed(self, result: Result) -> None:
        rng, n, out = random.Random(self.options.seed), self.options.pages, self.work / "resumed"
        command = [sys.executable, "-m", "granite4v", "extract", str(self.batch), "--task", TASK, "--out", str(out)]
        command += ["--threads", "1", "--parallel", str(self.options.parallel), "--ray", self.nodes.address]
        command += ["--max-tokens", str(self.options.max_tokens), "--resume"]
        n_kills = 0
        for moment in sorted(rng.sample(range(1, n - 1), self.options.driver_kills)):
            driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while driver.poll() is None and len(list(records_of(out / "results.jsonl"))) < moment:
                time.sleep(0.02)
            n_kills += driver.poll() is None
            driver.kill()
            driver.wait()
        ended = subprocess.run(command, capture_output=True, text=True)
        result.figures["driver_kills"] = n_kills
        if n_kills < self.options.driver_kills or ended.returncode not in (0, 1):
            result.broken.append(f"{n_kills} driver kills; the last run: {ended.returncode} {ended.stderr[-300:]}")

    def _poisonous(self, result: Result, whole: list[Json]) -> None:
        page = whole[len(whole) // 3]
        path = find_model(None, tell)
        model = OnRay(self.nodes.address, f"{page['digest']}", path, find_deadly)
        out = self.work / "poisonous"
        list(extract([self.batch], TASK, model=model, out=out, say=tell, **self.settings))
        found = records(out)
        expected = [line["error_type"] if line["digest"] != page["digest"] else "ProcessDied" for line in whole]
        if [line["error_type"] for line in found] != expected:
            result.broken.append("a page that kills its worker is not a record, or others are not as they were")
        result.figures["poisonous"] = expected.count("ProcessDied")

    def timings(self) -> Result:
        """Compares the pages per hour of each way, the better of two runs."""
        result = Result("nodes_timings", {"pages": self.options.pages})
        rates: dict[str, list[float]] = {"process": [], "one": [], "two": []}
        order = [("process", 0), ("one", 1), ("process", 0), ("one", 1), ("two", 2), ("two", 2)]
        for place, (way, n_nodes) in enumerate(order):
            while self.nodes.n_nodes < n_nodes:
                self.nodes.add()
            rates[way].append(self._rate(f"{way}{place}", None if way == "process" else self.nodes.address))
            tell(f"{way}: {rates[way][-1]:.0f} pages an hour")
        best = {way: max(found) for way, found in rates.items()}
        result.figures |= {
            "pages_an_hour": {way: round(rate) for way, rate in best.items()},
            "scaling": round(best["two"] / best["one"], 3),
            "overhead": round(best["process"] / best["one"] - 1, 3),
        }
        return result

    def _rate(self, name: str, address: str | None) -> float:
        """Returns the pages per hour from the first record to the last."""
        moments: list[float] = []
        self._run(name, address, lambda n: moments.append(time.monotonic()))
        return 3600 * (len(moments) - 1) / (moments[-1] - moments[0])

    def _run(self, name: str, address: str | None, at: Callable[[int], None] = lambda n: None) -> list[Json]:
        out = self.work / name
        with granite4v.extract([self.batch], TASK, out=out, ray=address, say=tell, **self.settings) as run:
            for n, _ in enumerate(run, 1):
                at(n)
        return records(out)


def find_deadly(name: str | Path | None, report: Callable[[str], None]) -> str | Path:
    """Replaces `find_model` on a node: `name` is the digest of the page that kills its worker, and the model is the
    embedded one."""
    question = ModelAsker.question

    def deadly(self: ModelAsker, page: Any, asked: Any) -> Any:
        if page.digest == name:
            os.kill(os.getpid(), signal.SIGKILL)
        return question(self, page, asked)

    ModelAsker.question = deadly  # type: ignore[method-assign, assignment]
    return find_model(None, report)


def records(out: Path) -> list[Json]:
    found = records_of(out / "results.jsonl")
    return [{key: value for key, value in record.items() if key != "timings"} for record in found]


def compare(whole: list[Json], found: list[Json]) -> list[str]:
    """Describes where records differ from those of the undisturbed run."""
    problems = [] if len(whole) == len(found) else [f"{len(found)} records; expected {len(whole)}"]
    for place, (one, other) in enumerate(zip(whole, found, strict=False)):
        differing = [key for key in one if one[key] != other.get(key)]
        if differing:
            problems.append(f"record {place + 1} differs in {', '.join(differing)}")
    return problems[:5]


if __name__ == "__main__":
    sys.exit(main())
