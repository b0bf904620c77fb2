"""Entry point of the console script. Installs the signal handlers before anything heavy is imported."""

from __future__ import annotations

import sys

from granite4v.cli.signals import Signals


def entry() -> None:
    """Runs the command line and ends the process with its status."""
    signals = Signals()
    signals.catch()
    try:
        from granite4v.cli.outcome import run

        status = run()
        signals.is_over()
    except KeyboardInterrupt as error:  # during start-up or shutdown
        signals.is_over()
        from granite4v.cli.outcome import conclude

        status = conclude(error)
    sys.exit(status)
