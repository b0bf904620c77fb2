"""The 'format' keyword of strings: defines which dates and times answers may contain, and how values are checked.

Dates are real dates: 29 February exists only in leap years. RFC 3339 requires an offset from UTC in 'time' and
'date-time'. But pydantic declares these formats for `datetime.time` and `datetime.datetime`, whose values need none,
and documents rarely print one, so a model that had to write an offset would make it up. Here the offset is optional; a
schema that needs it can require it with a 'pattern'. Seconds are required: a printed '10:30' becomes 10:30:00.
"""

from __future__ import annotations

import functools
import re

from jsonschema import FormatChecker

from granite4v.runtime.grammar.patterns import pattern_problem

_YEAR = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_MONTH_AND_DAY = (
    "(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_DATE = f"(?:{_YEAR}-{_MONTH_AND_DAY}|{_LEAP_YEAR}-02-29)"
_OFFSET = "(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])?"
_TIME = rf"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]+)?{_OFFSET}"
_LEAP_SECOND = rf"(?:[01][0-9]|2[0-3]):59:60(?:\.[0-9]+)?{_OFFSET}"  # valid in a value, but never generated
# used in place of llguidance's own
PATTERNS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}

# the checks of jsonschema that need no other package; 'hostname', 'uri' and 'duration' are enforced by grammars only
_OF_JSONSCHEMA = ("email", "idn-email", "ipv4", "ipv6", "uuid")
CHECKED = (*PATTERNS, *_OF_JSONSCHEMA, "regex")
# formats of JSON Schema, most of which llguidance knows; it is not asked about other names, whose meaning is its own
STANDARD = frozenset(
    (
        "duration",
        "email",
        "hostname",
        "idn-email",
        "idn-hostname",
        "ipv4",
        "ipv6",
        "iri",
        "uri",
        "uri-reference",
        "uuid",
    )
)
# these only say how a text is displayed or encoded; they exclude no text
WITHOUT_EFFECT = frozenset(
    (
        "password", "binary", "byte", "base64", "base64url", "path", "file-path", "directory-path", "textarea", "text",
        "string", "html", "markdown", "json-string", "multiline", "unknown", "color", "iri", "iri-reference",
        "uri-reference", "uri-template", "idn-hostname", "json-pointer", "relative-json-pointer",
    )
)  # fmt: skip


@functools.cache
def checker() -> FormatChecker:
    """jsonschema's FormatChecker for the formats whose values are checked; others are annotations."""
    made = FormatChecker(formats=_OF_JSONSCHEMA)
    leap_second = {"time": f"^{_LEAP_SECOND}$", "date-time": f"^{_DATE}T{_LEAP_SECOND}$"}
    for name, pattern in PATTERNS.items():
        compiled = re.compile("|".join(filter(None, [pattern, leap_second.get(name)])), re.IGNORECASE)
        made.checks(name)(functools.partial(_is_match, compiled))
    made.checks("regex")(lambda value: not isinstance(value, str) or not pattern_problem(value))
    return made


def _is_match(pattern: re.Pattern[str], value: object) -> bool:
    return not isinstance(value, str) or pattern.fullmatch(value) is not None
