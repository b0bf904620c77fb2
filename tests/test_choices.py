"""The values that `Literal` types offer are those that the tables behind them know."""

from __future__ import annotations

from typing import get_args

from granite4v import choices
from granite4v.ggml.autotune import INT8_TYPES
from granite4v.ggml.backend import DEVICES
from granite4v.runtime.extract.document_files import FORMATS


def test_types_and_tables_agree() -> None:
    assert get_args(choices.Device) == DEVICES
    assert get_args(choices.Format) == FORMATS
    assert get_args(choices.VisionCompute) == ("file", "BF16", "int8", *INT8_TYPES)
