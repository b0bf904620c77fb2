"""Translates the keywords for one number or one string, as far as llguidance can enforce them exactly.

llguidance computes with floats, which change integers beyond 2^53, and its regular expressions have neither lookarounds
nor backreferences. What it cannot enforce is widened or left out here, never narrowed, and values are validated
afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from typing import Any

from granite4v.runtime.grammar.formats import CHECKED, PATTERNS, STANDARD, WITHOUT_EFFECT
from granite4v.runtime.grammar.left_out import LeftOut
from granite4v.runtime.grammar.patterns import pattern_size, without_look_around
from granite4v.runtime.grammar.trial import Trials

Schema = dict[str, Any]

EXACT = 2**53  # floats represent every integer up to here
_DECIMALS = 15
_MAX_STEP = 100_000  # of 'multipleOf' without trailing zeros: llguidance has one state for each remainder
_MAX_LENGTH = 1_000_000  # characters; no answer is longer
_COSTLY_STEP, _COSTLY_SIZE, _COSTLY_LENGTH = 1000, 200, 10_000

# keywords of translated schemas for which llguidance intersects automata
PATTERN_KEYWORDS = (
    "pattern",
    "format",
    "allOf",
    "multipleOf",
)
STRING_KEYWORDS = ("pattern", "format", "minLength", "maxLength")
NUMBER_KEYWORDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "divisibleBy")


class Impossible(ValueError):
    """Raised when no value satisfies a schema.

    `reason` is a sentence about its `field`; None if only the caller knows the field.
    """

    def __init__(self, reason: str, field: str | None = None) -> None:
        super().__init__(reason, field)
        self.reason, self.field = reason, field

    def at(self, field: str) -> Impossible:
        """The same error about `field`, unless it is already about a field inside it."""
        return self if self.field is not None else Impossible(self.reason, field)

    def __str__(self) -> str:
        return self.reason if self.field is None else f"'{self.field}': {self.reason}"


Bound = tuple[Fraction, bool]  # a number, and whether it is exclusive


@dataclass
class Leaf:
    """Keywords for llguidance, and what they do not fully enforce."""

    made: Schema
    left_out: list[LeftOut] = field(default_factory=list)


# --- numbers ---


def number_leaf(node: Schema, trials: Trials, *, integral: bool, close_ranges: bool = True) -> Leaf:
    """The keywords for numbers. Raises Impossible.

    `integral`: numbers are integers. `close_ranges`: add the numbers missing from llguidance's ranges (see `_lost`).
    """
    leaf = Leaf({})
    lower: Bound | None = _strictest(node, "minimum", "exclusiveMinimum", max)
    upper: Bound | None = _strictest(node, "maximum", "exclusiveMaximum", min)
    if integral:
        lower = lower and (Fraction(math.floor(lower[0]) + 1 if lower[1] else math.ceil(lower[0])), False)
        upper = upper and (Fraction(math.ceil(upper[0]) - 1 if upper[1] else math.floor(upper[0])), False)
    _check_range(lower, upper, "integer" if integral else "number")
    step = _step(node, integral=integral)
    if step is not None:  # llguidance may find no number in a range whose ends are not multiples
        lower = lower and (_next_multiple(lower, step), False)
        upper = upper and (-_next_multiple((-upper[0], upper[1]), step), False)
        _check_range(lower, upper, f"multiple of {_json_number(step)!s:.40}")
    lower = _held(leaf, lower, 1, "minimum")
    upper = _held(leaf, upper, -1, "maximum")
    if integral or not close_ranges:
        ranges = [_range(lower, upper)]
    else:
        if lower and upper and math.trunc(lower[0]) == math.trunc(upper[0]):
            lower, upper = _included(lower, 1), _included(upper, -1)
        ranges = [_range(lower, upper), *_lost(lower, upper)]
    if len(ranges) > 1:
        leaf.made["allOf"] = [{"anyOf": ranges}]
    else:
        leaf.made.update(ranges[0])
    if step is not None:
        _add_step(leaf, step, trials)
    return leaf


def _step(node: Schema, *, integral: bool) -> Fraction | None:
    """The number that a number, or an integer, must be a multiple of; None if there is none."""
    given = node.get("multipleOf", node.get("divisibleBy"))
    if given is None:
        return None
    step = _fraction(given)
    if not integral:
        return step
    step = Fraction(step.numerator)  # the integers among the multiples of p/q
    return None if step == 1 else step


def _next_multiple(bound: Bound, step: Fraction) -> Fraction:
    """The smallest multiple of `step` within a lower bound."""
    n = bound[0] / step
    return step * (math.floor(n) + 1 if bound[1] else math.ceil(n))


def _check_range(lower: Bound | None, upper: Bound | None, what: str) -> None:
    if lower and upper and (lower[0] > upper[0] or (lower[0] == upper[0] and (lower[1] or upper[1]))):
        raise Impossible(f"no {what} is at least its minimum and at most its maximum")


def _fraction(number: float) -> Fraction:
    """The decimal number as JSON writes it, exactly."""
    return Fraction(Decimal(repr(number)))


def _strictest(
    node: Schema, name: str, exclusive: str, choose: Callable[[Iterable[Fraction]], Fraction]
) -> Bound | None:
    """The tighter of two bounds. In draft 4, 'exclusiveMinimum' is true or false and makes 'minimum' exclusive."""
    bounds = []
    if name in node:
        bounds.append((_fraction(node[name]), node.get(exclusive) is True))
    if exclusive in node and not isinstance(node[exclusive], bool):
        bounds.append((_fraction(node[exclusive]), True))
    if not bounds:
        return None
    value = choose(bound[0] for bound in bounds)
    return value, any(excluded for bound, excluded in bounds if bound == value)


def _held(leaf: Leaf, bound: Bound | None, sign: int, name: str) -> Bound | None:
    """A bound with which llguidance computes exactly: the same one, or a wider one (None for no bound)."""
    if bound is None:
        return None
    value, excluded = bound
    held: Fraction | None = value
    if abs(value) > EXACT:
        held = Fraction(sign * EXACT) if value * sign > 0 else None
    elif (value * 10**_DECIMALS).denominator != 1:
        scaled = value * 10**_DECIMALS
        held = Fraction(math.floor(scaled) if sign > 0 else math.ceil(scaled), 10**_DECIMALS)
    if held != value:
        leaf.left_out.append(LeftOut(f"'{name}'", "is too large, or has too many digits, to be enforced exactly"))
    return None if held is None else (held, excluded and held == value)


def _range(lower: Bound | None, upper: Bound | None) -> Schema:
    made: Schema = {}
    if lower is not None:
        made["exclusiveMinimum" if lower[1] else "minimum"] = _json_number(lower[0])
    if upper is not None:
        made["exclusiveMaximum" if upper[1] else "maximum"] = _json_number(upper[0])
    return made


def _included(bound: Bound, sign: int) -> Bound:
    """Replaces an exclusive integer bound with an inclusive one: llguidance allows '0' where the bound is 'above 0'."""
    if bound[1] and bound[0].denominator == 1:
        return bound[0] + sign * Fraction(1, 10**_DECIMALS), False
    return bound


def _lost(lower: Bound | None, upper: Bound | None) -> list[Schema]:
    """The numbers of a range that llguidance's regular expression for it does not match.

    With a maximum of 0.25 it does not match 0.2, which has fewer decimals; with an exclusive bound of 0 it does not
    match numbers below 1 that end in zeros, such as 0.50.
    """
    lost: list[Schema] = []
    if lower is not None and lower[1] and lower[0] >= 0:
        lost.append(_range((lower[0] + _tick(lower[0]), False), upper))
    if upper is not None and upper[1] and upper[0] <= 0:
        lost.append(_range(lower, (upper[0] - _tick(upper[0]), False)))
    if (lower or upper) and (lower is None or lower[0] < 0) and (upper is None or upper[0] >= 0):
        lost.append(_range(lower, (-_tick(Fraction(0)), False)))
    lost = [made for made in lost if not _is_empty(made)]
    shorter: set[Fraction] = set()
    if upper is not None and upper[0] > 0:
        shorter |= _shortened(upper[0])
    if lower is not None and lower[0] < 0:
        shorter |= {-value for value in _shortened(-lower[0])}
    inside = sorted(value for value in shorter if _contains(lower, value, 1) and _contains(upper, value, -1))
    return [*lost, *([{"enum": [_json_number(value) for value in inside]}] if inside else [])]


def _tick(value: Fraction) -> Fraction:
    """A step with two more decimals than a number has, at most `_DECIMALS`."""
    return Fraction(1, 10 ** min(_n_decimals(value) + 2, _DECIMALS))


def _n_decimals(value: Fraction) -> int:
    return next(n for n in range(_DECIMALS + 1) if (value * 10**n).denominator == 1)


def _shortened(value: Fraction) -> set[Fraction]:
    """A number without its last decimal, its last two, ... all but the first. For example, 0.12 and 0.1 for 0.125."""
    return {Fraction(math.floor(value * 10**n), 10**n) for n in range(1, _n_decimals(value))}


def _contains(bound: Bound | None, value: Fraction, sign: int) -> bool:
    return bound is None or (value - bound[0]) * sign > 0 or (value == bound[0] and not bound[1])


def _is_empty(made: Schema) -> bool:
    low = [made[name] for name in ("minimum", "exclusiveMinimum") if name in made]
    high = [made[name] for name in ("maximum", "exclusiveMaximum") if name in made]
    return bool(low and high and low[0] >= high[0])


def _add_step(leaf: Leaf, step: Fraction, trials: Trials) -> None:
    scaled = step * 10**_DECIMALS
    n_held = _without_zeros(scaled.numerator)
    if step > EXACT or scaled.denominator != 1 or n_held > _MAX_STEP:
        leaf.left_out.append(LeftOut("'multipleOf'", "has too many digits to be enforced during generation"))
        return
    steps = [{"type": "number", "multipleOf": _json_number(one)} for one in _shorter_steps(step)]
    made = steps[0] if len(steps) == 1 else {"type": "number", "anyOf": steps}
    problem = trials.problem(made, costly=n_held > _COSTLY_STEP)
    # tried together as well: llguidance computes in floats, where 0.3 is not a multiple of 0.1
    if not problem and leaf.made:
        all_of = [*leaf.made.get("allOf", ()), made]
        problem = trials.problem({"type": "number", **leaf.made, "allOf": all_of}, costly=n_held > _COSTLY_STEP)
    if problem:
        leaf.left_out.append(LeftOut("'multipleOf'", "cannot be enforced during generation"))
    elif len(steps) > 1:
        leaf.made["allOf"] = [*leaf.made.get("allOf", ()), {"anyOf": steps}]
    else:
        leaf.made["multipleOf"] = steps[0]["multipleOf"]


def _shorter_steps(step: Fraction) -> list[Fraction]:
    """The step, and its multiples with fewer decimals if llguidance would miss them.

    It accepts 0.50 as a multiple of 0.25, but not 0.5; so 0.25 gives 0.25, 0.5 and 1.
    """
    n = _n_decimals(step)
    digits = (step * 10**n).numerator
    if _without_zeros(digits) in (1, 2, 5):
        return [step]
    return list(dict.fromkeys(Fraction(math.lcm(digits, 10**k), 10**n) for k in range(n + 1)))


def _without_zeros(number: int) -> int:
    while number and number % 10 == 0:
        number //= 10
    return number


def _json_number(value: Fraction) -> int | float:
    return int(value) if value.denominator == 1 else float(value)


def is_exact(value: Any) -> bool:
    """Whether llguidance keeps a constant unchanged: not if a number in it is too large or has too many digits."""
    if isinstance(value, dict):
        return all(is_exact(inner) for inner in value.values())
    if isinstance(value, list):
        return all(is_exact(inner) for inner in value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return abs(value) <= EXACT and (_fraction(value) * 10**_DECIMALS).denominator == 1
    return True


def wider(value: Any) -> Schema:
    """A schema that accepts an inexact constant and few other values."""
    if isinstance(value, dict | list):
        return {"type": "object" if isinstance(value, dict) else "array"}
    if abs(value) <= EXACT:
        return {"type": "number"}
    kind = "integer" if _fraction(value).denominator == 1 else "number"
    return {"type": kind, **({"minimum": EXACT} if value > 0 else {"maximum": -EXACT})}


# --- strings ---


def string_leaf(node: Schema, trials: Trials) -> Leaf:
    """The keywords for strings. Raises Impossible."""
    leaf = Leaf({})
    for name in ("minLength", "maxLength"):
        if name in node and node[name] <= _MAX_LENGTH:
            leaf.made[name] = int(node[name])
    if leaf.made.get("minLength", 0) > leaf.made.get("maxLength", _MAX_LENGTH):
        raise Impossible("its minLength is greater than its maxLength")
    patterns: list[str] = []
    if "pattern" in node:
        held = _held_pattern(leaf, node["pattern"], trials)
        patterns += [] if held is None else [held]
    kind = node.get("format")
    if kind in PATTERNS:
        patterns.append(PATTERNS[kind])
    elif isinstance(kind, str) and kind not in WITHOUT_EFFECT:
        if kind in STANDARD and not trials.problem({"type": "string", "format": kind}):
            leaf.made["format"] = kind
        elif kind in CHECKED:
            leaf.left_out.append(LeftOut(f"format {kind!r}"))
        else:
            unknown = LeftOut(f"format {kind!r:.40}", "is unknown, so any text is accepted", is_checked=False)
            leaf.left_out.append(unknown)
    if len(patterns) == 1:
        leaf.made["pattern"] = patterns[0]
    elif patterns:
        leaf.made["allOf"] = [{"pattern": pattern} for pattern in patterns]
    if len(leaf.made) > 1 and (patterns or "format" in leaf.made):
        _hold_together(leaf, patterns, trials)
    return leaf


def _held_pattern(leaf: Leaf, pattern: str, trials: Trials) -> str | None:
    """The pattern, or one that matches more; None if llguidance can enforce neither."""
    problem = trials.problem({"type": "string", "pattern": pattern}, costly=_is_costly([pattern]))
    if not problem:
        return pattern
    looser = without_look_around(pattern)
    if looser != pattern and not trials.problem({"type": "string", "pattern": looser}, costly=_is_costly([looser])):
        leaf.left_out.append(LeftOut("'pattern'", "is enforced without its lookarounds"))
        return looser
    leaf.left_out.append(LeftOut("'pattern'", f"cannot be enforced during generation ({problem})"))
    return None


def _hold_together(leaf: Leaf, patterns: Sequence[str], trials: Trials) -> None:
    """Leaves out the pattern and the format if they cannot be enforced together or with the length. Raises Impossible
    if no text has them all at once."""
    longest = max(leaf.made.get("minLength", 0), leaf.made.get("maxLength", 0))
    problem = trials.problem({"type": "string", **leaf.made}, costly=_is_costly(patterns) or longest > _COSTLY_LENGTH)
    if problem.startswith("Unsatisfiable"):
        raise Impossible("no text has its pattern, its format and its length at once")
    if problem:
        leaf.left_out.append(LeftOut("'pattern'", f"cannot be enforced during generation ({problem})"))
        for name in ("pattern", "allOf", "format"):
            leaf.made.pop(name, None)


def _is_costly(patterns: Sequence[str]) -> bool:
    return len(patterns) > 2 or sum(pattern_size(pattern) for pattern in patterns if pattern not in _OWN) > _COSTLY_SIZE


_OWN = frozenset(PATTERNS.values())
