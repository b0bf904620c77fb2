"""The `granite4v` command: registers the subcommands, and turns expected failures into a message and an exit status.

Command modules import nothing heavy at module level, so that `--help` is fast.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from granite4v.cli import config_file, verbosity
from granite4v.cli.ask import ask
from granite4v.cli.bench import bench
from granite4v.cli.cache import clear_pages, list_pages, verify_pages
from granite4v.cli.chat import chat
from granite4v.cli.convert import convert
from granite4v.cli.doctor import doctor
from granite4v.cli.export import export
from granite4v.cli.extract import extract, with_ray_address
from granite4v.cli.inspect import inspect
from granite4v.cli.models import list_models, path, pull, remove
from granite4v.cli.options import fill_in_tasks
from granite4v.cli.outcome import conclude, explain
from granite4v.cli.requantize import requantize
from granite4v.cli.serve import serve
from granite4v.cli.verify import verify


@contextlib.contextmanager
def _concluding() -> Iterator[None]:
    """Turns an expected failure into a message and an exit status. Other exceptions are bugs and pass through."""
    try:
        yield
    except BaseException as error:
        if explain(error) is None:
            raise
        raise typer.Exit(conclude(error)) from None


class Command(TyperCommand):
    """A command with --quiet and --verbose, and with defaults of its options from the config file."""

    def __init__(self, *args: Any, **extra: Any) -> None:
        super().__init__(*args, **extra)
        self.params += verbosity.verbosity_options()

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        config_file.check(ctx, self.params)
        rest = super().parse_args(ctx, args)
        verbosity.set_verbosity(verbosity.take(ctx))
        ctx.call_on_close(lambda: verbosity.set_verbosity(verbosity.Verbosity.NORMAL))
        return rest

    def format_options(self, ctx: Any, formatter: Any) -> None:
        config_file.show(ctx, self.params)
        super().format_options(ctx, formatter)


class ExtractCommand(Command):
    """The `extract` command: its help lists the tasks, and its `--ray` may be given without an address."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        fill_in_tasks(self.params)
        super().format_options(ctx, formatter)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, with_ray_address(args))


class Commands(TyperGroup):
    """The group of all commands, and the only place where their exceptions become exit statuses."""

    def __init__(self, *args: Any, **extra: Any) -> None:
        super().__init__(*args, **extra)
        self.params += verbosity.verbosity_options()

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        verbosity.take_before_command(ctx)
        return rest

    def make_context(self, *args: Any, **extra: Any) -> Any:
        with _concluding():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: Any) -> Any:
        with _concluding():
            config_file.apply(ctx, self)
            return super().invoke(ctx)


app = typer.Typer(
    cls=Commands,
    name="granite4v",
    help="Run document-understanding vision-language models on laptops and CPU-only servers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        import granite4v
        from granite4v.doctor.native import probe

        typer.echo(f"granite4v {granite4v.__version__}")
        found = probe()
        typer.echo(found.build.summary if found.build else f"llama-cpp-python cannot be used: {found.error}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the versions and the build, and exit."
        ),
    ] = False,
) -> None:
    """Run document-understanding vision-language models on laptops and CPU-only servers."""


models_app = typer.Typer(
    help="Fetch, list and remove models of the Hugging Face hub.", no_args_is_help=True, rich_markup_mode=None
)
models_app.command("list", cls=Command)(list_models)
models_app.command("pull", cls=Command)(pull)
models_app.command("rm", cls=Command)(remove)
models_app.command("path", cls=Command)(path)

cache_app = typer.Typer(
    help="List, remove and check the pages that are kept on disk.", no_args_is_help=True, rich_markup_mode=None
)
cache_app.command("list", cls=Command)(list_pages)
cache_app.command("clear", cls=Command)(clear_pages)
cache_app.command("verify", cls=Command)(verify_pages)

for command in (convert, requantize, ask, chat, serve, extract, export, inspect, verify, bench, doctor):
    app.command(cls=ExtractCommand if command is extract else Command)(command)
app.add_typer(cache_app, name="cache")
app.add_typer(models_app, name="models")
