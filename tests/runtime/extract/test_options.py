"""Tests of the options of a run: the function, the command and the type hints agree."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import pytest

from granite4v.cli.extract import extract as command
from granite4v.runtime.extract import ArgumentError, ExtractOptions, extract
from granite4v.runtime.extract.arguments import checked
from granite4v.runtime.extract.options import ExtractFields


def test_keyword_arguments_are_the_fields() -> None:
    """Type checkers get each one by name; the keyword has the known values where the field takes any text."""
    fields = {field.name: str(field.type) for field in dataclasses.fields(ExtractOptions)}
    keywords = {name: kind.__forward_arg__ for name, kind in ExtractFields.__annotations__.items()}
    assert fields.pop("tasks") and list(fields) == list(keywords)
    assert fields.pop("formats") == keywords.pop("formats").replace("Format", "str")
    assert fields == keywords


def test_the_command_has_an_option_for_every_field_but_one() -> None:
    here = {"tasks": "task", "n_ctx": "ctx_size", "n_threads": "threads"}
    names = {here.get(field.name, field.name) for field in dataclasses.fields(ExtractOptions)}
    assert names - set(inspect.signature(command).parameters) == {"fast_forward"}  # only for tests of the grammars


def test_checked_options_are_in_one_form() -> None:
    paths, options = checked(Path("a.png"), ExtractOptions(tasks="<tables_html>", formats="csv", crop=(1, "2%", 3, 4)))
    assert paths == ("a.png",)
    assert (options.tasks, options.formats, options.crop) == (("tables_html",), ("csv",), "1,2%,3,4")
    assert checked(paths, options) == (paths, options)
    assert options.settings == {"max_tokens": None, "unconstrained": False, "fast_forward": True, "lora": None}


def test_a_password_is_not_shown() -> None:
    assert "secret" not in repr(ExtractOptions(password="secret"))


def test_an_option_that_there_is_not_is_refused() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'free'"):
        extract("a.png", "tables_html", model="out", free=True)  # type: ignore[call-arg]


def test_numbers_that_are_none_are_refused() -> None:
    for max_tokens, message in ((0, "max_tokens is 0"), (1.5, "max_tokens is 1.5"), (True, "max_tokens is True")):
        with pytest.raises(ArgumentError, match=message):
            checked("a.png", ExtractOptions(tasks="tables_html", max_tokens=max_tokens))  # type: ignore[arg-type]
