"""The check of damaged stored pages passes, and detects a damaged page that is used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from granite4v.runtime.engine import state_file
from tests.acceptance import stored_pages
from tests.acceptance.conftest import Ran
from tests.acceptance.stored_pages import DAMAGES


@pytest.mark.slow
def test_every_damage_is_a_miss(side_by_side: Path, run: Callable[..., Ran]) -> None:
    status, told, _ = run(stored_pages.main, "--model", side_by_side, "--corruptions", len(DAMAGES))
    assert (status, told["ok"], sum(told["corruptions"].values())) == (0, True, len(DAMAGES))


@pytest.mark.slow
def test_a_damaged_page_that_is_used_is_noticed(
    side_by_side: Path, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = state_file.read

    def careless(path: Path, key: str) -> np.ndarray:
        """Returns a file's data even if its checksum is wrong."""
        try:
            return read(path, key)
        except state_file.DamagedState as damage:
            if "checksum" not in str(damage):
                raise
            data: Any = np.fromfile(path, dtype=np.uint8)
            n_text = int.from_bytes(data[12:16].tobytes(), "little")
            return data[24 + n_text : -32]

    monkeypatch.setattr(state_file, "read", careless)
    status, told, _ = run(stored_pages.main, "--model", side_by_side, "--corruptions", len(DAMAGES))
    assert status == 1 and any("overwrite" in problem for problem in told["broken"])
