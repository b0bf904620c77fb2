"""`extract`: checks a request, opens what it needs, and gives the run that reads the pages."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from granite4v.runtime.extract.arguments import as_paths, as_texts, check_arguments, check_texts
from granite4v.runtime.extract.attempts import FILE as ATTEMPTS
from granite4v.runtime.extract.attempts import Attempts
from granite4v.runtime.extract.batch import REPORT, Extraction, Job, OutputOptions, PageSelection
from granite4v.runtime.extract.earlier import earlier_error
from granite4v.runtime.extract.fingerprint import model_hashes
from granite4v.runtime.extract.output_directory import OutputDirectory
from granite4v.runtime.extract.page_records import Settings
from granite4v.runtime.extract.questions import ArgumentError, Question, check_tasks, questions, schema_warnings
from granite4v.runtime.extract.results_log import ResultsLog
from granite4v.runtime.extract.schema import SchemaSource, load_schema
from granite4v.runtime.extract.state import State, Watch, waiting

if TYPE_CHECKING:
    from granite4v.choices import Device
    from granite4v.runtime.model import Model

Say = Callable[[str], None]


def extract(
    inputs: Sequence[str | Path] | str | Path,
    tasks: Sequence[str] | str = (),
    *,
    model: Model | str | Path,
    schema: SchemaSource | None = None,
    prompt: str | None = None,
    out: str | Path | None = None,
    formats: Sequence[str] = (),
    pages: str | None = None,
    password: str | None = None,
    crop: Sequence[float | str] | str | None = None,
    resume: bool = False,
    unconstrained: bool = False,
    fast_forward: bool = True,
    max_tokens: int | None = None,
    report: bool = False,
    csv_safe: bool = False,
    retry_failed: bool = False,
    n_ctx: int | None = None,
    n_threads: int | None = None,
    device: Device = "auto",
    mmproj: str | Path | None = None,
    lora: bool | None = None,
    watch: Watch | None = None,
    say: Say | None = None,
) -> Extraction:
    """An iterator over the records of every page of `inputs` and every task, made as they are asked for.

    `inputs`: pictures, PDFs, folders, globs or '-' for standard input. `tasks`: of `outputs.TASKS`; 'kvp' needs
    `schema` (a JSON Schema file, a pydantic class or its path, or plain data), and `prompt` adds a free question.
    `model`: a loaded model, which stays open, or what `Model.load` takes; then `n_ctx`, `n_threads`, `device` and
    `mmproj` count. `pages` ('1-3,7'), `password` and `crop` ('x,y,w,h') choose what is read. `max_tokens`: of an
    answer; None for 4096, or what the context has room for. `unconstrained`: do not hold answers to the
    format of their task. `fast_forward` off: sample even where the format leaves one choice.

    `out`: a directory for `results.jsonl`, where every record is on the disk before it is given out, and for the
    converted files of each document (`formats`: of `documents.FORMATS`; their names are a record's `stem`, the task and
    a suffix); `csv_safe` writes CSV for spreadsheets, with a byte order mark and without cells that they would take
    for formulas; `report` adds `report.html`. `watch` is called often with the state of the run; `say` gets lines for
    a person (by default they go to the logger 'granite4v').

    `resume` goes on with a run that ended early, or adds to one: inputs, pages and tasks may be others than before,
    and what they do not name keeps its records. Records that are there are not given again, nor made again while their
    file is unchanged; a changed file is read again, and its new records replace the old ones. Failures stay, too,
    except those of documents that can be opened now and of pages for which there was not enough memory;
    `retry_failed` reads every failed page again. A report that is there is renewed. A page whose process died twice is
    not read a third time. Refused is a run with another model, schema, question, crop or other settings.

    A page that fails is a record with its `error`; a file that cannot be written is a line to `say`. What is wrong with
    the request itself is raised here: ArgumentError and SelectionError for arguments that cannot be, SchemaError,
    DocumentError when there is nothing to read, PromptError for a task the model does not know, ConstraintError for
    a schema that answers cannot be held to, OutputError for a directory that is not this run's, ModelFileError,
    DeviceError. While iterating: OutputError for a disk that is full, and the last two.
    """
    from granite4v.runtime.documents import count_pages, parse_crop

    paths, formats = as_paths(inputs), as_texts("'formats'", formats)
    check_texts(prompt=prompt, pages=pages, password=password)
    if not isinstance(model, str | Path) and not hasattr(model, "prepare"):
        raise ArgumentError(f"the model is {model!r:.60}; expected a path, or what granite4v.load returns.")
    tasks = check_tasks(as_texts("'tasks'", tasks), prompt, has_schema=schema is not None)
    check_arguments(
        paths,
        tasks,
        formats,
        out=out,
        resume=resume,
        report=report,
        max_tokens=max_tokens,
        csv_safe=csv_safe,
        retry_failed=retry_failed,
    )
    say = say or logging.getLogger("granite4v").info
    found = None if schema is None else load_schema(schema, say)
    selection = PageSelection(pages, password, None if crop is None else str(parse_crop(crop)))
    watch, state = watch or _nothing, State()
    folder = None if out is None else OutputDirectory.claim(Path(out), resume=resume)
    closing: list[Callable[[], None]] = [folder.release] if folder else []
    try:
        log = ResultsLog.open(folder.results) if folder is not None and folder.is_resumed else None
        closing[:0] = [log.close] if log is not None else []
        known = None if log is None or retry_failed else functools.partial(earlier_error, log)
        totals = count_pages(paths, pages=pages, password=password, earlier_error=known, waiting=waiting(state, watch))
        for note in totals.notes:
            say(note)
        if folder is not None and (report or folder.is_resumed):
            from granite4v.runtime.extract.report import is_report

            report |= is_report(folder.path / REPORT)  # one that is there would tell of an earlier state
        if isinstance(model, str | Path):
            from granite4v.runtime.model import Model

            model = Model.load(model, n_ctx=n_ctx, n_threads=n_threads, device=device, mmproj=mmproj)
            closing.insert(0, model.close)
        asked = questions(model, tasks, prompt, found, unconstrained=unconstrained)
        for warning in schema_warnings(asked):
            say(f"warning: {warning}")
        settings = Settings(None if max_tokens is None else int(max_tokens), unconstrained, fast_forward, lora)
        hashes = model_hashes(model.files, say)
        if folder is not None:
            for remark in folder.begin(_manifest(paths, asked, hashes, selection, settings, model)):
                say(remark)
        if log is None:  # of a new run: a directory gets its first file when nothing can be wrong any more
            log = ResultsLog.open(None if folder is None else folder.results)
            closing.insert(0, log.close)
        attempts = Attempts(None if folder is None else folder.path / ATTEMPTS)
        closing.insert(0, attempts.close)
        options = OutputOptions(tuple(formats), csv_safe, report)
        job = Job(model, hashes, asked, settings, selection, tuple(paths), totals, options, retry_failed)
        return Extraction(job, folder, log, attempts, state, watch, say, closing)
    except BaseException:
        for close in closing:
            close()
        raise


def _manifest(
    inputs: Sequence[str],
    asked: Sequence[Question],
    hashes: Mapping[str, str],
    selection: PageSelection,
    settings: Settings,
    model: Model,
) -> dict[str, Any]:
    from importlib.metadata import version

    schemas = [question.schema for question in asked if question.schema is not None]
    return {
        "granite4v": version("granite4v"),
        "inputs": list(inputs),
        "pages": selection.pages,
        "crop": selection.crop,
        "tasks": [question.task for question in asked],
        "prompts": {question.task: question.prompt_sha256 for question in asked},
        "schema": schemas[0].sha256 if schemas else None,
        "model": dict(hashes),
        "settings": {**asdict(settings), "n_ctx": model.n_ctx},
        "environments": [
            {
                "granite4v": version("granite4v"),
                "llama_cpp_python": version("llama-cpp-python"),
                "n_threads": model.settings["n_threads"],
                "device": model.settings["device"],
            }
        ],
    }


def _nothing(state: State) -> None:
    pass
