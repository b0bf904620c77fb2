"""The tokenizer and template with which all samples are written."""

from __future__ import annotations

import pytest

from scripts.nano.samples import Prompter


@pytest.fixture(scope="session")
def prompter() -> Prompter:
    return Prompter()
