"""`granite4v bench`: one JSON line at the end of stdout, figures of each run on stderr."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from granite4v.cli.bench import Together, report
from granite4v.cli.main import app
from granite4v.ggml.build import installed_build
from granite4v.runtime import Timings
from tests.helpers.pictures import text_picture
from tests.toy.spec import PRESETS


@pytest.fixture(scope="module")
def folder(make_model: Callable[..., Path]) -> Path:
    return make_model(PRESETS["tiny"])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "page.png"
    text_picture((150, 100)).save(path)
    return path


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_bench_ends_with_one_json_line(folder: Path, page: Path) -> None:
    result = run("bench", "--model", folder, "--image", page, "--max-tokens", 5, "--repeat", 2)
    assert result.exit_code == 0
    *before, last = result.stdout.splitlines()
    assert before == []
    found = json.loads(last)
    for name in ("encode_s", "prefill_s", "decode_tok_s", "peak_rss_gb"):
        assert found[name] > 0, name
    assert found["predicted"] == 5 and found["prompt_tokens"] > found["image_tokens"] > 0
    assert found["settings"]["n_threads"] >= 1
    assert found["build"] == {**asdict(installed_build()), "features": list(installed_build().features)}
    assert result.stderr.count("image tokens: encode") == 2


def test_answers_at_once_are_compared_with_one(make_model: Callable[..., Path], page: Path) -> None:
    halves = make_model(PRESETS["tiny"], "F16", "F16")  # float32 files are answered one at a time
    result = run("bench", "--model", halves, "--image", page, "--max-tokens", 6, "--parallel", 3, "--repeat", 2)
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    both = found["parallel"]
    assert (both["n"], both["predicted"]) == (3, [6, 6, 6])
    assert 6 <= both["n_steps"] < 18
    assert both["ratio"] > 0 and both["decode_tok_s"] > 0 and len(both["ratio_range"]) == 2
    assert found["settings"]["n_parallel"] == 3 and found["predicted"] == 6
    assert result.stderr.count("3 answers at once: decode") == 2


def test_tokens_of_answers_at_once_are_those_of_all_by_the_time_of_all_steps() -> None:
    alone = [Timings(decode_s=1.0, n_decoded=10), Timings(decode_s=2.0, n_decoded=10)]
    both = Together((Timings(decode_s=1.0, n_decoded=10), Timings(decode_s=1.5, n_decoded=30)), 32, 2.0)
    assert both.decode_tok_s == 20.0
    assert both.line(10.0) == "2 answers at once: decode 20.00 tokens/s in 32 steps, 2.00 times one answer"
    assert report(alone, {}, [both, both])["parallel"] == {
        "n": 2,
        "decode_tok_s": 20.0,
        "decode_tok_s_range": [20.0, 20.0],
        "ratio": 3.0,
        "ratio_range": [2.0, 4.0],
        "n_steps": 32,
        "predicted": [10, 30],
    }
    assert "parallel" not in report(alone, {})


def test_quantizing_in_memory_is_said_and_recorded(folder: Path, page: Path) -> None:
    result = run("bench", "--model", folder, "--image", page, "--max-tokens", 1, "--json", "--vision-compute", "Q8_0")
    assert json.loads(result.stdout)["settings"]["vision_compute"] == "Q8_0"
    assert result.stderr.startswith("note: the vision file's matrices are quantized to Q8_0 in memory")
    asked = run("ask", page, "What?", "--model", folder, "--max-tokens", 1, "--vision-compute", "Q8_0")
    assert "note: the vision file's matrices are quantized to Q8_0 in memory" in asked.stderr
    assert "quantized" not in run("ask", page, "What?", "--model", folder, "--max-tokens", 1).stderr


def test_bench_with_json_says_nothing_else(folder: Path, page: Path) -> None:
    result = run("bench", "--model", folder, "--image", page, "--max-tokens", 1, "--json")
    assert json.loads(result.stdout) and result.stderr == ""


def test_the_report_has_medians_and_spread() -> None:
    runs = [
        Timings(encode_s=s, prefill_image_s=1, prefill_text_s=2, decode_s=2.0, n_decoded=4, n_prompt=9, n_image=5)
        for s in (3.0, 1.0, 2.0)
    ]
    found = report(runs, {"n_threads": 2})
    assert (found["encode_s"], found["encode_s_range"], found["decode_tok_s"]) == (2.0, [1.0, 3.0], 2.0)
    assert (found["prefill_s"], found["prompt_tokens"], found["settings"]) == (1.0, 9, {"n_threads": 2})
    assert "encode_s_range" not in report(runs[:1], {})
    assert report(runs[:2], {})["encode_s"] == 2.0  # the mean of 1 and 3
