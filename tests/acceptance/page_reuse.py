"""Several tasks on a page cost one encoding and one prefill of the page, and get the same answers as alone.

python -m tests.acceptance.page_reuse [IMAGE]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import granite4v
from tests.acceptance.harness import FORM, Json, Result, in_new_process, options_parser, ratio, run_check, tell
from tests.acceptance.pages import draw_page, on_letter

TASKS: tuple[str, ...] = ("tables_html", "tables_otsl", "chart2csv")
COUNTS = ("n_image", "n_prompt", "n_encoded", "n_reused", "n_generated")
PARTS = {
    "page_s": ("encode_s", "prefill_image_s"),
    "all_s": ("encode_s", "prefill_image_s", "prefill_text_s", "decode_s", "constraint_s"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = options_parser(__doc__ or "", max_tokens=48)
    parser.add_argument("image", type=Path, nargs="?", help="an image; by default one is drawn")
    parser.add_argument("--task", action="append", help=f"by default {', '.join(TASKS)}")
    parser.add_argument("--runs", type=int, default=3, help="of which medians of the time are told (3)")
    return run_check(page_reuse, parser.parse_args(arguments))


def page_reuse(options: argparse.Namespace, work: Path) -> Result:
    """Compares all tasks in one process with each task in its own process; loading the model is not counted."""
    tasks, image = tuple(options.task or TASKS), options.image
    if image is None:
        image = work / "page.png"
        on_letter(draw_page(0, options.seed, "table").picture, 850).save(image)

    def read(names: tuple[str, ...]) -> list[Json]:
        return in_new_process(read_page, image, names, options.model, options.max_tokens, options.threads)

    read(tasks[:1])  # warms up: one-time measurements of the machine are done, and files are in the page cache
    runs = []
    for number in range(options.runs):
        runs.append({"together": read(tasks), "apart": [record for task in tasks for record in read((task,))]})
        tell(f"run {number + 1} of {options.runs}: {_told(_seconds(runs[-1:], 'all_s'))}")
    figures: Json = {
        "tasks": list(tasks),
        "apart": "a process for each task; loading the model is left out",
        "runs": options.runs,
        **{what: {side: [_timing(one, what) for one in found] for side, found in runs[0].items()} for what in COUNTS},
        **{what: _seconds(runs, what) for what in PARTS},
    }
    encoded, reused = figures["n_encoded"], figures["n_reused"]
    lines = [
        f"together {sum(encoded['together'])} picture encoded and {reused['together']} prompt tokens reused, "
        f"apart {sum(encoded['apart'])} and {reused['apart']}",
        f"encoding and prefill of the page: {_told(figures['page_s'])}",
        f"all but loading: {_told(figures['all_s'])}",
    ]
    return Result("page_reuse", figures, lines, share_problems(runs[0]))


def _told(one: Json) -> str:
    return f"{one['together']} s together, {one['apart']} s apart, ratio {one['ratio']}"


def share_problems(sides: dict[str, list[Json]]) -> list[str]:
    """Describes how the records of tasks 'together' and 'apart' contradict reading a page once."""
    together, apart = sides["together"], sides["apart"]
    failed = [
        f"{one['task']}, {side}: {one['error']}" for side, found in sides.items() for one in found if one["error"]
    ]
    if failed:
        return failed
    problems = []
    n_encoded = [_timing(one, "n_encoded") for one in together]
    if n_encoded != [1] + [0] * (len(together) - 1):
        problems.append(f"the tasks together encoded {n_encoded} pictures; expected one, for the first")
    for one in together[1:]:
        n_image, n_reused = _timing(one, "n_image"), _timing(one, "n_reused")
        if n_reused < n_image or _timing(one, "prefill_image_s"):
            problems.append(f"{one['task']} reused {n_reused} prompt tokens; expected the page's {n_image} among them")
    problems += [
        f"{one['task']} answers otherwise together than apart: {one['text']!r:.100} and {other['text']!r:.100}"
        for one, other in zip(together, apart, strict=True)
        if (one["text"], one["finish_reason"]) != (other["text"], other["finish_reason"])
    ]
    return problems


def _timing(record: Json, name: str) -> Any:
    return record["timings"].get(name, 0)


def _seconds(runs: list[dict[str, list[Json]]], what: str) -> Json:
    """Returns the medians over the runs."""

    def middle(side: str) -> float:
        return statistics.median(sum(_timing(one, part) for one in run[side] for part in PARTS[what]) for run in runs)

    together, apart = middle("together"), middle("apart")
    return {"together": round(together, 4), "apart": round(apart, 4), "ratio": ratio(together, apart)}


def read_page(image: Path, tasks: tuple[str, ...], model: Path, max_tokens: int, threads: int) -> list[Json]:
    """Returns the records of one run as dictionaries."""
    schema = FORM if "kvp" in tasks else None
    with granite4v.load(model, n_threads=threads) as loaded:
        records = granite4v.extract(image, tasks, model=loaded, schema=schema, max_tokens=max_tokens)
        return [record.as_dict() for record in records]


if __name__ == "__main__":
    sys.exit(main())
