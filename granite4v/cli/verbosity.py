"""How much a command prints on stderr: `--quiet` and `--verbose`, the same for all commands.

By default it prints progress, notes and problems. Quiet leaves out progress and notes. It keeps errors, and messages
about the result itself: a page that failed, an answer that was cut off, an image that was read differently than
expected, the address of a server. Verbose adds timings and the package's log, including llama.cpp's.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Any

import typer
import typer.main

from granite4v.cli.terminal import clean
from granite4v.errors import Granite4vError


class Verbosity(Enum):
    QUIET = "quiet"
    NORMAL = ""
    VERBOSE = "verbose"


_NAMES = ("quiet", "verbose")
_BEFORE_COMMAND = "granite4v.verbosity"  # key in `ctx.meta`, which contexts share: options before the command's name
_LOGGER = logging.getLogger("granite4v")
_current, _handler = Verbosity.NORMAL, logging.StreamHandler()


def set_verbosity(wanted: Verbosity) -> None:
    """Sets the verbosity of this process, until it is set again."""
    global _current, _handler
    _LOGGER.removeHandler(_handler)
    _current, _handler = wanted, logging.StreamHandler(sys.stderr)
    _handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    if wanted is Verbosity.VERBOSE:
        _LOGGER.addHandler(_handler)
    _LOGGER.setLevel(logging.DEBUG if wanted is Verbosity.VERBOSE else logging.NOTSET)


def is_quiet() -> bool:
    return _current is Verbosity.QUIET


def is_verbose() -> bool:
    return _current is Verbosity.VERBOSE


def note(text: str) -> None:
    """Prints a line on stderr, except with --quiet."""
    if not is_quiet():
        print(clean(text, keep=""), file=sys.stderr, flush=True)


def show_timings(what: str, timings: Mapping[str, float]) -> None:
    """With --verbose, prints the seconds and counts of an answer, with the same names as in records."""
    if is_verbose():
        figures = (
            f"{name}={value:.3f}" if name.endswith("_s") else f"{name}={value:g}" for name, value in timings.items()
        )
        print(clean(f"{what}: {' '.join(figures)}", keep=""), file=sys.stderr, flush=True)


# --- the options ---


def _options(
    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet", "-q", help="Only results, and what is wrong with them: no progress, notes and timings."
        ),
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Also more timings, and the log of llama.cpp.")
    ] = False,
) -> None:
    """Declares the two options as typer does, because its option classes differ between versions."""


def verbosity_options() -> list[Any]:
    """The click parameters of `--quiet` and `--verbose`, for a command or a group."""
    holder = typer.Typer(add_completion=False)
    holder.command()(_options)
    return typer.main.get_command(holder).params


def take_before_command(ctx: Any) -> None:
    """Removes the two options from a group's parameters, and keeps their values for the command that follows."""
    ctx.meta[_BEFORE_COMMAND] = _taken(ctx)[0]


def take(ctx: Any) -> Verbosity:
    """Removes the two options from a command's parameters, and returns the verbosity.

    Options on the command line, before or after the command's name, take precedence over the config file. Raises
    BadParameter if both are given, Granite4vError if the config file sets both.
    """
    typed, configured = _taken(ctx)
    wanted = typed | ctx.meta.get(_BEFORE_COMMAND, frozenset()) or configured
    if len(wanted) > 1:
        if wanted is configured:
            raise Granite4vError("the config file sets both 'quiet' and 'verbose'; remove one of them.")
        raise typer.BadParameter("give --quiet or --verbose, not both.", ctx, param_hint="--quiet, --verbose")
    return Verbosity("".join(wanted))


def _taken(ctx: Any) -> tuple[frozenset[str], frozenset[str]]:
    """The names of options given on the command line, and of those set otherwise. Removes both from the parameters."""
    chosen = frozenset(name for name in _NAMES if ctx.params.pop(name))
    typed = frozenset(name for name in chosen if ctx.get_parameter_source(name).name == "COMMANDLINE")
    return typed, chosen - typed
