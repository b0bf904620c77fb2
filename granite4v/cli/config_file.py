"""Reads the config file: defaults of options, in TOML, for all commands or for one.

A key is an option's name without its dashes. At the top of the file, it applies to every command that has the option
and accepts this type of value; in a table named after a command or a group of commands, only to that one. Environment
variables and the command line take precedence. Keys and types of values are checked for all commands, whichever one
runs. What only the option itself can check, such as a range, is checked when its command runs.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import typer

from granite4v.errors import Granite4vError
from granite4v.paths import config_file

MAX_BYTES = 1 << 16  # a file with all options of all commands has a tenth of it
PATHS = {"DIR", "FILE", "HF_DIR", "PATH"}  # metavars of options that take paths
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text in quotes"}
Place = tuple[str, ...]  # the keys that lead to a value in the file
_META = "granite4v.config"  # key in `ctx.meta`, which nested contexts share


class ConfigError(Granite4vError):
    """The config file cannot be read, or has a key or value that no option accepts."""


def apply(ctx: Any, group: Any) -> None:
    """Reads the config file, and makes its values the defaults of the commands of `group`. `ctx`: the group's context.
    Raises ConfigError."""
    config = read()
    if config is not None:
        ctx.meta[_META] = config
        ctx.default_map = config.defaults(group)


def check(ctx: Any, options: Iterable[Any]) -> None:
    """Raises ConfigError if an option of this context's command rejects its value in the config file."""
    config = ctx.meta.get(_META)
    for option in options if config is not None else ():
        if option.name in (ctx.default_map or {}):
            try:
                option.process_value(ctx, ctx.default_map[option.name])
            except typer.BadParameter as error:
                config.refuse(_path_of(ctx, option), f"{error.message.rstrip('.')}; correct it.")


def show(ctx: Any, options: Iterable[Any]) -> None:
    """Makes help texts say which defaults come from the config file."""
    for option in options:
        value = (ctx.default_map or {}).get(option.name)
        if value is not None and option.show_default is not False:
            spelled = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            option.show_default = f"{spelled.lower() if option.is_flag else spelled}, from '{ctx.meta[_META].path}'"


def read() -> ConfigFile | None:
    """Reads the config file; None if there is none. Raises ConfigError if it cannot be read, or if GRANITE4V_CONFIG
    names a file that does not exist."""
    path = config_file()
    is_named = bool(os.environ.get("GRANITE4V_CONFIG"))
    if path is None or not (is_named or _is_there(path)):
        return None
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ConfigError(f"'{path}' has more than {MAX_BYTES:,} bytes, which is no config file; name another one.")
        text = content.decode("utf-8-sig").replace("\r\n", "\n")
        return ConfigFile(path, text, parse(text))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        what = "is not valid TOML" if isinstance(error, ValueError) else "cannot be read"
        why = getattr(error, "strerror", None) or error
        advice = "correct it, or set GRANITE4V_CONFIG to the path of another one" + (
            "" if is_named else ", or remove it"
        )
        raise ConfigError(f"the config file '{path}' {what}: {why}; {advice}.") from None


def parse(text: str) -> dict[str, Any]:
    """Parses TOML. Raises ValueError, whose message has the position, if it is invalid."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)


class ConfigFile:
    def __init__(self, path: Path, text: str, tables: dict[str, Any]) -> None:
        self.path, self._text, self._tables = path, text, tables
        self._places: dict[tuple[str, ...], Place] = {}  # places of values, by the names of the command and the option

    def defaults(self, group: Any) -> dict[str, Any]:
        """The values by parameter name, for each command, nested as click's `default_map`. Raises ConfigError."""
        return self._of_group(group, self._tables, {}, ())

    def refuse(self, command_and_option: tuple[str, ...], problem: str) -> NoReturn:
        """Raises ConfigError about the value of an option in this file."""
        place = self._places[command_and_option]
        raise self._error(place, f"'{place[-1]}': {problem}")

    def _of_group(self, group: Any, table: dict[str, Any], outer: dict[str, Place], place: Place) -> dict[str, Any]:
        """The defaults for a group. `place`: place of the group's table. `outer`: places of the keys in enclosing
        tables, which apply to this group as well."""
        commands = group.commands
        known = [found for command in commands.values() for found in _options(command)]
        own = {key: (*place, key) for key in table if key not in commands}
        for key, where in own.items():
            self._check(key, table[key], where, known, [*commands])
        defaults = {}
        for name, command in commands.items():
            inner = table.get(name, {})
            if not isinstance(inner, dict):
                raise self._error((*place, name), f"'{name}' is a command, whose options stand in a table: [{name}].")
            of_this = self._of_group if hasattr(command, "commands") else self._of_command
            defaults[name] = of_this(command, inner, {**outer, **own}, (*place, name))
        return defaults

    def _of_command(self, command: Any, table: dict[str, Any], outer: dict[str, Place], place: Place) -> dict[str, Any]:
        options = _options(command)
        for key, value in table.items():
            self._check(key, value, (*place, key), options, [])
        defaults = {}
        for key, option in options:
            where = (*place, key) if key in table else outer.get(key)
            if where is not None and _fits(option, self._value(where)):
                defaults[option.name] = self._located(option, self._value(where))
                of_option = (*place, option.name)
                self._places[of_option] = where
        return defaults

    def _check(self, key: str, value: Any, place: Place, known: list[tuple[str, Any]], commands: list[str]) -> None:
        """Raises ConfigError unless an option with this name accepts this type of value."""
        options = [option for name, option in known if name == key]
        if any(_fits(option, value) for option in options):
            return
        if options:
            kinds = " or ".join(dict.fromkeys(map(_kind, options)))
            raise self._error(place, f"'{key}' is {_spelled(value)}; expected {kinds}.")
        is_table = isinstance(value, dict) and bool(commands)
        near = difflib.get_close_matches(
            key.replace("_", "-"), commands if is_table else [name for name, _ in known], 1
        )
        advice = f"did you mean '{near[0]}'?" if near else "'granite4v COMMAND --help' lists them."
        if is_table:
            what = "is no command"
        else:
            what = f"is no option of {' '.join(('granite4v', *place[:-1])) if place[1:] else 'any command'}"
        raise self._error(place, f"'{key}' {what}; {advice}")

    def _value(self, place: Place) -> Any:
        found: Any = self._tables
        for key in place:
            found = found[key]
        return found

    def _located(self, option: Any, value: Any) -> Any:
        """Resolves a path relative to the folder of the config file; other values are returned as they are.

        If the option also accepts something other than a path, the value is a path if it begins with '~', './' or
        '../', or if the file exists.
        """
        if isinstance(value, list):
            return [self._located(option, one) for one in value]
        words = set((option.metavar or "").split("|"))
        if not isinstance(value, str) or not words & PATHS:
            return value
        path = str(self.path.parent / os.path.expanduser(value))
        is_path = words <= PATHS or value.startswith(("~", "./", "../")) or os.path.exists(path)
        return path if is_path else value

    def _error(self, place: Place, problem: str) -> ConfigError:
        line = line_of(self._text, place)
        table = f" [{'.'.join(place[:-1])}]" if len(place) > 1 else ""
        return ConfigError(f"the config file '{self.path}'{'' if line is None else f', line {line}'}:{table} {problem}")


def line_of(text: str, place: Place) -> int | None:
    """Finds the line on which a value of a TOML file begins, counted from 1; None if there is no such value.

    Parses longer and longer beginnings of the file until one has the value. A beginning that ends in the middle of a
    multi-line value is not valid TOML and is skipped, so the value begins on the line after the last valid beginning.
    """
    lines, before = text.split("\n"), 0
    for n in range(1, len(lines) + 1):
        try:
            found: Any = parse("\n".join(lines[:n]))
        except ValueError:  # ends in the middle of a value
            continue
        for key in place:
            found = found.get(key) if isinstance(found, dict) else None
        if found is not None:
            return before + 1
        before = n
    return None


def _is_there(path: Path) -> bool:
    """Whether the file exists; also False if this user may not enter one of its parent folders."""
    try:
        path.stat()
    except (OSError, ValueError):
        return False
    return True


def _options(command: Any) -> list[tuple[str, Any]]:
    """The (key, option) pairs of a command, or of all commands of a group."""
    if hasattr(command, "commands"):
        return [found for inner in command.commands.values() for found in _options(inner)]
    return [(_key(param), param) for param in command.params if param.param_type_name == "option" and not param.hidden]


def _key(option: Any) -> str:
    """The key of an option: 'threads' for --threads, 'lora' for --lora/--no-lora, 'drafting' for --no-drafting."""
    names = [name for name in option.opts if name.startswith("--")]
    return re.sub("^--", "", names[0]) if names else re.sub("^--no-", "", option.secondary_opts[0])


def _type(option: Any) -> type:
    name = "boolean" if option.is_flag else option.type.name
    return {"boolean": bool, "integer": int, "float": float}.get(name.split()[0], str)


def _fits(option: Any, value: Any) -> bool:
    if option.multiple:
        return isinstance(value, list) and all(_is_of(_type(option), one) for one in value)
    return _is_of(_type(option), value)


def _is_of(wanted: type, value: Any) -> bool:
    return type(value) is wanted or (wanted is float and type(value) is int)


def _kind(option: Any) -> str:
    return f"a list, each of it {_KINDS[_type(option)]}" if option.multiple else _KINDS[_type(option)]


def _spelled(value: Any) -> str:
    if isinstance(value, dict):
        return "a table"
    spelled = str(value).lower() if isinstance(value, bool) else repr(value)
    return spelled if len(spelled) <= 60 else f"{spelled[:57]}..."


def _path_of(ctx: Any, option: Any) -> tuple[str, ...]:
    names: tuple[str, ...] = (option.name,)
    while ctx.parent is not None:
        names, ctx = (ctx.info_name, *names), ctx.parent
    return names
