"""Reads the rotary embedding of a decoder from a checkpoint's `text_config`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from granite4v.errors import CheckpointError
from granite4v.families.fields import single
from granite4v.families.hf_fields import MAX_FACTOR, Fields

MIN_THETA = 1e-3
MIN_FACTOR = 1e-6


@dataclass(frozen=True)
class Rope:
    theta: float
    linear_factor: float | None = None
    factors: tuple[float, ...] | None = None

    @classmethod
    def read(cls, text: Fields, head_dim: int) -> Rope:
        """Reads the rotary embedding of a `text_config`, in today's field names or the older ones. Raises
        CheckpointError."""
        old, new = (text.section(key, {}) for key in ("rope_scaling", "rope_parameters"))
        rope = Fields({**old.values, **new.values}, text.file, new.path if new.values else old.path)
        at = rope if "rope_theta" in rope else text
        theta = at.number("rope_theta", MIN_THETA, MAX_FACTOR, 10000.0)
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "default":
            return cls(theta)
        if kind == "linear":
            return cls(theta, linear_factor=rope.number("factor", 0, MAX_FACTOR, positive=True))
        if kind == "llama3":
            return cls(theta, factors=_llama3_factors(rope, theta, head_dim))
        raise CheckpointError(
            f"text_config has rope type {kind!r}; the types that convert are 'default', 'linear' and 'llama3'."
        )


def _llama3_factors(rope: Fields, theta: float, head_dim: int) -> tuple[float, ...]:
    """The divisor of each pair's frequency: `factor` for long wavelengths, 1 for short ones, interpolated between.

    If both bounds are equal, there is no interpolation, and a wavelength exactly at the bound is divided by 1. Same as
    transformers 5.23, `modeling_rope_utils._compute_llama3_parameters`, including its float32 rounding: at distant
    positions, even a difference in the last bit of a frequency matters.
    """
    factor = rope.number("factor", MIN_FACTOR, MAX_FACTOR)
    context = rope.number("original_max_position_embeddings", 0, MAX_FACTOR, positive=True)
    low, high = (rope.number(key, 0, MAX_FACTOR) for key in ("low_freq_factor", "high_freq_factor"))
    if low > high:
        raise rope.error("high_freq_factor", f"at least 'low_freq_factor' ({low:g})")
    # the range of wavelengths that are interpolated
    shortest, longest = (single(context / bound) if bound else math.inf for bound in (high, low))
    factors = []
    for i in range(0, head_dim, 2):
        frequency = single(1 / single(theta ** single(i / head_dim)))
        wavelength = single(single(2 * math.pi) * single(1 / frequency))
        if wavelength > longest:
            factors.append(factor)
        elif wavelength < shortest or not single(high - low):
            factors.append(1.0)
        else:
            turns = single(single(context) * single(1 / wavelength))
            smooth = single(single(turns - single(low)) / single(high - low))
            scaled = single(single(single(1 - smooth) * frequency) / single(factor))
            factors.append(frequency / single(scaled + single(smooth * frequency)))
    return tuple(factors)
