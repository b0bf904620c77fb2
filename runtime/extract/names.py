"""Names a document's files in the output directory: valid on any file system, unique, the same in every later run.

Files below a given directory, or below the fixed part of a glob, keep their subfolders.
"""

from __future__ import annotations

import glob
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

MAX_NAME_BYTES = 100  # of one part of a path
MAX_STEM_BYTES = 400  # of a name with its folders; a longer one loses its folders
_SAFE = re.compile(r"[\w+-][\w.+-]*")
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(?=\.|$)", re.IGNORECASE)  # device names on Windows
# suffixes of our files; a folder name that ends like one gets a '_', so that it does not look like a file
_SUFFIXES = (
    ".csv",
    ".html",
    ".json",
    ".jsonl",
    ".md",
    ".otsl",
    ".py",
)


class Names:
    """A stem for each document: '/' between folders, no suffix, unique even if letter case is ignored."""

    def __init__(self, inputs: Sequence[str] = (), known: Mapping[str, str | None] | None = None) -> None:
        """`known`: stems of an earlier run by source, in its order; None for a source without a recorded stem."""
        self._roots = sorted(_roots(inputs), key=len)
        self._taken: set[str] = set()
        self._stems: dict[str, str] = {}
        known = known or {}
        for source, stem in known.items():
            if stem is not None and _is_stem(stem) and _key(stem) not in self._taken:
                self._take(source, stem)
        for source in known:
            if source not in self._stems:  # recorded by a version without folders
                self._take(source, self._unique(_clean(_stem(source), "document")))

    def stem(self, source: str) -> str:
        """Returns the stem of a document, the same on every call."""
        if source not in self._stems:
            folder, name = self._folder(source), _clean(_stem(source), "document")
            found = f"{folder}/{name}" if folder else name
            self._take(source, self._unique(name if len(found.encode()) > MAX_STEM_BYTES else found))
        return self._stems[source]

    def _take(self, source: str, stem: str) -> None:
        self._stems[source] = stem
        self._taken.add(_key(stem))

    def _unique(self, stem: str) -> str:
        found, n = stem, 1
        while _key(found) in self._taken:
            n += 1
            found = f"{stem}-{n}"
        return found

    def _folder(self, source: str) -> str:
        path = os.path.normpath(source)
        for root in self._roots:
            inside = _inside(path, root)
            if inside is not None:
                return "/".join(_clean_folder(part) for part in Path(inside).parent.parts)
        return ""


def _roots(inputs: Iterable[str]) -> set[str]:
    found = set()
    for given in inputs:
        if os.path.isdir(given):
            found.add(os.path.normpath(given))
        elif glob.has_magic(given) and not os.path.lexists(given):
            parts = Path(given).parts
            fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
            found.add(os.path.normpath(Path(*parts[:fixed])))
    return found


def _inside(path: str, root: str) -> str | None:
    """Returns `path` relative to `root`; None if it is not below it."""
    if root == os.curdir:
        return None if os.path.isabs(path) or path.split(os.sep)[0] == os.pardir else path
    beginning = os.path.join(root, "")
    return path[len(beginning) :] if path.startswith(beginning) else None


def _stem(source: str) -> str:
    return "stdin" if source in ("", "-") else Path(source.rstrip("/\\")).stem


def _clean(text: str, otherwise: str) -> str:
    plain = re.sub(r"[^\w.+-]+", "_", unicodedata.normalize("NFC", text)).strip("._") or otherwise
    plain = plain.encode("utf-8", "replace")[:MAX_NAME_BYTES].decode("utf-8", "ignore").rstrip(".")
    return _RESERVED.sub(r"\1_", plain, count=1) if _RESERVED.match(plain) else plain


def _clean_folder(text: str) -> str:
    plain = _clean(text, "folder")
    return f"{plain}_" if plain.casefold().endswith(_SUFFIXES) else plain


def _is_stem(text: str) -> bool:
    """Whether a recorded stem can be ours: a damaged record must not lead to a path outside the output directory."""
    parts = text.split("/")
    return len(text.encode("utf-8", "replace")) <= MAX_STEM_BYTES + 20 and all(_SAFE.fullmatch(part) for part in parts)


def _key(stem: str) -> str:
    """Returns a key that is equal for names that are the same on some file system."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", stem).casefold())
