"""Sampling options: their types."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from granite4v.runtime import GenerationOptions, Sampling


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": "1"}, "temperature is '1'; expected a number."),
        ({"top_p": None}, "top_p is None; expected a number."),
        ({"top_k": 2.5}, "top_k is 2.5; expected an integer."),
        ({"seed": "a"}, "seed is 'a'; expected an integer or None."),
        ({"seed": True}, "seed is True; expected an integer or None."),
    ],
)
def test_options_of_another_type(options: dict[str, Any], message: str) -> None:
    for made in (Sampling, GenerationOptions):
        with pytest.raises(TypeError) as found:
            made(**options)
        assert str(found.value) == message


def test_numbers_of_numpy_count() -> None:
    assert Sampling(temperature=np.float32(0.5), top_k=np.int64(3), seed=np.uint8(7)).temperature == 0.5  # type: ignore
