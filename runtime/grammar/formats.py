"""Formats of texts: which dates and times answers may hold, and how a value is checked.

Dates exist: 29 February in leap years alone. RFC 3339 demands an offset from UTC in 'time' and 'date-time', but those
are what pydantic declares for `datetime.time` and `datetime.datetime`, whose values need none, and documents rarely
print one; an answer that had to hold one would invent it. So an offset may be there and need not be. A schema that
wants one says so with a 'pattern'. Seconds must be there: ':00' is what a printed '10:30' means.
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
_LEAP_SECOND = rf"(?:[01][0-9]|2[0-3]):59:60(?:\.[0-9]+)?{_OFFSET}"  # in a value, but not in an answer to a page
# in place of llguidance's own
PATTERNS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}

# those of jsonschema's checks that need no other package; 'hostname', 'uri' and 'duration' are held by grammars alone
_OF_JSONSCHEMA = ("email", "idn-email", "ipv4", "ipv6", "uuid")
CHECKED = (*PATTERNS, *_OF_JSONSCHEMA, "regex")
# of JSON Schema, where llguidance may know them; what it takes for a text of any other name is not asked
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
# these say how a text is shown or encoded, and leave no text out
WITHOUT_EFFECT = frozenset(
    (
        "password", "binary", "byte", "base64", "base64url", "path", "file-path", "directory-path", "textarea", "text",
        "string", "html", "markdown", "json-string", "multiline", "unknown", "color", "iri", "iri-reference",
        "uri-reference", "uri-template", "idn-hostname", "json-pointer", "relative-json-pointer",
    )
)  # fmt: skip


@functools.cache
def checker() -> FormatChecker:
    """jsonschema's FormatChecker of the formats whose values are checked; others are remarks."""
    made = FormatChecker(formats=_OF_JSONSCHEMA)
    leap_second = {"time": f"^{_LEAP_SECOND}$", "date-time": f"^{_DATE}T{_LEAP_SECOND}$"}
    for name, pattern in PATTERNS.items():
        compiled = re.compile("|".join(filter(None, [pattern, leap_second.get(name)])), re.IGNORECASE)
        made.checks(name)(functools.partial(_is_whole, compiled))
    made.checks("regex")(lambda value: not isinstance(value, str) or not pattern_problem(value))
    return made


def _is_whole(pattern: re.Pattern[str], value: object) -> bool:
    return not isinstance(value, str) or pattern.fullmatch(value) is not None
