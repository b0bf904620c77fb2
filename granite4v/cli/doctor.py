"""`granite4v doctor`: reports what this machine and build offer, what is missing, and the command that fixes it."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Annotated

import typer

from granite4v.cli import options
from granite4v.cli.progress import Activity, Progress
from granite4v.cli.streams import to_json
from granite4v.cli.terminal import clean

if TYPE_CHECKING:
    from granite4v.doctor import Report, Section

WIDTH, INDENT = 80, 9
CheckedModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="DIR|HUB_ID",
        help="Model whose needs are compared with the memory.",
        show_default=False,
    ),
]


def doctor(model: CheckedModelOption = None, as_json: options.JsonOption = False) -> None:
    """Examine this machine, and say what would make it faster.

    Measures each kernel for each weight type, which takes about ten seconds. The exit status is 1 if something is
    broken, or costs half of the speed or more.
    """
    from granite4v.doctor import examine

    path = None if model is None else options.model_path(model, quiet=as_json)
    with Progress() as progress:
        report = examine(path, None if as_json else lambda step: progress.show(Activity(step)))
    typer.echo(to_json(report.as_json(), indent=2) if as_json else as_text(report))
    if not report.is_content:
        raise typer.Exit(1)


def as_text(report: Report) -> str:
    """Formats the report in 80 columns. Commands are on separate lines and not wrapped, so that they can be copied."""
    lines = [line for section in report.sections for line in _section(section)]
    for problem in report.problems:
        lines += ["", *_wrapped(problem.text, "problem" if problem.is_serious else "advice")]
        if problem.command:
            lines += ["", clean(problem.command, keep="")]
    if report.is_content:
        lines += [
            "",
            "Nothing is wrong." if not report.problems else "Nothing is broken or slow; what is above could be better.",
        ]
    return "\n".join(lines)


def _section(section: Section) -> list[str]:
    rows = [line for line in section.lines if isinstance(line, list)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines, label = [], section.name
    for line in section.lines:
        if isinstance(line, list):
            cells = [line[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(line[1:], widths[1:], strict=True))]
            lines.append(f"{label:<{INDENT}}{'  '.join(cells)}".rstrip())
        else:
            lines += _wrapped(line, label)
        label = ""
    return lines


def _wrapped(text: str, label: str) -> list[str]:
    return textwrap.wrap(
        clean(text, keep=""),
        WIDTH,
        initial_indent=f"{label:<{INDENT}}",
        subsequent_indent=" " * INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )
