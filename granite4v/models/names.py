"""Parses model names of the Hugging Face hub: 'owner/name', or 'owner/name:VARIANT'.

A variant is a quantization such as Q4_K_M, or the name of a GGUF file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

# The hub forbids '--' and '..' in names, so the folder name 'owner--name--Q4_K_M' is unambiguous.
_PART = r"(?:[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?)"
HUB_ID = re.compile(rf"{_PART}/{_PART}", re.ASCII)
_HUB_NAME = re.compile(rf"({_PART}/{_PART})(?::([A-Za-z0-9][\w.-]{{0,94}}))?", re.ASCII)
HUB_URL = re.compile(  # of a repository, or of a path in it at a revision
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)"
    r"(?:/(?:tree|blob|resolve)/([^/?#]+))?(?:[/?#:].*)?"
)
FOLDER_MARK = "--"
# Used in this order if no variant is named.
PREFERRED = ("Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "F16", "BF16")


@dataclass(frozen=True)
class HubName:
    """A repository, and the wanted variant of it; None: any."""

    repository: str
    variant: str | None = None

    def __str__(self) -> str:
        return f"{self.repository}:{self.variant}" if self.variant else self.repository

    @property
    def is_file(self) -> bool:
        """Whether the variant is a file name."""
        return self.variant is not None and self.variant.lower().endswith(".gguf")

    @property
    def folder_prefix(self) -> str:
        return self.repository.replace("/", FOLDER_MARK)

    def folder_name(self, variant: str) -> str:
        """The folder name of one variant of this repository."""
        return f"{self.folder_prefix}{FOLDER_MARK}{variant}"


def preferred(variants: Iterable[str]) -> str | None:
    """The variant to use if none is named: the first one in PREFERRED; None if none is in it."""
    found = set(variants)
    return next((variant for variant in PREFERRED if variant in found), None)


def parse(text: str) -> HubName | None:
    """Parses a hub name; None for any other text."""
    match = _HUB_NAME.fullmatch(text)
    if match is None or not is_hub_id(match[1]) or match[1].lower().endswith(".gguf") or ".." in (match[2] or ""):
        return None
    return HubName(match[1], match[2])


def is_hub_id(text: str) -> bool:
    """Whether a name can be a repository on the hub. A name that starts with a dot cannot; it is meant as a path."""
    return bool(HUB_ID.fullmatch(text)) and ".." not in text and FOLDER_MARK not in text
