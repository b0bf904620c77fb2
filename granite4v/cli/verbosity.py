"""How much a command says on stderr: `--quiet` and `--verbose`, the same for all commands.

Normally there is progress, there are notes, and what is wrong. Quiet leaves out progress and notes; errors stay, and
what concerns the result itself: a page that failed, an answer that was cut off, an image read otherwise than expected,
the address of a server.
Verbose adds timings and what the package logs, llama.cpp's own log among it.
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
_BEFORE_COMMAND = "granite4v.verbosity"  # in the meta data that contexts share: what stands before the command's name
_LOGGER = logging.getLogger("granite4v")
_current, _handler = Verbosity.NORMAL, logging.StreamHandler()


def set_verbosity(wanted: Verbosity) -> None:
    """For this process, until it is set again."""
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
    """Prints a line on stderr that a user may do without."""
    if not is_quiet():
        print(clean(text, keep=""), file=sys.stderr, flush=True)


def show_timings(what: str, timings: Mapping[str, float]) -> None:
    """Prints, for --verbose, the seconds and counts of an answer under the names that they have in records."""
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
    """Declares them: classes of options differ between versions of typer."""


def verbosity_options() -> list[Any]:
    """`--quiet` and `--verbose`, for a command or a group."""
    holder = typer.Typer(add_completion=False)
    holder.command()(_options)
    return typer.main.get_command(holder).params


def take_before_command(ctx: Any) -> None:
    """Takes the options of a group out of its parameters, for the command that follows."""
    ctx.meta[_BEFORE_COMMAND] = _taken(ctx)[0]


def take(ctx: Any) -> Verbosity:
    """Takes the options out of a command's parameters. What is typed, in either place, has precedence over the config
    file. Raises BadParameter for both at once."""
    typed, configured = _taken(ctx)
    wanted = typed | ctx.meta.get(_BEFORE_COMMAND, frozenset()) or configured
    if len(wanted) > 1:
        if wanted is configured:
            raise Granite4vError("the config file sets both 'quiet' and 'verbose'; remove one of them.")
        raise typer.BadParameter("give --quiet or --verbose, not both.", ctx, param_hint="--quiet, --verbose")
    return Verbosity("".join(wanted))


def _taken(ctx: Any) -> tuple[frozenset[str], frozenset[str]]:
    """What stands on the command line, and what else is set."""
    chosen = frozenset(name for name in _NAMES if ctx.params.pop(name))
    typed = frozenset(name for name in chosen if ctx.get_parameter_source(name).name == "COMMANDLINE")
    return typed, chosen - typed
