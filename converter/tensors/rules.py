"""The rows of a tensor table: checkpoint name, GGUF name, shape, and how the checkpoint's tensor is transformed.

Plain data. The other files in this folder build tables from a configuration; the converter matches them against a
checkpoint. Names contain `{i}` for the layer; `each_layer` repeats a row for every layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from granite4v.families.base import VisionConfig
from granite4v.families.vision_layout import padded_width

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorRule:
    """One GGUF tensor and where it comes from. Shapes are in NumPy's order, slowest dimension first.

    `source`: name in the checkpoint, without the group's prefix. `shape`: its shape in the checkpoint.
    `rows`: take only rows [first, last) of the source (a fused matrix becomes several tensors).
    `rope_heads`: the number of heads whose rows are reordered, from Hugging Face's two halves to the adjacent pairs
    that llama.cpp's rotary embedding expects: a head of n rows gets the order 0, n/2, 1, n/2+1, ...
    `padded`: the shape in the file if it is larger; the rest is zeros.
    `column_blocks`: split the columns into so many equal blocks, and put them in this order.
    `transposed`: take columns [first, last) of each of the source's matrices `(experts, n_in, n_out)` as rows; the file
    has `(experts, last - first, n_in)`.
    `values`: the tensor itself, one-dimensional, if it is computed from the configuration; the checkpoint then has no
    such tensor, and `source` is a description.
    """

    source: str
    target: str
    shape: Shape
    rows: tuple[int, int] | None = None
    rope_heads: int = 0
    padded: Shape | None = None
    column_blocks: tuple[int, ...] = ()
    transposed: tuple[int, int] | None = None
    values: tuple[float, ...] | None = None

    @property
    def target_shape(self) -> Shape:
        if self.padded is not None:
            return self.padded
        if self.transposed is not None:
            return (self.shape[0], self.transposed[1] - self.transposed[0], self.shape[1])
        if self.rows is not None:
            return (self.rows[1] - self.rows[0], *self.shape[1:])
        return self.shape


@dataclass(frozen=True)
class DropRule:
    """Checkpoint tensors that are left out on purpose. `pattern`: a name, or a prefix followed by `*`."""

    pattern: str
    reason: str

    def matches(self, name: str) -> bool:
        if self.pattern.endswith("*"):
            return name.startswith(self.pattern[:-1])
        return name == self.pattern


@dataclass(frozen=True)
class TensorGroup:
    """Rules that share a prefix. `prefixes`: every spelling found in checkpoints, the current one first."""

    prefixes: tuple[str, ...]
    rules: tuple[TensorRule, ...]
    drops: tuple[DropRule, ...] = ()


def each_layer(n_layers: int, *rows: TensorRule, held: Sequence[int] = ()) -> tuple[TensorRule, ...]:
    """Repeats the rows for every layer, with `{i}` replaced by its number.

    `held`: the layers' numbers in the checkpoint, if they are different.
    """
    return tuple(rule for i, own in enumerate(held or range(n_layers)) for rule in at_layer(i, *rows, held=own))


def at_layer(i: int, *rows: TensorRule, held: int | None = None) -> tuple[TensorRule, ...]:
    """The rows for one layer, with `{i}` replaced by its number. `held`: its number in the checkpoint, if different."""
    own = str(i if held is None else held)
    return tuple(
        dataclasses.replace(row, source=row.source.replace("{i}", own), target=row.target.replace("{i}", str(i)))
        for row in rows
    )


def linear(
    source: str, target: str, n_out: int, n_in: int, padded_out: int = 0, padded_in: int = 0
) -> tuple[TensorRule, TensorRule]:
    """Weight and bias of a linear layer. A padded size of 0 leaves that dimension as it is."""
    wide = (padded_out or n_out, padded_in or n_in)
    return (
        TensorRule(
            f"{source}.weight",
            f"{target}.weight",
            (n_out, n_in),
            padded=wide if wide != (n_out, n_in) else None,
        ),
        TensorRule(
            f"{source}.bias",
            f"{target}.bias",
            (n_out,),
            padded=wide[:1] if wide[0] != n_out else None,
        ),
    )


def norm(source: str, target: str, width: int) -> tuple[TensorRule, TensorRule]:
    """Weight and bias of a LayerNorm."""
    return (
        TensorRule(f"{source}.weight", f"{target}.weight", (width,)),
        TensorRule(f"{source}.bias", f"{target}.bias", (width,)),
    )


def zeros(rule: TensorRule) -> TensorRule:
    """The same tensor filled with zeros, for a checkpoint that does not have it."""
    return TensorRule("zeros", rule.target, rule.shape, values=(0.0,) * rule.shape[0])


def padded_config(config: VisionConfig, block: int) -> VisionConfig:
    """The configuration with padded widths, as the tensors of an mmproj file have them."""
    tower = dataclasses.replace(config.tower, intermediate_size=padded_width(config.tower.intermediate_size, block))
    return dataclasses.replace(config, tower=tower)
