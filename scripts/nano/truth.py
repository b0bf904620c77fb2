"""What a synthetic document says: the exact content that a reader of its picture has to give back."""

from __future__ import annotations

from dataclasses import dataclass

HELD_OUT_SEEDS = 1_000_000_000  # documents of seeds from here on are never trained on


@dataclass(frozen=True)
class Cell:
    """One table cell; `row` and `col` count from 0 and name its top left slot of the grid."""

    row: int
    col: int
    text: str
    rowspan: int = 1
    colspan: int = 1
    header: bool = False


@dataclass(frozen=True)
class Table:
    """A rectangular grid that `cells`, in reading order, cover without gap or overlap; empty cells have empty text."""

    n_rows: int
    n_cols: int
    n_header_rows: int
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Chart:
    """A bar, line or pie chart: one value for each label and series, spelled as they are drawn.

    `values[i][j]` belongs to `labels[i]` and `series[j]`; a pie has one series.
    """

    kind: str
    title: str
    axis: str
    labels: tuple[str, ...]
    series: tuple[str, ...]
    values: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Form:
    """A form or an invoice: fields as (name, value); the name is snake_case, an absent field has None."""

    title: str
    fields: tuple[tuple[str, str | None], ...]
