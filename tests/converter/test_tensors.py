"""The tensor tables: exactly one per family."""

from __future__ import annotations

from granite4v.converter.tensors import VISION_TABLES
from granite4v.families.registry import FAMILIES


def test_every_family_has_a_table() -> None:
    assert set(VISION_TABLES) == {family.name for family in FAMILIES}
