"""Generates docs/cli.md from the commands: `python -m scripts.cli_docs`. A test fails when the file is stale."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import typer.main

from granite4v.cli.main import app
from granite4v.cli.options import fill_in_tasks
from granite4v.cli.outcome import EXIT_STATUSES

TARGET = Path(__file__).resolve().parent.parent / "docs" / "cli.md"

INTRODUCTION = """\
# Command line

Written by `python -m scripts.cli_docs` from the commands' own help texts; edit those.

Results go to standard output, alone; progress, warnings, timings and errors go to standard error. On a terminal,
progress is one live line; elsewhere it is a plain line at the beginning of a stage and every ten seconds. Options may
stand before or after the arguments; `--quiet` and `--verbose`, which every command has, before its name as well.
`granite4v COMMAND --help` (or `-h`) prints what is listed here."""

CONFIG_FILE = """\
## Config file

Defaults of options, in TOML, in the file that `granite4v doctor` names: `granite4v/config.toml` in the user's config
directory, or `GRANITE4V_CONFIG`. The command line has precedence, then environment variables, then this file. A key is
an option without its dashes; an option like `--no-drafting` is `drafting = false`.

```toml
model = "~/models/granite"  # at the top: for every command that has the option and takes such a value
threads = 8

[extract]  # for one command
parallel = 4
format = ["csv", "xlsx"]  # of an option that may be repeated, a list

[models.list]
json = true
```

Paths are relative to the file's directory, and `~` is the home directory. What may also be something else, such as a
hub id, is a path if it begins with `~`, `./` or `../`, or if that file exists.

An unknown key, or a value of a kind that no such option takes, ends every command with status 1, so that none runs with
other settings than are meant; a value that only its option can judge, such as a number out of range, ends those that
have the option. A flag that the file turns on cannot be turned off on the command line unless it has a `--no-` form,
except that `--quiet` and `--verbose` replace each other."""

ON_EVERY_COMMAND = ("quiet", "verbose")

# Variables that the program or the libraries it calls read.
ENVIRONMENT = {
    "GRANITE4V_CACHE": "Directory for the embedded model once it is converted, the speed measured on this machine, "
    "compiled kernels, stored pages, and the lines typed into `chat`. Default: the user's cache directory.",
    "GRANITE4V_CONFIG": "The config file. Default: `config.toml` in `granite4v` in the user's config directory, "
    "which is `~/.config` on Linux; `granite4v doctor` tells which file it is.",
    "GRANITE4V_MODEL, GRANITE4V_THREADS": "What --model and --threads are where they are not given.",
    "GRANITE4V_MODELS": "Directory for models of the hub. Default: `models` in the user's data directory.",
    "HF_HOME, HF_TOKEN, HF_ENDPOINT": "Where `huggingface_hub` keeps the downloads of `convert` and its access token "
    "for gated repositories, that token itself, and the server that it downloads from.",
    "HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE": "Set to 1, only what is already downloaded is used.",
    "NO_COLOR": "Set to anything, the progress line and `chat` have no colours.",
    "TERM": "With `dumb`, a terminal gets plain progress lines, and answers of `chat` as they come.",
    "COLUMNS": "Width of the progress line and of help texts, where it is not the terminal's.",
    "PYTHONIOENCODING": "Encoding of standard output where that is not a terminal. Default: UTF-8.",
    "OMP_WAIT_POLICY, GOMP_SPINCOUNT": "How threads of OpenMP wait for each other. Default: they sleep if the machine "
    "is busy when a model is loaded, and spin otherwise.",
    "OMP_NUM_THREADS": "Number of CPU threads of a `DocumentReader` in a pipeline, which Ray sets for its workers.",
    "RAY_ADDRESS, RAY_USAGE_STATS_ENABLED": "Ray's own: the cluster of `--ray` without an address; whether a cluster "
    "reports usage statistics, which one that `extract` starts never does.",
}


def document() -> str:
    """Returns the complete text of docs/cli.md."""
    group = typer.main.get_command(app)
    commands = dict(_commands(group))
    sections = [INTRODUCTION, "\n".join(_contents(commands)), _options(group.params)]
    sections += [_command(name, command) for name, command in commands.items()]
    sections += [
        CONFIG_FILE,
        "## Exit statuses",
        _table(("Status", "Meaning"), ((str(status), meaning) for status, meaning in EXIT_STATUSES.items())),
        "A second signal during the clean-up after the first one is announced and ignored; a third ends the process "
        "at once.",
        "## Environment variables",
        _table(("Variable", "Meaning"), ((_code(names), meaning) for names, meaning in ENVIRONMENT.items())),
    ]
    return "\n\n".join(sections) + "\n"


def _commands(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every command with its full name, including those of groups."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def _contents(commands: dict[str, Any]) -> Iterator[str]:
    for name, command in commands.items():
        yield f"- [`granite4v {name}`](#granite4v-{name.replace(' ', '-')}): {_paragraphs(command)[0]}"
    yield "- [Config file](#config-file)"
    yield "- [Exit statuses](#exit-statuses) and [environment variables](#environment-variables)"


def _command(name: str, command: Any) -> str:
    fill_in_tasks(command.params)
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    options = [
        param
        for param in command.params
        if param.param_type_name == "option" and not param.hidden and param.name not in ON_EVERY_COMMAND
    ]
    required = [_spelling(option) for option in options if option.required]
    usage = " ".join(["granite4v", name, *map(_placeholder, arguments), *required, "[OPTIONS]"])
    parts = [f"## granite4v {name}", f"```\n{usage}\n```", *map(_text, _paragraphs(command))]
    if arguments:
        parts.append(_table(("Argument", "Meaning"), ((_code(p.metavar), _text(p.help)) for p in arguments)))
    return "\n\n".join([*parts, *([_options(options)] if options else [])])


def _options(options: Sequence[Any]) -> str:
    rows = ((_code(_spelling(option)), f"{_text(option.help)}{_extra(option)}") for option in options)
    return _table(("Option", "Meaning"), rows)


def _paragraphs(command: Any) -> list[str]:
    return [" ".join(paragraph.split()) for paragraph in (command.help or "").split("\n\n")]


def _placeholder(argument: Any) -> str:
    name = str(argument.metavar)
    several = argument.nargs == -1 and not name.endswith("...")
    name = f"{name}..." if several else name
    return name if argument.required else f"[{name}]"


def _spelling(option: Any) -> str:
    """`--model DIR`, `--lora/--no-lora`, `--device auto|cpu|cuda|metal`."""
    names = "/".join([*option.opts, *option.secondary_opts])
    if option.is_flag:
        return names
    value = option.metavar or "|".join(map(str, getattr(option.type, "choices", ()))) or option.type.name.upper()
    return f"{names} {value}"


def _extra(option: Any) -> str:
    """Returns the limits of a number, and the default or that the option is required."""
    notes = []
    lowest, highest = getattr(option.type, "min", None), getattr(option.type, "max", None)
    if lowest is not None:
        notes.append(f"From {lowest} to {highest}." if highest is not None else f"At least {lowest}.")
    if option.required:
        notes.append("Required.")
    elif isinstance(option.show_default, str):
        notes.append(f"Default: {option.show_default}.")
    elif not option.is_flag and option.default is not None:
        default = getattr(option.default, "value", option.default)
        notes.append(f"Default: `{default:g}`." if isinstance(default, float) else f"Default: `{default}`.")
    return "".join(f" {note}" for note in notes)


def _text(text: str) -> str:
    """Marks options in prose as code."""
    return re.sub(r"--[a-z][\w-]*", r"`\g<0>`", text).replace("|", "\\|")


def _code(text: str) -> str:
    """Marks names as code in a table cell, with bars escaped, since a bar would end the cell."""
    return ", ".join(f"`{part}`" for part in text.split(", ")).replace("|", "\\|")


def _table(heading: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    lines = [heading, ("---", "---"), *rows]
    return "\n".join(f"| {left} | {right} |" for left, right in lines)


def main() -> None:
    TARGET.write_text(document(), encoding="utf-8")
    print(TARGET)


if __name__ == "__main__":
    main()
