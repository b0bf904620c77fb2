"""`extract` and `begin`: check a request, open what it needs, and return the run that reads the pages."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from granite4v.errors import ArgumentError
from granite4v.runtime.documents import count_pages
from granite4v.runtime.engine.parallel import Workload
from granite4v.runtime.extract.arguments import checked
from granite4v.runtime.extract.asking import Asker, ModelAsker
from granite4v.runtime.extract.attempts import FILE as ATTEMPTS
from granite4v.runtime.extract.attempts import Attempts
from granite4v.runtime.extract.batch import REPORT, Extraction, Job, Say
from granite4v.runtime.extract.cluster import OnRay, RayModel
from granite4v.runtime.extract.document_files import AboutResult
from granite4v.runtime.extract.earlier import earlier_error, earlier_source
from granite4v.runtime.extract.options import ExtractFields, ExtractOptions
from granite4v.runtime.extract.output_directory import OutputDirectory
from granite4v.runtime.extract.questions import Question, questions, schema_warnings
from granite4v.runtime.extract.report import is_report
from granite4v.runtime.extract.results_log import ResultsLog
from granite4v.runtime.extract.schema import Schema, load_schema
from granite4v.runtime.extract.state import State, Watch, waiting
from granite4v.runtime.extract.window import how_many
from granite4v.runtime.llama.fingerprint import model_hashes
from granite4v.runtime.model import Model

if TYPE_CHECKING:
    from typing_extensions import Unpack

_MEASURING = "measuring how many answers at once are worth while with this model on this machine, once"


def extract(
    inputs: Sequence[str | Path] | str | Path,
    tasks: Sequence[str] | str = (),
    *,
    model: Model | OnRay | str | Path,
    watch: Watch | None = None,
    say: Say | None = None,
    **options: Unpack[ExtractFields],
) -> Extraction:
    """Returns a lazy iterator over the records of every page of `inputs` and every task.

    `inputs`: images, PDFs, folders, globs or '-' for standard input. `model`: a loaded model, which stays open; a path
    as for `Model.load`; or an `OnRay`, which the nodes of a Ray cluster load. `watch` is called often with the state of
    the run; `say` is called with messages for the user (logged by the logger 'granite4v' by default). `tasks` and the
    other options: see `ExtractOptions`.

    `resume` continues a run that ended early, or adds to one: inputs, pages and tasks may differ from before, and
    existing records of anything not named are kept. Existing records are not returned again, nor computed again while
    their file is unchanged; a changed file is read again, and its new records replace the old ones. Failed records are
    kept too, except those of documents that can now be opened and of pages that ran out of memory; `retry_failed` reads
    every failed page again. An existing report is updated. A page on which the process died twice is not tried a third
    time. A run with a different model, schema, prompt, crop or other settings is refused.

    A page that fails becomes a record with its `error`; a file that cannot be written is reported to `say`. Errors in
    the request itself are raised here: ArgumentError and SelectionError for invalid arguments, SchemaError,
    DocumentError when there is nothing to read, PromptError for a task the model does not know, ConstraintError for a
    schema that cannot be enforced, OutputError for a directory that is not this run's, ModelFileError, DeviceError.
    While iterating: OutputError for a disk that is full, the last two, and what `watch` raises.
    """
    return begin(inputs, ExtractOptions(tasks=tasks, **options), model=model, watch=watch, say=say)


def begin(
    inputs: Sequence[str | Path] | str | Path,
    options: ExtractOptions,
    *,
    model: Model | OnRay | str | Path,
    watch: Watch | None = None,
    say: Say | None = None,
    within: str | Path | None = None,
) -> Extraction:
    """Starts a run like `extract`, with all options in one object.

    `within`: a folder that stands for the inputs, which are files in it or below it. `run.json` names the folder
    instead of the files, and output files keep their subfolders below it.
    """
    paths, options = checked(inputs, options)
    if not isinstance(model, str | Path | OnRay) and not hasattr(model, "prepare"):
        raise ArgumentError(f"the model is {model!r:.60}; expected a path, or what granite4v.load returns.")
    say = say or logging.getLogger("granite4v").info
    schema = None if options.schema is None else load_schema(options.schema, say)
    opened = contextlib.ExitStack()
    try:
        return _open(paths, options, schema, model, watch or _nothing, say, opened, within)
    except BaseException:
        opened.close()
        raise


def _open(
    paths: tuple[str, ...],
    options: ExtractOptions,
    schema: Schema | None,
    model: Model | OnRay | str | Path,
    watch: Watch,
    say: Say,
    opened: contextlib.ExitStack,
    within: str | Path | None,
) -> Extraction:
    """Opens what the run needs; adds whatever must be closed to `opened`, in the order of opening."""
    state, directory, log = State(), None, None
    named = paths if within is None else (str(within),)
    if options.out is not None:
        directory = OutputDirectory.claim(Path(options.out), resume=options.resume)
        opened.callback(directory.release)
        if directory.is_resumed:
            log = opened.enter_context(ResultsLog.open(directory.results))
        if options.report or directory.is_resumed:  # update an existing report, which would otherwise be outdated
            options = replace(options, report=is_report(directory.path / REPORT) or options.report)
    known = None if log is None or options.retry_failed else functools.partial(earlier_error, log)
    totals = count_pages(
        paths,
        pages=options.pages,
        password=options.password,
        earlier_error=known,
        earlier_source=None if log is None else earlier_source(log),
        waiting=waiting(state, watch),
    )
    for note in totals.notes:
        say(note)
    n_questions = None if totals.pages is None else totals.pages * len(options.tasks)
    loaded = _load(model, options, n_questions, say, opened)
    asked = questions(loaded, options.tasks, options.prompt, schema, unconstrained=options.unconstrained)
    for warning in schema_warnings(asked):
        say(AboutResult(f"warning: {warning}"))
    hashes = model_hashes(loaded.files, say)
    asker: Asker
    if isinstance(loaded, RayModel):
        asker = loaded.start(asked, hashes, n_questions, say)
    else:
        asker = ModelAsker(loaded, hashes, options, how_many(loaded, options, n_questions, say))
    if loaded.vision_note is not None:
        say(f"note: {loaded.vision_note}")
    if directory is not None:
        for remark in directory.begin(_manifest(named, asked, hashes, options, loaded, asker)):
            say(remark)
    if log is None:  # a new run: its first files are written only after all checks have passed
        log = opened.enter_context(ResultsLog.open(None if directory is None else directory.results))
    # on Ray, a page kills only its worker: this process survives, and `RayAsker` counts the deaths
    keeps = directory is not None and not isinstance(loaded, RayModel)
    attempts = Attempts(directory.path / ATTEMPTS if directory is not None and keeps else None)
    opened.callback(attempts.close)
    job = Job(loaded, asker, hashes, asked, options, paths, named, totals)
    return Extraction(job, directory, log, attempts, state, watch, say, opened)


def _load(
    model: Model | OnRay | str | Path,
    options: ExtractOptions,
    n_questions: int | None,
    say: Say,
    opened: contextlib.ExitStack,
) -> Model | RayModel:
    """Loads the model unless it is loaded already; a model that is loaded here is closed with `opened`."""
    if isinstance(model, OnRay):
        return opened.enter_context(RayModel(model, options))
    if not isinstance(model, str | Path):
        return model
    return opened.enter_context(load_model(model, options, n_questions, say))


def load_model(path: str | Path, options: ExtractOptions, n_questions: int | None, say: Say) -> Model:
    """Loads a model for runs with these options. `n_questions`: how many it will be asked; None if unknown."""
    return Model.load(
        path,
        n_ctx=options.n_ctx,
        n_threads=options.n_threads,
        device=options.device,
        mmproj=options.mmproj,
        vision_compute=options.vision_compute,
        cache_type=options.cache_type,
        page_store=options.page_store,
        n_parallel=options.parallel,
        workload=Workload(n_questions, options.max_tokens, lambda: say(_MEASURING)),
    )


def _manifest(
    inputs: Sequence[str],
    asked: Sequence[Question],
    hashes: Mapping[str, str],
    options: ExtractOptions,
    model: Model | RayModel,
    asker: Asker,
) -> dict[str, Any]:
    """Returns the content of `run.json`: what was requested, and the model and environment that were used."""
    vision_compute, cache_type = model.settings["vision_compute"], model.settings["cache_type"]
    quantized = {} if vision_compute == "file" else {"vision_compute": vision_compute}
    if cache_type == "q8_0":
        quantized["cache_type"] = cache_type
    schemas = [question.schema for question in asked if question.schema is not None]
    return {
        "granite4v": version("granite4v"),
        "inputs": list(inputs),
        "pages": options.pages,
        "crop": options.crop,
        "confidence": options.confidence,
        "tasks": [question.task for question in asked],
        "prompts": {question.task: question.prompt_sha256 for question in asked},
        "schema": schemas[0].sha256 if schemas else None,
        "model": dict(hashes),
        "settings": {**options.settings, "n_ctx": model.n_ctx, **quantized},
        # each of these can change results slightly: other numbers of threads or rows change the order of summation
        "environments": [
            {
                "granite4v": version("granite4v"),
                "llama_cpp_python": version("llama-cpp-python"),
                "n_threads": model.settings["n_threads"],
                "device": model.settings["device"],
                "parallel": asker.n_each,
                "drafting": asker.is_drafting,
            }
        ],
    }


def _nothing(state: State) -> None:
    pass
