"""Splits HTML into tags and text as browsers do by the HTML standard, in one pass over the answer.

Does not use `html.parser`, which searches the rest of the text again for each unclosed construct (quadratic time),
raises AssertionError for some declarations, and differs from one Python release to the next.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_RAW = ("script", "style")  # their content is text up to their end tag
_MARK = re.compile(r"<(?=[a-zA-Z!?]|/.)", re.DOTALL)  # a '<' that begins markup; any other is text
_NAME = re.compile(r"(/?)([a-zA-Z][^\s/>]*)")
_ATTRIBUTE = re.compile(r"""[\s/]*([^\s/>][^\s/>=]*)(?:\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'>][^\s>]*)?))?""")
_END = re.compile(r"[\s/]*>")
# more digits than any code point has; html.unescape raises ValueError beyond Python's limit on digits
_LONG_NUMBER = re.compile(r"&#0*[1-9][0-9]{7,};?")


@dataclass(frozen=True)
class Tag:
    """A start or an end tag with names in lower case, and the offset after it. If an attribute is given twice, the
    first one counts."""

    name: str
    closing: bool = False
    attributes: dict[str, str] = field(default_factory=dict)
    end: int = 0


def pieces(text: str) -> Iterator[tuple[int, Tag | str]]:
    """Yields each tag, and each text with its character references replaced, along with its offset.

    A tag that is cut off by the end of the text is left out, as are comments, declarations and processing instructions.
    """
    at = 0
    while at < len(text):
        found = _MARK.search(text, at)
        mark = found.start() if found else len(text)
        if mark > at:
            yield at, unescape(text[at:mark])
        at = mark
        if at == len(text):
            return
        if (name := _NAME.match(text, at + 1)) is None:
            at = _after_comment(text, at)
            continue
        attributes, end = _attributes(text, name.end())
        if end is None:
            return
        tag = Tag(name[2].lower(), bool(name[1]), attributes, end)
        yield at, tag
        at = end
        if tag.name in _RAW and not tag.closing:
            ending = re.compile(f"</{tag.name}(?=[\\s/>])", re.IGNORECASE).search(text, at)
            raw_end = ending.start() if ending else len(text)
            if raw_end > at:
                yield at, text[at:raw_end]
            at = raw_end


def unescape(text: str) -> str:
    """Replaces character references; those that name no character become U+FFFD."""
    return html.unescape(_LONG_NUMBER.sub("\ufffd", text))


def _after_comment(text: str, at: int) -> int:
    """The offset after a construct that begins with '<!', '<?', or '</' without a letter; an unclosed one ends with the
    text."""
    if not text.startswith("<!--", at):
        end = text.find(">", at)
        return len(text) if end < 0 else end + 1
    if text.startswith(("<!-->", "<!--->"), at):
        return text.index(">", at) + 1
    found = re.compile("--!?>").search(text, at + 4)
    return found.end() if found else len(text)


def _attributes(text: str, at: int) -> tuple[dict[str, str], int | None]:
    """The attributes of a tag, given the offset after its name, and the offset after the tag; None if it does not
    end."""
    found: dict[str, str] = {}
    while (end := _END.match(text, at)) is None:
        attribute = _ATTRIBUTE.match(text, at)
        if attribute is None:
            return found, None
        value = next((value for value in attribute.groups()[1:] if value is not None), "")
        found.setdefault(attribute[1].lower(), unescape(value))
        at = attribute.end()
    return found, end.end()
