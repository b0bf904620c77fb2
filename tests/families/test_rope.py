"""Factors of rotary frequencies equal transformers', up to the last bit of float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from granite4v.families.hf_fields import Fields
from granite4v.families.rope import Rope

PUBLISHED = {
    "Llama 3.1 and 3.2 Vision 11B": (5e5, 128, 8.0, 1.0, 4.0, 8192),
    "Llama 3.2 1B": (5e5, 64, 32.0, 1.0, 4.0, 8192),
    "Llama 4 Scout": (5e5, 128, 16.0, 1.0, 1.0, 8192),
    "of the tests": (5e5, 16, 8.0, 1.0, 4.0, 64),
    "odd numbers": (1e6, 80, 3.0, 0.7, 5.0, 1000),
}


@pytest.mark.parametrize("numbers", PUBLISHED.values(), ids=PUBLISHED)
def test_scaled_frequencies_are_transformers(numbers: tuple[float, int, float, float, float, int]) -> None:
    """Where no float32 divisor gives exactly their frequency, the nearest one is used: one unit in the last place
    off."""
    theta, head_dim, factor, low, high, context = numbers
    scaling = {"rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": low}
    scaling |= {"high_freq_factor": high, "original_max_position_embeddings": context}
    config = LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, max_position_embeddings=65536, rope_parameters=scaling
    )
    expected = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0].numpy()
    factors = Rope.read(Fields({"rope_parameters": scaling}, "config.json", ""), head_dim).factors
    assert factors is not None
    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim)
    ulps = (plain.numpy() / np.float32(factors)).view(np.int32) - expected.view(np.int32)
    is_sloped = ~np.isin(factors, (1, factor))
    assert np.abs(ulps).max() <= 1 and not ulps[~is_sloped].any()
    assert is_sloped.any() == (low < high)
    assert np.count_nonzero(ulps) <= max(1, is_sloped.sum() // 4)


@pytest.mark.parametrize("tiny", [1e-39, 1e-50, 1e-300])
def test_absurd_numbers_have_factors(tiny: float) -> None:
    for change in ({"high_freq_factor": tiny}, {"original_max_position_embeddings": tiny}):
        scaling = {"rope_type": "llama3", "factor": 1e12, "low_freq_factor": 0, "high_freq_factor": tiny}
        scaling |= {"original_max_position_embeddings": 64, **change}
        factors = Rope.read(Fields({"rope_parameters": scaling}, "config.json", ""), 16).factors
        assert factors is not None and np.isfinite(factors).all() and min(factors) >= 1
