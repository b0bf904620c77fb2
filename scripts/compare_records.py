"""Extracts the same held-out documents with two source trees and compares the records by value.

    python -m scripts.compare_records BASE NEW --documents 100
    python -m scripts.compare_records BASE NEW --new-options '{"parallel": 4}'

BASE and NEW are checkouts. This tree draws the documents once: tables, charts and forms of the five held-out groups, in
PDFs and TIFFs of several pages and in single images. Each is asked for every task that fits it. Each tree then runs in
its own process, with its own code, its own conversion of the embedded model (F16) and its own cache; NEW gets a copy of
BASE's measurements of the machine, so that both choose the same kernels. Options of `granite4v.extract` that only one
tree has are given as JSON.

Timings are not compared; `RENAMED` lists the fields of a record that have another name in NEW. The differing records go
to stderr; the last line on stdout is one JSON object. Exits with status 1 when a record differs or is missing.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gguf import GGUFReader
from PIL import Image

from scripts.nano import formats
from scripts.nano.evaluate import MAX_TOKENS, Question, held_out
from scripts.nano.truth import Form

GROUPS = 5  # groups that `held_out` draws from
MAX_PAGES = 12
IMAGES = (".png", ".jpg", ".webp", ".bmp")
# Each kind of document, the tasks it is asked for, and the maximum number of tokens of an answer. The embedded model
# does not know chart2summary and chart2code; its answers to them do not end by themselves.
ASKED = (
    ("table", ("tables_otsl", "tables_html", "tables_json"), MAX_TOKENS),
    ("chart", ("chart2csv",), MAX_TOKENS),
    ("chart", ("chart2summary", "chart2code"), 96),
    ("form", ("kvp",), MAX_TOKENS),
)
IGNORED = frozenset(
    {"timings", "model"}
)  # a model's checksum covers the path it was converted from; see `model_tensors`
RENAMED_CACHES = {"speed.json": "kernels.json"}  # name in BASE: name in NEW
RENAMED: dict[str, str] = {}  # field of a BASE record: its name in NEW

# Runs in the tree's directory, so that it imports the tree's 'granite4v'. Arguments: the job file, threads, options as
# JSON.
DRIVER = """
import json, sys, granite4v
jobs, n_threads, options = json.load(open(sys.argv[1])), int(sys.argv[2]), json.loads(sys.argv[3])
with granite4v.load(n_threads=n_threads, device="cpu") as model:
    for i, job in enumerate(jobs, 1):
        arguments = {name: job[name] for name in ("schema", "max_tokens", "out")}
        n = sum(1 for _ in granite4v.extract(job["files"], job["tasks"], model=model, **arguments, **options))
        print(f"{i} of {len(jobs)} jobs, {n} records", file=sys.stderr, flush=True)
    print(json.dumps({"package": granite4v.__file__, "settings": model.settings}))
"""


@dataclass(frozen=True)
class Job:
    """One call of `granite4v.extract`."""

    files: list[str]
    tasks: list[str]
    max_tokens: int
    out: str
    schema: dict[str, Any] | None = None


@dataclass
class Comparison:
    """The result of comparing two sets of records."""

    n_records: int = 0
    n_same: int = 0
    missing: list[str] = field(default_factory=list)
    different: list[dict[str, Any]] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="checkout to compare with")
    parser.add_argument("new", type=Path, help="checkout that is compared")
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of how pages are put into files")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--base-options", default="{}", metavar="JSON", help="further arguments of BASE's extract")
    parser.add_argument("--new-options", default="{}", metavar="JSON", help="further arguments of NEW's extract")
    parser.add_argument("--work", type=Path, help="keep documents and results in this directory")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        work = (options.work or Path(directory)).absolute()
        questions = list(held_out(-(-options.documents // GROUPS)))
        files = draw_files(work / "documents", questions, random.Random(options.seed))
        sides = {}
        for name, tree, extra in (
            ("base", options.base, options.base_options),
            ("new", options.new, options.new_options),
        ):
            if name == "new":
                copy_measurements(work / "base" / "cache", work / "new" / "cache")
            sides[name] = run(tree.absolute(), work / name, list(jobs(files, work / name)), options.threads, extra)
        found = compare(read_records(work / "base"), read_records(work / "new"))
        base_model, new_model = (model_tensors(work / name / "cache") for name in ("base", "new"))
    for one in found.different:
        print(json.dumps(one, ensure_ascii=False), file=sys.stderr)
    result = {
        "documents": len(questions),
        "files": len(files),
        "suffixes": dict(Counter(file.path.suffix for file in files)),
        "same_model": base_model == new_model,
        **asdict(found),
        **sides,
    }
    print(json.dumps(result))
    return 1 if found.different or found.missing or not found.n_records or base_model != new_model else 0


@dataclass(frozen=True)
class DrawnFile:
    """One file, the kind of its pages, and the schema of a form."""

    path: Path
    kind: str
    schema: dict[str, Any] | None


def draw_files(folder: Path, questions: Sequence[Question], rng: random.Random) -> list[DrawnFile]:
    """Writes held-out documents to files: in turn PDFs and TIFFs of several pages, and single images.

    Each form has its own schema, and therefore its own file.
    """
    folder.mkdir(parents=True)
    files: list[DrawnFile] = []
    for kind in dict.fromkeys(kind for kind, _, _ in ASKED):
        of_kind = [question for question in questions if question.document.kind == kind]
        suffixes = itertools.cycle((".pdf", *IMAGES, ".tiff", *IMAGES))
        while of_kind:
            suffix = next(suffixes)
            pages = of_kind[: 1 if kind == "form" or suffix in IMAGES else rng.randint(2, MAX_PAGES)]
            of_kind = of_kind[len(pages) :]
            path = folder / f"{kind}-{len(files):03}{suffix}"
            save([page.document.picture for page in pages], path)
            files.append(DrawnFile(path, kind, schema_of(pages)))
    return files


def schema_of(pages: Sequence[Question]) -> dict[str, Any] | None:
    truth = pages[0].document.truth
    return formats.form_schema(truth) if isinstance(truth, Form) else None


def save(pages: Sequence[Image.Image], path: Path) -> None:
    options: dict[str, Any] = {"quality": 95} if path.suffix in (".pdf", ".jpg", ".webp") else {}
    if path.suffix in (".pdf", ".tiff"):
        options |= {"save_all": True, "append_images": pages[1:]}
    if path.suffix == ".pdf":
        options["resolution"] = 150
    pages[0].save(path, **options)


def jobs(files: Sequence[DrawnFile], folder: Path) -> Iterator[Job]:
    """Yields the calls that run each task of its kind on every file; each file with a schema is a separate call."""
    for kind, tasks, max_tokens in ASKED:
        of_kind = [file for file in files if file.kind == kind]
        alone = [file for file in of_kind if file.schema is not None]
        together = [str(file.path) for file in of_kind if file.schema is None]
        if together:
            yield Job(together, list(tasks), max_tokens, str(folder / f"{kind}-{tasks[0]}"))
        for file in alone:
            yield Job([str(file.path)], list(tasks), max_tokens, str(folder / file.path.stem), file.schema)


def copy_measurements(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for path in source.glob("*.json"):
        shutil.copy(path, target / RENAMED_CACHES.get(path.name, path.name))


def run(tree: Path, folder: Path, todo: Sequence[Job], n_threads: int, options: str) -> dict[str, Any]:
    """Runs the jobs with a tree's code. Returns which package ran and the settings it chose for this machine."""
    folder.mkdir(parents=True, exist_ok=True)
    job_file = folder / "jobs.json"
    job_file.write_text(json.dumps([asdict(job) for job in todo]), encoding="utf-8")
    command = [sys.executable, "-c", DRIVER, str(job_file), str(n_threads), options]
    environment = {**os.environ, "GRANITE4V_CACHE": str(folder / "cache")}
    print(f"{tree}:", file=sys.stderr, flush=True)
    done = subprocess.run(command, cwd=tree, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(f"the code in '{tree}' ended with status {done.returncode}")
    result = dict(json.loads(done.stdout.splitlines()[-1]))
    if not Path(result["package"]).is_relative_to(tree):
        raise SystemExit(f"'{result['package']}' ran, expected the code in '{tree}'")
    return result


def model_tensors(cache: Path) -> dict[str, tuple[str, str]]:
    """Returns {file and tensor name: (type, SHA-256 of its bytes)} of the models in a cache folder."""
    return {
        f"{path.name} {tensor.name}": (tensor.tensor_type.name, hashlib.sha256(tensor.data.tobytes()).hexdigest())
        for path in sorted(cache.glob("*/*.gguf"))
        for tensor in GGUFReader(path).tensors
    }


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns {output directory, source, page and task: record} of all runs below a folder."""
    records = {}
    for path in sorted(folder.glob("*/results.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            key = f"{path.parent.name} {Path(record['source']).name} page {record['page']} {record['task']}"
            records[key] = record
    return records


def compare(base: dict[str, dict[str, Any]], new: dict[str, dict[str, Any]]) -> Comparison:
    """Compares all fields of all records except `IGNORED`, with BASE's fields renamed by `RENAMED`."""
    found = Comparison(n_records=len(base), missing=sorted(base.keys() ^ new.keys()))
    for key in sorted(base.keys() & new.keys()):
        expected = {RENAMED.get(name, name): value for name, value in base[key].items() if name not in IGNORED}
        actual = {name: value for name, value in new[key].items() if name not in IGNORED}
        names = sorted(
            name
            for name in expected.keys() | actual.keys()
            if expected.get(name, KeyError) != actual.get(name, KeyError)
        )
        if names:
            found.different.append({"record": key, "fields": names, **first_difference(expected, actual)})
        else:
            found.n_same += 1
    return found


def first_difference(base: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Returns where the texts of two answers start to differ, with some context; empty when they are the same."""
    one, other = str(base.get("text", "")), str(new.get("text", ""))
    if one == other:
        return {}
    shorter = min(len(one), len(other))
    at = next((i for i in range(shorter) if one[i] != other[i]), shorter)
    return {"at": at, "base": one[max(0, at - 20) : at + 40], "new": other[max(0, at - 20) : at + 40]}


if __name__ == "__main__":
    sys.exit(main())
