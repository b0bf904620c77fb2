"""Callbacks of options: what a type and its limits alone do not refuse."""

from __future__ import annotations

import math

import typer


def finite(value: float) -> float:
    """A callback of float options: 'nan' passes every comparison with a limit."""
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def given_finite(value: float | None) -> float | None:
    """As `finite`, of an option that may be left out."""
    return value if value is None else finite(value)


def unicode_text(value: str | None) -> str | None:
    """A callback of options whose text is encoded: Python reads bytes that are not UTF-8 as lone surrogates."""
    try:
        (value or "").encode()
    except UnicodeEncodeError:
        raise typer.BadParameter("it holds bytes that are not UTF-8.") from None
    return value
