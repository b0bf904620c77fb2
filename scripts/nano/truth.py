"""The contents of a synthetic document: exactly what a reader of its image should return."""

from __future__ import annotations

from dataclasses import dataclass

HELD_OUT_SEEDS = 1_000_000_000  # documents with seeds from here on are never trained on


@dataclass(frozen=True)
class Cell:
    """One table cell; `row` and `col`, from 0, are its top left slot of the grid."""

    row: int
    col: int
    text: str
    rowspan: int = 1
    colspan: int = 1
    header: bool = False


@dataclass(frozen=True)
class Table:
    """A rectangular grid, covered by `cells` in reading order without gap or overlap; empty cells have empty text."""

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
    """A form or an invoice: fields as (name, value). Names are snake_case; the value of an absent field is None."""

    title: str
    fields: tuple[tuple[str, str | None], ...]
