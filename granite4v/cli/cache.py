"""`granite4v cache`: manages the pages that `ask`, `chat` and `serve` keep on disk."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from granite4v.cli import options
from granite4v.cli.progress import plural
from granite4v.cli.streams import to_json
from granite4v.cli.terminal import clean, date
from granite4v.cli.verbosity import note

if TYPE_CHECKING:
    from granite4v.runtime.engine.page_store import Entry

_UNITS_S = {"m": 60, "h": 3600, "d": 86400}
HEADINGS = ("MODEL", "TOKENS", "IMAGES", "SIZE", "LAST USED", "KEY")


def _age(text: str) -> float:
    """Parses '30d', '12h' or '5m' to seconds. Raises BadParameter."""
    found = re.fullmatch(r"(\d{1,9})([mhd])", text)
    if found is None:
        raise typer.BadParameter(f"'{text}' is no age; give minutes, hours or days, such as 90m, 12h or 30d.")
    return float(int(found[1]) * _UNITS_S[found[2]])


OlderThanOption = Annotated[
    float | None,
    typer.Option(
        "--older-than",
        metavar="AGE",
        parser=_age,
        help="Remove only pages that were not used for this long: minutes, hours or days, such as 90m, 12h or 30d.",
    ),
]


def list_pages(as_json: options.JsonOption = False) -> None:
    """List the stored pages, most recently used first: model, prompt tokens, images, size and last use."""
    from granite4v.runtime.engine.page_store import PageStore

    store = PageStore()
    entries = store.entries()
    n_bytes = sum(entry.n_bytes for entry in entries)
    if as_json:
        pages = [_as_data(entry) for entry in entries]
        print(to_json({"folder": str(store.folder), "bytes": n_bytes, "pages": pages}, indent=2))
        return
    rows = [HEADINGS, *map(_row, entries)] if entries else []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        typer.echo(clean("  ".join(cells), keep=""))
    note(f"{plural(len(entries), 'page')}, {_size(n_bytes)}, in '{store.folder}'")


def clear_pages(older_than: OlderThanOption = None) -> None:
    """Remove the stored pages."""
    from granite4v.runtime.engine.page_store import PageStore

    n_pages, n_bytes = PageStore().clear(older_than or 0.0)
    note(f"removed {plural(n_pages, 'page')}: {_size(n_bytes)} freed")


def verify_pages() -> None:
    """Check every stored page against its checksum, and remove damaged ones.

    The exit status is 1 if any page was damaged.
    """
    from granite4v.runtime.engine.page_store import PageStore

    n_sound, n_bad = 0, 0
    for entry, problem in PageStore().verify():
        if problem is None:
            n_sound += 1
        else:
            n_bad += 1
            what = "left where it is" if entry.path.exists() else "removed"
            typer.echo(clean(f"'{entry.path}': {problem}; {what}", keep=""))
    note(f"{plural(n_sound, 'page')} sound, {n_bad:,} damaged")
    if n_bad:
        raise typer.Exit(1)


def _row(entry: Entry) -> tuple[str, ...]:
    found = entry.description
    told = ("(damaged)", "", "") if found is None else (found.model, f"{found.n_tokens:,}", f"{found.n_images:,}")
    return (*told, _size(entry.n_bytes), date(entry.last_used), entry.key[:12])


def _as_data(entry: Entry) -> dict[str, Any]:
    found = entry.description
    return {
        "key": entry.key,
        "path": str(entry.path),
        "bytes": entry.n_bytes,
        "used": date(entry.last_used),
        "damaged": found is None,
        "model": None if found is None else found.model,
        "tokens": None if found is None else found.n_tokens,
        "images": None if found is None else found.n_images,
        "created": None if found is None else date(found.created),
    }


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"
