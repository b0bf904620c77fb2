"""A docling plugin (the extra 'docling') that reads docling's tables and pictures with a model of granite4v.

docling finds it through the entry point group 'docling' and calls the two functions below if `allow_external_plugins`
is on. A pipeline selects the plugin by its options:

    from granite4v.docling_plugin import Granite4vPictureOptions, Granite4vTableOptions

Each public name is imported on first use.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from granite4v.lazy import exports

if TYPE_CHECKING:
    from granite4v.docling_plugin.options import Granite4vPictureOptions, Granite4vTableOptions
    from granite4v.docling_plugin.pictures import Granite4vPictureModel
    from granite4v.docling_plugin.tables import Granite4vTableModel

__all__ = [
    "Granite4vPictureModel",
    "Granite4vPictureOptions",
    "Granite4vTableModel",
    "Granite4vTableOptions",
    "picture_description",
    "table_structure_engines",
]

_find, _ = exports(
    __name__,
    {
        "options": ("Granite4vPictureOptions", "Granite4vTableOptions"),
        "pictures": ("Granite4vPictureModel",),
        "tables": ("Granite4vTableModel",),
    },
)


def table_structure_engines() -> dict[str, list[type[Granite4vTableModel]]]:
    """Returns the table model that docling's factory registers."""
    return {"table_structure_engines": [_find("Granite4vTableModel")]}


def picture_description() -> dict[str, list[type[Granite4vPictureModel]]]:
    """Returns the picture description model that docling's factory registers."""
    return {"picture_description": [_find("Granite4vPictureModel")]}


def __getattr__(name: str) -> Any:
    if name in __all__ and importlib.util.find_spec("docling") is None:
        raise ImportError("granite4v.docling_plugin needs docling; install it with pip install 'granite4v[docling]'.")
    return _find(name)


def __dir__() -> list[str]:
    return sorted(__all__)
