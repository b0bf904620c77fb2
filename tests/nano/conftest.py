"""The tokenizer and template that all samples are written with."""

from __future__ import annotations

import pytest

from scripts.nano.samples import Prompter


@pytest.fixture(scope="session")
def prompter() -> Prompter:
    return Prompter()
