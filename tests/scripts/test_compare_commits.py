"""Medians and ratios of two trees' figures, and that a tree runs its own code."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.compare_commits import BAR, FIGURES, Tree, compare
from scripts.compare_records import copy_measurements

ONE = dict.fromkeys(FIGURES, 10.0)


def test_medians_ratios_and_pairs_by_hand() -> None:
    base = [{**ONE, "encode_s": value} for value in (1.0, 9.0, 2.0)]
    new = [{**ONE, "encode_s": value} for value in (2.0, 9.0, 1.0)]
    assert compare(base, new)["encode_s"] == {
        "base": 2.0,
        "new": 2.0,
        "ratio": 1.0,
        "pairs": [0.5, 2.0],
        "worse": False,
    }


def test_more_seconds_are_worse_and_more_tokens_a_second_better() -> None:
    beyond = 1 + BAR + 0.001
    slower = compare([ONE], [{**ONE, "encode_s": 10 * beyond, "decode_tok_s": 10 * beyond}])
    assert {name for name, row in slower.items() if row["worse"]} == {"encode_s"}
    fewer = compare([ONE], [{**ONE, "encode_s": 10 / beyond, "decode_tok_s": 10 / beyond}])
    assert {name for name, row in fewer.items() if row["worse"]} == {"decode_tok_s"}


def test_a_tree_runs_its_own_code(tmp_path: Path) -> None:
    package = tmp_path / "granite4v"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(
        "import os, time\nprint('first')\nwhile time.process_time() < 0.1: pass\nprint(os.environ['GRANITE4V_CACHE'])\n"
    )
    line, elapsed, cpu_s = Tree("new", tmp_path, tmp_path / "cache").run("bench")
    assert line == str(tmp_path / "cache")
    assert elapsed > 0
    assert cpu_s > 0.05  # counted in hundredths of a second
    (package / "__main__.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(SystemExit, match="status 3"):
        Tree("new", tmp_path, tmp_path / "cache").run("bench")


def test_measurements_of_the_machine_are_handed_on_under_their_new_name(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "speed.json").write_text("{}")
    (tmp_path / "old" / "trials.json").write_text("[]")
    copy_measurements(tmp_path / "old", tmp_path / "new")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"kernels.json", "trials.json"}
