"""Packages that an extra brings: looked for before anything is begun that needs them."""

from __future__ import annotations

import importlib.util

from granite4v.errors import Granite4vError


def check_installed(what: str, package: str, extra: str) -> None:
    """Raises Granite4vError, which says how to install `package`, unless it is there; `what` needs it."""
    if importlib.util.find_spec(package.replace("-", "_")) is None:
        raise Granite4vError(f"{what} needs {package}; install it with pip install 'granite4v[{extra}]'.")
