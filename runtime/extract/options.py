"""What a run reads, asks and writes: one set of options for the Python API, the command line and `run.json`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from granite4v.choices import Device, Format
from granite4v.runtime.extract.schema import SchemaSource


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """The options of `extract`, as a caller gives them; `arguments.checked` finds what is wrong with them.

    What is asked. `tasks`: names of `formats.TASKS`; 'kvp' needs `schema` (a JSON Schema file, a pydantic class or its
    path, or plain data). `prompt` adds a question in the user's own words.

    What is read. `pages` ('1-3,7') of each document, `password` of encrypted PDFs, `crop` ('x,y,width,height').

    How answers are made; all of it can change them. `max_tokens`: the most tokens of an answer; None for 4096, or what
    the context has room for. `unconstrained`: do not hold answers to the format of their task. `fast_forward` off:
    sample even where the format leaves one choice. `lora`: whether a separate adapter is applied; None follows the
    model's policy. `n_ctx`, `n_threads`, `device` and `mmproj` are for loading a model that is given by its path.

    What is written. `out`: a directory for `results.jsonl`, where every record is on the disk before it is returned,
    and for the converted files of each document. `formats`: of tables and chart data (`document_files.FORMATS`); none
    for the format each task answers in. `csv_safe`: CSV for spreadsheets, with a byte order mark and without cells that
    they would take for formulas. `report`: also `report.html`, each page beside its values.

    Going on. `resume`: continue a run that ended early, or add to one. `retry_failed`: read failed pages again.
    """

    tasks: Sequence[str] | str = ()
    schema: SchemaSource | None = None
    prompt: str | None = None
    out: str | Path | None = None
    formats: Sequence[str] | str = ()
    pages: str | None = None
    password: str | None = field(default=None, repr=False)
    crop: Sequence[float | str] | str | None = None
    resume: bool = False
    unconstrained: bool = False
    fast_forward: bool = True
    max_tokens: int | None = None
    report: bool = False
    csv_safe: bool = False
    retry_failed: bool = False
    n_ctx: int | None = None
    n_threads: int | None = None
    device: Device = "auto"
    mmproj: str | Path | None = None
    lora: bool | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What decides how answers are made, as `run.json` has it: a run is not resumed with other settings."""
        names = ("max_tokens", "unconstrained", "fast_forward", "lora")
        return {name: getattr(self, name) for name in names}


class ExtractFields(TypedDict, total=False):
    """The fields of `ExtractOptions`, without `tasks`, as keyword arguments for type checkers. A test holds the two
    together; formats and devices are the words that exist."""

    schema: SchemaSource | None
    prompt: str | None
    out: str | Path | None
    formats: Sequence[Format] | Format
    pages: str | None
    password: str | None
    crop: Sequence[float | str] | str | None
    resume: bool
    unconstrained: bool
    fast_forward: bool
    max_tokens: int | None
    report: bool
    csv_safe: bool
    retry_failed: bool
    n_ctx: int | None
    n_threads: int | None
    device: Device
    mmproj: str | Path | None
    lora: bool | None
