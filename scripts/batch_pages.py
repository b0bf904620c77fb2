"""Measures pages an hour of `granite4v extract` by answers at once, against another checkout and llama-server's slots.

    python -m scripts.batch_pages build/full-model --pages 8 --parallel auto,4
    python -m scripts.batch_pages build/full-model --base ../before --peer-python venv/bin/python --slots 4,8

Pages are distinct drawings of 1700 x 2200 px in PNG files; each of `--tasks` is asked about every page, without
grammars. Contestants run one after another, each in its own process. The clock runs from the opened model to the last
record, without the reading of weights; a small page that is not counted fills the cache of measurements before.
'--drafting' adds contestants that draft. Random weights generate loops, which favour drafting, so only the ratios
without it are meaningful.

BASE is a checkout without '--parallel'. The peer is llama-server from the Python package xllamacpp, run by an
interpreter that has it (see scripts/llama_server.py). It gets the same questions about the same pixels, and generates
as many tokens for each as this tree did. Slow contestants may read fewer pages ('--base-pages', '--peer-pages'); their
rate is then measured over those, so give the peer a multiple of its slots.

'decode_tok_s' is generated tokens divided by all seconds that were not spent on images and prompts. The last line on
stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from scripts.compare_records import copy_measurements
from scripts.draw_page import draw_page
from scripts.measuring import run_json

ROOT = Path(__file__).parents[1]
SERVER = Path(__file__).parent / "llama_server.py"
TASKS = ("tables_html", "tables_json", "chart2csv")
SMALL_PX = 200  # side of the page that is not counted
Json = dict[str, Any]

# Runs in a tree's directory, so that it imports the tree's 'granite4v'. Argument: the job file.
DRIVER = """
import json, re, sys, time, granite4v
job = json.load(open(sys.argv[1]))
run = granite4v.extract(job["pages"], job["tasks"], model=job["text"], mmproj=job["mmproj"], unconstrained=True,
                        max_tokens=job["max_tokens"], n_threads=job["threads"], device="cpu", **job["options"])
with run:
    begin, records = time.perf_counter(), []
    for record in run:
        if record.error is not None:
            sys.exit(record.error)
        records.append({"page": job["pages"].index(record.source), "task": record.task, "text": record.text,
                        "finish_reason": record.finish_reason, "timings": record.timings})
        print(f"{len(records)} records, {time.perf_counter() - begin:.1f} s", file=sys.stderr, flush=True)
        counters = getattr(run.model, "counters", None)  # the model is closed behind the last record
    seconds = time.perf_counter() - begin
    n_parallel = getattr(run.model, "n_parallel", 1)
peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())
print(json.dumps({"seconds": seconds, "records": records, "n_parallel": n_parallel,
                  "n_steps": None if counters is None else counters.n_steps,
                  "package": granite4v.__file__, "peak_rss_gb": int(peak[1]) * 1024 / 1e9}))
"""
# Prints the prompt that 'granite4v' renders for each task. Arguments: text, mmproj, image, tasks.
RENDER = """
import json, sys, granite4v
with granite4v.load(sys.argv[1], mmproj=sys.argv[2], device="cpu") as model:
    print(json.dumps({"prompts": [model.prepare(f"<{task}>", [sys.argv[3]]).text for task in sys.argv[4].split(",")]}))
"""


@dataclass(frozen=True)
class Files:
    """The model's files and the pages."""

    text: str
    mmproj: str
    pages: tuple[str, ...]
    small: str


@dataclass(frozen=True)
class Contestant:
    """One program to measure. `tree`: a checkout, or None for llama-server with `n_parallel` slots."""

    name: str
    n_pages: int
    tree: Path | None = None
    n_parallel: int | None = None
    drafting: bool = False
    is_base: bool = False


def main() -> int:
    options = parse_arguments()
    with tempfile.TemporaryDirectory() as directory:
        work = (options.work or Path(directory)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        files = draw_files(work, options)
        found: dict[str, Json] = {}
        asked: list[list[int]] = []  # tokens of each answer of this tree, by page and task
        for contestant in contestants(options):
            print(f"{contestant.name}: {contestant.n_pages} pages", file=sys.stderr, flush=True)
            if contestant.tree is None:
                found[contestant.name] = run_server(contestant, files, options, work, asked)
            else:
                found[contestant.name], counts = run_tree(contestant, files, options, work)
                if not contestant.is_base and contestant.n_pages == options.pages:
                    asked = asked or counts
            told = {key: value for key, value in found[contestant.name].items() if key != "answers"}
            print(f"{contestant.name}: {json.dumps(told)}", file=sys.stderr, flush=True)
    result = {"model": str(options.model), "tasks": options.tasks, "max_tokens": options.max_tokens}
    result |= {"size_px": list(options.size), "threads": options.threads, "contestants": found}
    print(json.dumps({**result, "ratios": ratios(found)}))
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a model directory, or a text GGUF with --mmproj")
    parser.add_argument("--mmproj", type=Path)
    parser.add_argument("--pages", type=int, default=24)
    parser.add_argument("--tasks", default=",".join(TASKS), help=f"of every page ({','.join(TASKS)})")
    parser.add_argument("--max-tokens", type=int, default=300, help="of an answer (300)")
    parser.add_argument("--parallel", default="auto", help="answers at once, several with commas; '' for none (auto)")
    parser.add_argument("--drafting", action="store_true", help="also with drafting")
    parser.add_argument("--base", type=Path, metavar="DIR", help="a checkout without --parallel")
    parser.add_argument("--base-pages", type=int, help="(as --pages)")
    parser.add_argument("--peer-python", type=Path, help="an interpreter with xllamacpp")
    parser.add_argument("--slots", default="4", help="of llama-server, several with commas (4)")
    parser.add_argument("--peer-pages", type=int, help="(as --pages)")
    parser.add_argument("--peer-ctx", type=int, default=4096, help="positions of a slot (4096)")
    parser.add_argument("--peer-plain-weights", action="store_true", help="without llama.cpp's special weight buffers")
    parser.add_argument("--size", default="1700x2200", help="of a page, in pixels (1700x2200)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, help="keep pages, caches and jobs here, and use caches that are here")
    options = parser.parse_args()
    options.size = tuple(int(side) for side in options.size.split("x"))
    if options.peer_python and not options.parallel:
        parser.error("the peer generates as many tokens as this tree: give --parallel")
    return options


def contestants(options: argparse.Namespace) -> list[Contestant]:
    found = []
    for text in filter(None, options.parallel.split(",")):
        n = None if text == "auto" else int(text)
        for drafting in (False, True) if options.drafting else (False,):
            name = f"ours {text}{', drafting' if drafting else ''}"
            found.append(Contestant(name, options.pages, ROOT, n, drafting))
    if options.base:
        found.append(Contestant("base", options.base_pages or options.pages, options.base.absolute(), is_base=True))
    if options.peer_python:
        n_pages = options.peer_pages or options.pages
        found += [Contestant(f"llama-server {n}", n_pages, None, int(n)) for n in options.slots.split(",")]
    return found


# --- pages ---


def draw_files(work: Path, options: argparse.Namespace) -> Files:
    """Draws the pages. They differ in a number, so that none is a copy of another."""
    text, mmproj = find_files(options.model, options.mmproj)
    picture = draw_page()
    pages = []
    for i in range(max(contestant.n_pages for contestant in contestants(options))):
        page = picture.copy()
        ImageDraw.Draw(page).text((1000, 1500), f"Sheet {i + 1}", fill=0, font=ImageFont.load_default(90))
        pages.append(save(page.resize(options.size, Image.Resampling.LANCZOS), work / f"page-{i + 1:03}.png"))
    small = save(picture.resize((SMALL_PX, SMALL_PX)), work / "small.png")
    return Files(str(text.absolute()), str(mmproj.absolute()), tuple(pages), small)


def save(page: Image.Image, path: Path) -> str:
    page.save(path)
    return str(path)


def find_files(model: Path, mmproj: Path | None) -> tuple[Path, Path]:
    """Returns the text file and the vision file, found by the names that our converter gives them."""
    if model.is_file() and mmproj is not None:
        return model, mmproj
    texts, visions = sorted(model.glob("text-*.gguf")), [mmproj] if mmproj else sorted(model.glob("mmproj-*.gguf"))
    if len(texts) != 1 or len(visions) != 1:
        raise SystemExit(f"'{model}' holds {len(texts)} text and {len(visions)} vision files; expected one of each.")
    return texts[0], visions[0]


# --- contestants ---


def run_tree(
    contestant: Contestant, files: Files, options: argparse.Namespace, work: Path
) -> tuple[Json, list[list[int]]]:
    """Runs `extract` of a checkout. Returns its figures, and the number of tokens of each answer, by page and task."""
    assert contestant.tree is not None
    extra: Json = {} if contestant.is_base else {"parallel": contestant.n_parallel, "drafting": contestant.drafting}
    tasks = options.tasks.split(",")
    job = {"text": files.text, "mmproj": files.mmproj, "tasks": tasks, "threads": options.threads, "options": extra}
    cache = work / ("cache-base" if contestant.is_base else "cache")
    if not cache.exists():
        if contestant.is_base and (work / "cache").exists():
            copy_measurements(work / "cache", cache)
        drive(contestant.tree, {**job, "pages": [files.small], "max_tokens": 2}, cache, work)
    job |= {"pages": list(files.pages[: contestant.n_pages]), "max_tokens": options.max_tokens}
    ran = drive(contestant.tree, job, cache, work)
    if not Path(ran["package"]).is_relative_to(contestant.tree):
        raise SystemExit(f"'{ran['package']}' ran, expected the code in '{contestant.tree}'")
    timings = [record["timings"] for record in ran["records"]]
    total = {name: sum(one.get(name, 0) for one in timings) for name in SUMMED}
    prompts_s = total["encode_s"] + total["prefill_image_s"] + total["prefill_text_s"]
    figures = rates(contestant, ran["seconds"] - total["load_s"], total["n_generated"], prompts_s)
    reasons = [record["finish_reason"] for record in ran["records"]]
    counts = {(record["page"], record["task"]): record["timings"]["n_generated"] for record in ran["records"]}
    told = {
        "n_parallel": ran["n_parallel"],
        "steps": ran["n_steps"] or total["n_generated"] - len(timings),  # of all answers together
        "peak_rss_gb": round(ran["peak_rss_gb"], 3),
        "n_prompt": [one["n_prompt"] for one in timings[: len(tasks)]],
        "ended": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
        **{name: round(total[name], 2) for name in SUMMED},
    }
    texts = hashlib.sha256("\n".join(record["text"] for record in ran["records"]).encode()).hexdigest()[:16]
    by_page = [[counts[page, task] for task in tasks] for page in range(contestant.n_pages)]
    return {**figures, **told, "texts": texts}, by_page


SUMMED = (
    *("load_s", "encode_s", "prefill_image_s", "prefill_text_s", "decode_s"),
    *("n_generated", "n_drafted", "n_accepted", "n_encoded"),
)


def drive(tree: Path, job: Json, cache: Path, work: Path) -> Json:
    path = work / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    return run_shown([sys.executable, "-c", DRIVER, str(path)], tree, {**os.environ, "GRANITE4V_CACHE": str(cache)})


def run_shown(command: Sequence[str], tree: Path, environment: dict[str, str]) -> Json:
    """Runs a program and returns the JSON object on its last line of output. Its stderr is shown."""
    done = subprocess.run(command, cwd=tree, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(f"status {done.returncode} from {command[0]} in '{tree}'")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run_server(
    contestant: Contestant, files: Files, options: argparse.Namespace, work: Path, asked: list[list[int]]
) -> Json:
    """Runs llama-server with the same questions and as many tokens. Returns its figures."""
    environment = {**os.environ, "GRANITE4V_CACHE": str(work / "cache")}
    render = [sys.executable, "-c", RENDER, files.text, files.mmproj, files.pages[0], options.tasks]
    texts = run_json(render, ROOT, environment)["prompts"]
    job = {
        "text": files.text,
        "mmproj": files.mmproj,
        "slots": contestant.n_parallel,
        "threads": options.threads,
        "ctx": options.peer_ctx,
        "pages": list(files.pages[: contestant.n_pages]),
        # libmtmd adds a line break after an image, as the template does
        "prompts": [text.replace("<image>\n", "{media}") for text in texts],
        "n_predict": (asked * contestant.n_pages)[: contestant.n_pages],
        "plain_weights": options.peer_plain_weights,
    }
    path = work / "server.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    ran = run_shown([str(options.peer_python), str(SERVER), str(path)], work, dict(os.environ))
    answers = ran["answers"]
    return {
        **rates(contestant, ran["seconds"], sum(one["n_generated"] for one in answers), None),
        "n_parallel": contestant.n_parallel,
        "peak_rss_gb": round(ran["peak_rss_gb"], 3),
        "n_prompt": [one["n_prompt"] for one in answers[: len(texts)]],
        "n_reused": [one["n_reused"] for one in answers[: len(texts)]],
        "version": ran["version"],
        "system": ran["system"],
    }


def rates(contestant: Contestant, seconds: float, n_generated: int, prompts_s: float | None) -> Json:
    decode_s = None if prompts_s is None else seconds - prompts_s
    return {
        "pages": contestant.n_pages,
        "seconds": round(seconds, 2),
        "pages_per_hour": round(3600 * contestant.n_pages / seconds, 2),
        "tokens_per_page": round(n_generated / contestant.n_pages, 1),
        "decode_tok_s": None if decode_s is None else round(n_generated / decode_s, 2),
    }


def ratios(found: dict[str, Json]) -> Json:
    """Compares this tree's contestants with all others: ratios of pages an hour and tokens a second, extra peak GB."""
    result: Json = {}
    for name, ours in found.items():
        if not name.startswith("ours"):
            continue
        for other, theirs in found.items():
            if other.startswith("ours"):
                continue
            both = ours["decode_tok_s"], theirs["decode_tok_s"]
            result[f"{name} / {other}"] = {
                "pages_per_hour": round(ours["pages_per_hour"] / theirs["pages_per_hour"], 3),
                "decode_tok_s": None if both[1] is None else round(both[0] / both[1], 3),
                "peak_rss_more_gb": round(ours["peak_rss_gb"] - theirs["peak_rss_gb"], 3),
            }
    return result


if __name__ == "__main__":
    sys.exit(main())
