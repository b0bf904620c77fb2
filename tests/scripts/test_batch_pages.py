"""The script that measures pages per hour computes its figures correctly; what it runs is tested elsewhere."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from scripts import batch_pages
from scripts.batch_pages import Contestant, contestants, draw_files, rates, ratios


def options(**changes: Any) -> argparse.Namespace:
    given: dict[str, Any] = {
        "pages": 6,
        "parallel": "auto,1",
        "drafting": False,
        "base": None,
        "base_pages": None,
        "peer_python": None,
        "peer_pages": None,
        "slots": "4,8",
    }
    return argparse.Namespace(**{**given, **changes})


def test_contestants() -> None:
    ours = [contestant.name for contestant in contestants(options(drafting=True))]
    assert ours == ["ours auto", "ours auto, drafting", "ours 1", "ours 1, drafting"]
    others = contestants(options(parallel="", base=Path("old"), base_pages=2, peer_python=Path("py"), peer_pages=8))
    assert [(one.name, one.n_pages, one.n_parallel) for one in others] == [
        ("base", 2, None),
        ("llama-server 4", 8, 4),
        ("llama-server 8", 8, 8),
    ]
    assert [one.is_base for one in others] == [True, False, False]


def test_rates_by_hand() -> None:
    found = rates(Contestant("ours 4", 3), 90.0, 1800, 30.0)
    assert found == {"pages": 3, "seconds": 90.0, "pages_per_hour": 120.0, "tokens_per_page": 600, "decode_tok_s": 30.0}
    assert rates(Contestant("llama-server 4", 3), 90.0, 1800, None)["decode_tok_s"] is None


def test_ratios_are_of_this_tree_to_the_others() -> None:
    ours = {"pages_per_hour": 120.0, "decode_tok_s": 30.0, "peak_rss_gb": 4.0}
    base = {"pages_per_hour": 60.0, "decode_tok_s": 12.0, "peak_rss_gb": 3.0}
    peer = {"pages_per_hour": 100.0, "decode_tok_s": None, "peak_rss_gb": 5.5}
    assert ratios({"ours 4": ours, "ours 1": base, "base": base, "llama-server 2": peer}) == {
        "ours 4 / base": {"pages_per_hour": 2.0, "decode_tok_s": 2.5, "peak_rss_more_gb": 1.0},
        "ours 4 / llama-server 2": {"pages_per_hour": 1.2, "decode_tok_s": None, "peak_rss_more_gb": -1.5},
        "ours 1 / base": {"pages_per_hour": 1.0, "decode_tok_s": 1.0, "peak_rss_more_gb": 0.0},
        "ours 1 / llama-server 2": {"pages_per_hour": 0.6, "decode_tok_s": None, "peak_rss_more_gb": -2.5},
    }


def test_pages_are_distinct_and_of_the_size_that_was_asked_for(tmp_path: Path) -> None:
    for name in ("text-F16.gguf", "mmproj-F16.gguf"):
        (tmp_path / name).touch()
    files = draw_files(tmp_path, options(model=tmp_path, mmproj=None, size=(340, 440), pages=3))
    pictures = [Image.open(path) for path in files.pages]
    assert [picture.size for picture in pictures] == [(340, 440)] * 3
    assert len({picture.tobytes() for picture in pictures}) == 3
    assert (files.text, files.mmproj) == (str(tmp_path / "text-F16.gguf"), str(tmp_path / "mmproj-F16.gguf"))
    (tmp_path / "text-Q8_0.gguf").touch()
    with pytest.raises(SystemExit, match="holds 2 text and 1 vision files"):
        batch_pages.find_files(tmp_path, None)
