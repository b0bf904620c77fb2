"""An OpenAI-compatible server for one model: `create_app` builds the ASGI application, `run` serves it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from granite4v.lazy import exports

if TYPE_CHECKING:
    from granite4v.runtime.server.app import create_app
    from granite4v.runtime.server.options import Limits, ServerOptions
    from granite4v.runtime.server.serving import run

__all__ = ["Limits", "ServerOptions", "create_app", "run"]

__getattr__, __dir__ = exports(
    __name__, {"app": ("create_app",), "options": ("Limits", "ServerOptions"), "serving": ("run",)}
)
