"""The script that compares concurrent clients with a single one computes its figures correctly."""

from __future__ import annotations

import argparse
import threading
from pathlib import Path

from PIL import Image

from scripts.four_clients import draw_pages, ratios, together


def answer(n_tokens: int) -> dict[str, object]:
    return {"usage": {"completion_tokens": n_tokens}}


def test_ratios_by_hand() -> None:
    ours, theirs = {"one_tok_s": 4.0, "all_tok_s": 8.0}, {"one_tok_s": 2.0, "all_tok_s": 10.0}
    assert ratios({"ours": ours}) == {"all / one": 2.0}
    found = ratios({"ours": ours, "llama-server": theirs})
    assert found == {"all / one": 2.0, "all / llama-server": 0.8, "one / llama-server": 2.0}


def test_all_clients_begin_together() -> None:
    everybody = threading.Barrier(3, timeout=20)

    def ask(client: int) -> dict[str, object]:
        everybody.wait()  # breaks if one client waits for another's answer
        return answer(client)

    seconds, answers = together(3, ask)
    assert [one["usage"] for one in answers] == [{"completion_tokens": i} for i in range(3)] and seconds < 20


def test_no_page_is_a_copy_of_another(tmp_path: Path) -> None:
    pages = draw_pages(tmp_path, argparse.Namespace(clients=3, size=(60, 80)))
    sizes = []
    for page in pages:
        with Image.open(page) as picture:
            sizes.append(picture.size)
    assert sizes == [(60, 80), (61, 80), (62, 80)]
