"""Checks for the packages of optional extras before any work that needs them starts."""

from __future__ import annotations

import importlib.util

from granite4v.errors import Granite4vError


def check_installed(what: str, package: str, extra: str) -> None:
    """Raises Granite4vError unless `package` is installed. The message says that `what` needs it and how to install it
    with `extra`."""
    if importlib.util.find_spec(package.replace("-", "_")) is None:
        raise Granite4vError(f"{what} needs {package}; install it with pip install 'granite4v[{extra}]'.")
