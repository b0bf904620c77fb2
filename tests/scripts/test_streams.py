"""The summary of measured rounds, and one small measurement of this tree."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.streams import Round, common_length, summarize

ROOT = Path(__file__).parents[2]


def test_ratios_and_differences_by_hand() -> None:
    alone = Round(4.0, 8.0, 20, 100, [[1, 2, 3], [4, 5]], ["a", "b"])
    together = Round(3.0, 2.0, 10, 120, [[1, 2, 9], [4, 5]], ["c", "b"])
    found = summarize([(alone, together), (alone, alone), (alone, together)])
    assert found["ratio"] == 0.75
    assert found["ratio_range"] == [0.75, 1.0]
    assert (found["cpu_ratio"], found["cpu_ratio_range"]) == (0.25, [0.25, 1.0])
    assert (found["tokens_alone"], found["tokens_together"]) == (100, 120)
    assert (found["calls_alone"], found["calls_together"]) == (20, 10)
    assert (found["answers"], found["same"], found["first_differences"]) == (6, 4, [2, 2])


@pytest.mark.parametrize(("one", "other", "n"), [([1, 2], [1, 2], 2), ([1], [1, 2], 1), ([3, 2], [1, 2], 0)])
def test_common_length(one: list[int], other: list[int], n: int) -> None:
    assert common_length(one, other) == n


def test_a_measurement_of_this_tree() -> None:
    command = [sys.executable, "-m", "scripts.streams", ".", "--streams", "2", "--max-tokens", "4", "--rounds", "1"]
    done = subprocess.run([*command, "--threads", "1", "--only", "warm"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert Path(result["package"]).is_relative_to(ROOT)
    assert "cold" not in result
    assert result["warm"]["answers"] == 2
    assert result["warm"]["calls_alone"] >= 2 * 3  # the page is cached, and possibly a prompt, too
