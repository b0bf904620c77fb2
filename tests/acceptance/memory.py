"""Memory stays flat over many pages in one process.

    python -m tests.acceptance.memory --pages 300

Compares resident memory and its peak after the last page with those after an early page.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

import granite4v
from granite4v.cli.bench import peak_rss_gb
from tests.acceptance.harness import Json, Result, in_new_process, options_parser, run_check
from tests.acceptance.pages import make_batch

TASKS = ("tables_html", "chart2csv")
N_TREND, WINDOW = 10, 10


def main(arguments: Sequence[str] | None = None) -> int:
    parser = options_parser(__doc__ or "", max_tokens=16)
    parser.add_argument("--pages", type=int, default=300)
    parser.add_argument("--from-page", type=int, default=20, help="the page that later ones are compared with (20)")
    parser.add_argument("--tolerance", type=float, default=0.05, help="how much more there may be at the end (0.05)")
    parser.add_argument("--width-px", type=int, default=850, help="of the pages, all of one size (850)")
    return run_check(memory, parser.parse_args(arguments), "F16")


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
    """Returns the median of resident memory over the last `WINDOW` pages up to `page`: single values depend on what is
    open at that moment."""
    return round(statistics.median(rss for rss, _ in used[max(0, page - WINDOW) : page]), 2)


def memory_by_page(
    folder: Path, model: Path, out: Path, max_tokens: int, threads: int
) -> list[tuple[float, float | None]]:
    """Returns for each page, in MB (10^6 bytes): resident memory after it, and its peak where the system reports
    one."""
    process, used = psutil.Process(), []
    options: Json = {"out": out, "report": True, "max_tokens": max_tokens, "n_threads": threads}
    for record in granite4v.extract(folder, TASKS, model=model, **options):
        if record.task == TASKS[-1]:
            peak = peak_rss_gb()
            used.append((round(process.memory_info().rss / 1e6, 2), None if peak is None else round(peak * 1e3, 2)))
    return used


if __name__ == "__main__":
    sys.exit(main())
