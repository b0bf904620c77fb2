"""Models by name: downloads from the Hugging Face hub, and the folder that models are kept in.

Models in the folder are found without huggingface_hub and without a connection; only `pull` needs both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from granite4v.lazy import exports

if TYPE_CHECKING:
    from granite4v.models.folder import Installed, find, incomplete, installed, mark_used, models_folder, remove
    from granite4v.models.names import HubName, parse
    from granite4v.models.pulling import Checkpoint, Conversion, PullProgress, discard_downloads, pull
    from granite4v.models.repository import size

__all__ = [
    "Checkpoint",
    "Conversion",
    "HubName",
    "Installed",
    "PullProgress",
    "discard_downloads",
    "find",
    "incomplete",
    "installed",
    "mark_used",
    "models_folder",
    "parse",
    "pull",
    "remove",
    "size",
]

__getattr__, __dir__ = exports(
    __name__,
    {
        "folder": ("Installed", "find", "incomplete", "installed", "mark_used", "models_folder", "remove"),
        "names": ("HubName", "parse"),
        "pulling": ("Checkpoint", "Conversion", "PullProgress", "discard_downloads", "pull"),
        "repository": ("size",),
    },
)
