"""Callbacks that validate option values beyond their type and limits."""

from __future__ import annotations

import math

import typer


def finite(value: float) -> float:
    """Callback of float options that refuses infinity and 'nan', which passes every comparison with a limit."""
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def given_finite(value: float | None) -> float | None:
    """Like `finite`, for an option that may be left out."""
    return value if value is None else finite(value)


def unicode_text(value: str | None) -> str | None:
    """Callback of options whose text will be encoded. Refuses bytes that are not UTF-8, which Python passes on as lone
    surrogates."""
    try:
        (value or "").encode()
    except UnicodeEncodeError:
        raise typer.BadParameter("it holds bytes that are not UTF-8.") from None
    return value
