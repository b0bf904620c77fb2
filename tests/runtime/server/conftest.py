"""Fixtures: a server with a tiny model, for tests that need no correct answers, and one with the embedded model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import granite4v
from tests.helpers.served import Served, served
from tests.toy.spec import PRESETS


@pytest.fixture(scope="package")
def tiny_model(make_model: Callable[..., Path]) -> Iterator[granite4v.Model]:
    with granite4v.load(make_model(PRESETS["tiny"]), device="cpu", exact=False) as model:
        yield model


@pytest.fixture(scope="package")
def tiny(tiny_model: granite4v.Model) -> Iterator[Served]:
    with served(tiny_model) as server:
        yield server


@pytest.fixture(scope="package")
def nano_model() -> Iterator[granite4v.Model]:
    with granite4v.load() as model:
        yield model


@pytest.fixture(scope="package")
def nano(nano_model: granite4v.Model) -> Iterator[Served]:
    with served(nano_model) as server:
        yield server
