"""The `granite4v` command: puts the commands together and turns expected failures into a message and a status.

Status 0: done. 1: an expected failure, one message on stderr. 2: wrong usage. 130: interrupted. Anything else
is a bug and keeps its traceback. Command modules import nothing heavy, so that `--help` returns at once.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from granite4v.cli.ask import ask
from granite4v.cli.bench import bench
from granite4v.cli.convert import convert
from granite4v.cli.extract import extract
from granite4v.cli.inspect import inspect
from granite4v.cli.verify import verify
from granite4v.errors import Granite4vError

EXIT_FAILURE = 1
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class Commands(TyperGroup):
    """The one place where an exception becomes an exit status."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Granite4vError as error:
            typer.echo(f"granite4v: {error}", err=True)
            raise typer.Exit(EXIT_FAILURE) from None
        except KeyboardInterrupt:
            typer.echo("granite4v: interrupted", err=True)
            raise typer.Exit(EXIT_INTERRUPTED) from None


app = typer.Typer(
    cls=Commands,
    name="granite4v",
    help="Runs document-reading vision-language models on ordinary machines.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        import granite4v

        typer.echo(f"granite4v {granite4v.__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Runs document-reading vision-language models on ordinary machines."""


for command in (convert, ask, extract, inspect, verify, bench):
    app.command()(command)


def entry() -> None:
    """What the console script calls."""
    app()
