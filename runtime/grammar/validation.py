"""Validates values against a JSON Schema with jsonschema, in decimal arithmetic and in bounded time.

JSON numbers are decimal: 19.99 is a multiple of 0.01 in decimal arithmetic, but not in floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

from jsonschema import ValidationError, validators
from jsonschema.exceptions import best_match
from referencing import Registry

from granite4v.runtime.grammar import formats
from granite4v.runtime.grammar.json_schema import JsonSchema
from granite4v.runtime.grammar.patterns import PatternTimeout, matches

# keywords applied to values, about a second's worth; self-referencing schemas can take any number
MAX_STEPS = 500_000


class _TooManySteps(Exception):
    pass


class Validator:
    """Validates values against one schema."""

    def __init__(self, schema: JsonSchema) -> None:
        self._n_steps = 0
        kind = _exact(schema.dialect, self._counted)
        self._validator = kind(
            _decimal(schema.content), registry=Registry(), format_checker=formats.checker()
        )  # with an empty registry, nothing is fetched

    def problem(self, value: Any) -> str | None:
        """Why a value is not an instance of the schema; None if it is. Numbers are compared as JSON writes them."""
        self._n_steps = 0
        try:
            error = best_match(self._validator.iter_errors(_decimal(value)))
        except RecursionError:
            return "it is nested too deeply to be checked"
        except _NotFinite as found:
            return f"it contains {found}, which is not a number in JSON"
        except _TooManySteps:
            return f"checking it takes more than {MAX_STEPS:,} steps; make the schema simpler"
        except PatternTimeout as found:
            return f"it cannot be checked: {found}"
        except Exception as found:  # jsonschema wraps errors of a '$ref' in private classes
            return f"the schema cannot be applied: {found}"
        return None if error is None else f"at '{error.json_path}': {error.message:.300}"

    def _counted(self, keyword: Callable[..., Any]) -> Callable[..., Iterator[Any]]:
        def counted(*arguments: Any) -> Iterator[Any]:
            self._n_steps += 1
            if self._n_steps > MAX_STEPS:
                raise _TooManySteps
            yield from keyword(*arguments) or ()

        return counted


class _NotFinite(Exception):
    pass


class _Number(Decimal):
    """A decimal that error messages show as a plain number."""

    def __repr__(self) -> str:
        return str(self)

    __hash__ = Decimal.__hash__


def _decimal(value: Any) -> Any:
    """A copy in which each float is the decimal that JSON writes for it. Raises _NotFinite."""
    if isinstance(value, float):
        if not math.isfinite(value):
            raise _NotFinite(value)
        return _Number(repr(value))
    if isinstance(value, dict):
        return {key: _decimal(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_decimal(inner) for inner in value]
    return value


def _exact(dialect: Any, counted: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Any:
    """jsonschema's validator class for a draft, with exact numbers and with a time limit on patterns."""
    keywords = dict(dialect.VALIDATORS)
    own = {
        "multipleOf": _multiple_of,
        "divisibleBy": _multiple_of,
        "pattern": _pattern,
        "patternProperties": _pattern_properties,
        "additionalProperties": _additional_properties,
    }
    keywords |= {name: check for name, check in own.items() if name in keywords}
    whole_floats = dialect.TYPE_CHECKER.is_type(1.0, "integer")
    types = dialect.TYPE_CHECKER.redefine(
        "integer",
        lambda _, value: (
            (isinstance(value, int) and not isinstance(value, bool))
            or (whole_floats and isinstance(value, Decimal) and value == value.to_integral_value())
        ),
    )
    return validators.extend(dialect, {name: counted(check) for name, check in keywords.items()}, type_checker=types)


# --- keywords, as jsonschema calls them ---


def _multiple_of(validator: Any, step: Any, value: Any, schema: Any) -> Iterator[Any]:
    if validator.is_type(value, "number") and (Fraction(value) / Fraction(step)).denominator != 1:
        yield ValidationError(f"{value!r} is not a multiple of {step!r}")


def _pattern(validator: Any, pattern: str, value: Any, schema: Any) -> Iterator[Any]:
    if validator.is_type(value, "string") and not matches(pattern, value):
        yield ValidationError(f"{value!r} does not match {pattern!r}")


def _pattern_properties(validator: Any, patterns: dict[str, Any], value: Any, schema: Any) -> Iterator[Any]:
    if not validator.is_type(value, "object"):
        return
    for pattern, subschema in patterns.items():
        for name, inner in value.items():
            if matches(pattern, name):
                yield from validator.descend(inner, subschema, path=name, schema_path=pattern)


def _additional_properties(validator: Any, others: Any, value: Any, schema: Any) -> Iterator[Any]:
    if not validator.is_type(value, "object"):
        return
    named, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    extra = [name for name in value if name not in named and not any(matches(one, name) for one in patterns)]
    if validator.is_type(others, "object"):
        for name in extra:
            yield from validator.descend(value[name], others, path=name)
    elif others is False and extra:
        shown = ", ".join(repr(name) for name in sorted(extra))
        yield ValidationError(
            f"Additional properties are not allowed ({shown} {'was' if len(extra) == 1 else 'were'} unexpected)"
        )
