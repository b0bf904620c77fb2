"""`granite4v extract`: extracts tables, chart data and fields from documents, in a run that can be resumed."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from granite4v.cli import options
from granite4v.cli.extract_output import Printer, RunProgress, print_records, summary
from granite4v.cli.loading import ModelOptions, grouped
from granite4v.cli.progress import Progress
from granite4v.cli.streams import PipeClosed
from granite4v.errors import ArgumentError

if TYPE_CHECKING:
    from granite4v.runtime.extract import Extraction, ExtractOptions

EXIT_FAILURE = 1
RAY = "--ray"
RayOption = Annotated[
    str | None,
    typer.Option(
        RAY,
        metavar="[ADDRESS]",
        help="Read the pages on the nodes of the Ray cluster at ADDRESS (host:port); without one, on the cluster of "
        "this machine, or on one that is started for this run. A worker has all cores of its node, or --threads of "
        "them, and --parallel answers at once. Needs the extra 'ray'.",
        show_default="in this process",
    ),
]
WatchOption = Annotated[
    Path | None,
    typer.Option(
        "--watch",
        metavar="DIR",
        help="Read the files of DIR and those that come into it, each when it has not changed for 2 seconds, until "
        "Ctrl-C; in place of INPUT. Needs --out, outside of DIR.",
        show_default=False,
    ),
]
_ADDRESS = re.compile(r"auto|local|ray://.+|(\[[\da-f:.]+\]|[\w.-]+):\d+", re.IGNORECASE)


def with_ray_address(arguments: list[str]) -> list[str]:
    """Inserts the address 'auto' after every `--ray` that no address follows, so that an input may follow instead.

    `--ray scans/` becomes `--ray auto scans/`; `--ray node1:6379` stays. Arguments after `--` are not changed.
    """
    found = []
    for place, argument in enumerate(arguments):
        found.append(argument)
        if argument == "--":
            return [*found, *arguments[place + 1 :]]
        if argument == RAY and not _ADDRESS.fullmatch("".join(arguments[place + 1 : place + 2])):
            found.append("auto")
    return found


@grouped
def extract(
    *,
    inputs: options.ExtractedArgument = None,
    loading: ModelOptions,
    task: options.TasksOption = None,
    schema: options.SchemaOption = None,
    prompt: options.QuestionOption = None,
    pages: options.PagesOption = None,
    password: options.PasswordOption = None,
    crop: options.CropOption = None,
    out: options.OutOption = None,
    formats: options.FormatsOption = None,
    csv_safe: options.CsvSafeOption = False,
    report: options.ReportOption = False,
    confidence: options.ConfidenceOption = False,
    as_json: options.JsonLinesOption = False,
    watch: WatchOption = None,
    resume: options.ResumeOption = False,
    retry_failed: options.RetryFailedOption = False,
    unconstrained: options.UnconstrainedOption = False,
    max_tokens: options.AnswerTokensOption = None,
    lora: options.LoraOption = None,
    page_store: options.StorePagesOption = False,
    parallel: options.ParallelOption = None,
    ray: RayOption = None,
    drafting: options.DraftingOption = True,
) -> None:
    """Extract tables, chart data and fields from documents.

    With --out, every finished record is written to DIR/results.jsonl immediately, and --resume continues an interrupted
    run. A page that fails becomes a record with its error. The exit status is 1 if a page failed, if an answer is
    invalid or was cut off, or if a file could not be written.
    """
    from granite4v.runtime.extract import ExtractOptions

    chosen = ExtractOptions(
        tasks=task or (),
        schema=schema,
        prompt=prompt,
        out=out,
        formats=formats or (),
        pages=pages,
        password=password,
        crop=crop,
        resume=resume,
        unconstrained=unconstrained,
        max_tokens=max_tokens,
        report=report,
        confidence=confidence,
        csv_safe=csv_safe,
        retry_failed=retry_failed,
        **loading.settings(),
        page_store=page_store,
        lora=lora,
        parallel=parallel,
        drafting=drafting,
    )
    if out is None and confidence and not as_json:
        raise typer.BadParameter("it goes into records; give --out or --json.", param_hint="--confidence")
    if out is None and not as_json and len(formats or []) > 1:
        raise typer.BadParameter("one format can be printed; give --out for several.", param_hint="--format")
    with Progress() as progress:
        shown = RunProgress(progress)
        printer = Printer(as_json=as_json, out=out, table_format=formats[0] if formats else None, say=progress.say)
        if watch is not None:
            from granite4v.cli.extract_watch import follow

            if ray is not None:
                raise typer.BadParameter("it goes without --ray.", param_hint="--watch")
            follow(watch, inputs or [], chosen, loading.model, printer, shown)
        with _begin(inputs or [], chosen, loading.model, ray, shown) as run:
            print_records(run, printer, shown)
        progress.note(summary(run.state, time.monotonic() - run.state.began))
    printer.list_files(run.state)
    if isinstance(printer.failure, PipeClosed):
        raise printer.failure
    if run.state.incomplete or printer.failure is not None:
        raise typer.Exit(EXIT_FAILURE)


def _begin(
    inputs: list[str], chosen: ExtractOptions, model: str | None, ray: str | None, shown: RunProgress
) -> Extraction:
    from granite4v.default_model import on_ray
    from granite4v.runtime.extract import begin
    from granite4v.runtime.extract.arguments import checked

    try:
        checked(inputs, chosen)  # report wrong usage before the embedded model is converted
        found = on_ray(model, options.model_path(model), ray)
        return begin(inputs, chosen, model=found, watch=shown.watch, say=shown.say)
    except ArgumentError as error:
        raise typer.BadParameter(str(error)) from None
