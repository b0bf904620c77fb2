"""The options of an extraction run: one set for the Python API, the command line and `run.json`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from granite4v.choices import CacheType, Device, Format, VisionCompute
from granite4v.runtime.extract.schema import SchemaSource


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """The options of `extract`, as given by the caller; `arguments.checked` validates them.

    What is asked. `tasks`: names of `formats.TASKS`; 'kvp' needs `schema` (a JSON Schema file, a pydantic class or its
    path, or plain data). `prompt` adds a custom prompt.

    What is read. `pages` ('1-3,7') of each document, `password` of encrypted PDFs, `crop` ('x,y,width,height').

    How answers are generated; each of these can change them. `max_tokens`: maximum number of tokens of an answer; None
    for 4096, or as many as fit into the context. `unconstrained`: do not constrain answers to the format of their task.
    `fast_forward` off: sample even tokens that the grammar forces. `lora`: whether a separate adapter is applied; None
    follows the model's policy. `n_ctx`, `n_threads`, `device`, `mmproj`, `vision_compute`, `cache_type` and
    `page_store` (which changes no answer) apply when the model is given as a path; see `Model.load`.

    How fast. `parallel`: the most answers that are generated at once; None for a number that suits the model, or for
    the number that a loaded model was loaded for. `drafting`: use text that the page repeats, and what another task has
    read from it, as draft tokens; never with one answer at a time.

    What is written. `out`: a directory for `results.jsonl`, to which every record is written before it is returned, and
    for the converted files of each document. `formats`: of tables and chart data (`document_files.FORMATS`); by default
    the format of each task's answers. `csv_safe`: CSV for spreadsheets, with a byte order mark and with formulas
    escaped. `report`: also write `report.html`, which shows each page next to its values. `confidence`: store the token
    probabilities of each cell and field in the records, and list the least certain ones in the report.

    Resuming. `resume`: continue a run that ended early, or add to one. `retry_failed`: read failed pages again.
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
    confidence: bool = False
    csv_safe: bool = False
    retry_failed: bool = False
    n_ctx: int | None = None
    n_threads: int | None = None
    device: Device = "auto"
    mmproj: str | Path | None = None
    vision_compute: VisionCompute = "file"
    cache_type: CacheType | None = None
    page_store: bool = False
    lora: bool | None = None
    parallel: int | None = None
    drafting: bool = True

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that affect answers, as stored in `run.json`: a run cannot be resumed with different ones."""
        names = ("max_tokens", "unconstrained", "fast_forward", "lora")
        return {name: getattr(self, name) for name in names}


class ExtractFields(TypedDict, total=False):
    """The fields of `ExtractOptions` except `tasks`, as keyword arguments for type checkers. A test keeps the two in
    sync; formats and devices are literal types."""

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
    confidence: bool
    csv_safe: bool
    retry_failed: bool
    n_ctx: int | None
    n_threads: int | None
    device: Device
    mmproj: str | Path | None
    vision_compute: VisionCompute
    cache_type: CacheType | None
    page_store: bool
    lora: bool | None
    parallel: int | None
    drafting: bool
