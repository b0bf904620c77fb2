"""Arguments and options, declared once, so that all commands name, validate and document them the same way."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from granite4v.choices import MAX_THREADS, CacheType, Device, Format, VisionCompute
from granite4v.cli.values import finite, given_finite, unicode_text

NO_MODEL = (
    "no --model given: using the embedded 'nano', a small model trained on synthetic documents; give a real one with "
    "--model DIR"
)

# --- the model and the machine ---

ModelArgument = Annotated[Path, typer.Argument(metavar="DIR", help="Model directory, or a text GGUF file.")]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="DIR|HUB_ID",
        envvar="GRANITE4V_MODEL",
        help="Model directory written by 'granite4v convert', a text GGUF file, or a model of the Hugging Face hub "
        "such as 'owner/name:Q4_K_M', which is downloaded on first use.",
        show_default="the embedded 'nano'",
    ),
]
MmprojOption = Annotated[
    Path | None,
    typer.Option(
        "--mmproj", metavar="FILE", help="Vision GGUF file, if not in the same directory as the text GGUF file."
    ),
]
LoraOption = Annotated[
    bool | None,
    typer.Option(
        "--lora/--no-lora",
        help="Apply the model's separate LoRA adapter to every request, or to none.",
        show_default="requests with images only",
    ),
]
DeviceOption = Annotated[
    Device, typer.Option("--device", help="Where to compute. auto: a GPU if llama-cpp-python was built for one.")
]
VisionComputeOption = Annotated[
    VisionCompute,
    typer.Option(
        "--vision-compute",
        help="How matrices of a vision file in F32, F16 or BF16 are multiplied. file: in that type. BF16: rounded to "
        "bfloat16, on a CPU with AVX-512 BF16 or AMX and with the extra 'onednn'. int8: quantized in memory to Q8_0 or "
        "Q6_K, whichever is faster on this CPU.",
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "--threads",
        metavar="N",
        min=1,
        max=MAX_THREADS,
        envvar="GRANITE4V_THREADS",
        help="Number of CPU threads.",
        show_default="one per core",
    ),
]
ContextOption = Annotated[
    int | None,
    typer.Option(
        "--ctx-size",
        metavar="N",
        min=1,
        help="Context size in tokens: images, prompt and answer together.",
        show_default="8192, or the model's training context if that is smaller",
    ),
]

CacheTypeOption = Annotated[
    CacheType | None,
    typer.Option(
        "--cache-type",
        help="How the KV cache is stored. q8_0 takes about half of the memory, and of the disk for stored pages, and "
        "changes answers a little.",
        show_default="f16, and float32 for F32 models",
    ),
]
PageStoreOption = Annotated[
    bool,
    typer.Option(
        " /--no-page-store",
        help="Do not keep what the decoder has read of images on disk, nor use what is there ('granite4v cache').",
    ),
]
StorePagesOption = Annotated[
    bool,
    typer.Option("--page-store", help="Keep what the decoder has read of each page on disk for later questions."),
]

# --- generation ---

ImagesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="IMAGE...", help="Images, and PDF pages: scan.pdf#3; '-' reads one from standard input."),
]
VideosOption = Annotated[
    list[str] | None,
    typer.Option(
        "--video",
        metavar="FILE|DIR",
        help="A video file (needs the extra 'video'), or a directory of images that are its frames, by name; for "
        "models that take videos. May be repeated.",
    ),
]
FramesOption = Annotated[
    int | None,
    typer.Option(
        "--frames",
        metavar="N",
        min=1,
        max=1024,
        help="Frames taken of each video, evenly spread.",
        show_default="32, or all of fewer",
    ),
]
FpsOption = Annotated[
    float | None,
    typer.Option(
        "--fps", metavar="X", min=0.001, callback=given_finite, help="Frames taken of each second of a video instead."
    ),
]
PromptArgument = Annotated[str, typer.Argument(metavar="PROMPT", help="Question, or a task tag alone.")]
MaxTokensOption = Annotated[
    int, typer.Option("--max-tokens", metavar="N", min=1, help="Maximum number of tokens to generate.")
]
TemperatureOption = Annotated[
    float,
    typer.Option(
        "--temperature",
        metavar="X",
        min=0,
        callback=finite,
        help="Sampling temperature; 0 is greedy decoding.",
    ),
]
TopKOption = Annotated[
    int, typer.Option("--top-k", metavar="K", min=0, help="Sample from the K most likely tokens; 0 disables it.")
]
TopPOption = Annotated[
    float,
    typer.Option(
        "--top-p",
        metavar="P",
        min=0.01,
        max=1,
        callback=finite,
        help="Sample from the smallest set of tokens whose probabilities sum to P or more.",
    ),
]
SeedOption = Annotated[
    int | None,
    typer.Option("--seed", metavar="N", min=0, help="Seed for reproducible sampling.", show_default="random"),
]
SystemOption = Annotated[
    str | None,
    typer.Option("--system", metavar="TEXT", help="System message.", show_default="the chat template's own"),
]
NoStreamOption = Annotated[bool, typer.Option("--no-stream", help="Print the answer only when it is complete.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]

# --- chat ---

ChatFilesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="FILE...",
        help="Images, videos, and PDFs with the pages that are meant: scan.pdf#1-3; without, all that fit.",
    ),
]
AnswerTokensOption = Annotated[
    int | None,
    typer.Option(
        "--max-tokens",
        metavar="N",
        min=1,
        help="Maximum number of tokens per answer.",
        show_default="4096, or as many as fit",
    ),
]

# --- extraction ---

ExtractedArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="INPUT...",
        help="Images, PDFs, directories, globs, or URLs such as s3://bucket/scans/ (extra 'fsspec'); "
        "'-' reads one file from standard input.",
    ),
]
TasksOption = Annotated[
    list[str] | None,
    typer.Option("--task", metavar="TASK", help="What to extract: {tasks}. May be repeated."),
]
SchemaOption = Annotated[
    str | None,
    typer.Option(
        "--schema",
        metavar="FILE|CLASS",
        help="Fields for kvp: a JSON Schema file, or a pydantic class as package.module:Class.",
    ),
]
QuestionOption = Annotated[
    str | None, typer.Option("--prompt", metavar="TEXT", help="Custom prompt, run on every page.")
]
PagesOption = Annotated[
    str | None,
    typer.Option(
        "--pages", metavar="RANGES", help="Pages to read of each document, such as 1-3,7,10-.", show_default="all"
    ),
]
PasswordOption = Annotated[
    str | None,
    typer.Option("--password", metavar="TEXT", callback=unicode_text, help="Password of encrypted PDFs."),
]
CropOption = Annotated[
    str | None,
    typer.Option(
        "--crop",
        metavar="X,Y,W,H",
        help="Read only this region of each page. Measured from the top left, in pixels (images), points (PDF pages) "
        "or %.",
    ),
]
OutOption = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="DIR", help="Directory for results.jsonl and the files of each document."),
]
FormatsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--format",
        metavar="FORMAT",
        help=f"Format of the files: {', '.join(get_args(Format))}. May be repeated.",
        show_default="the task's own",
    ),
]
CsvSafeOption = Annotated[
    bool,
    typer.Option(
        "--csv-safe",
        help="Write CSV that is safe to open in a spreadsheet: with a byte order mark, and with formulas escaped.",
    ),
]
JsonLinesOption = Annotated[bool, typer.Option("--json", help="Print each record as one line of JSON.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue the run in DIR. Changed files are read again.")]
RetryFailedOption = Annotated[bool, typer.Option("--retry-failed", help="With --resume, also retry pages that failed.")]
ParallelOption = Annotated[
    int | None,
    typer.Option(
        "--parallel",
        metavar="N",
        min=1,
        help="Most answers to generate at once; with 1 nothing is drafted. Always 1 where the "
        "decoder attends to images.",
        show_default="by memory and by what further ones gain",
    ),
]
DraftingOption = Annotated[
    bool,
    typer.Option(" /--no-drafting", help="Do not decode text ahead that an answer may repeat."),
]
UnconstrainedOption = Annotated[
    bool, typer.Option("--unconstrained", help="Do not constrain answers to the format of their task.")
]
ReportOption = Annotated[
    bool, typer.Option("--report", help="Write DIR/report.html, which shows each page next to its values.")
]
ConfidenceOption = Annotated[
    bool,
    typer.Option(
        "--confidence",
        help="Keep in records how sure the model was of every cell and field; the report opens on the least certain.",
    ),
]

# --- conversion ---

SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="SRC",
        help="Checkpoint: a directory, a Hugging Face hub id such as 'owner/name', or 'nano', the embedded checkpoint.",
    ),
]
TargetArgument = Annotated[Path, typer.Argument(metavar="OUT", help="Model directory to write.")]
TextTypeOption = Annotated[
    str,
    typer.Option(
        "--text-type",
        metavar="T",
        help="Weight type of the text model: F32, F16, BF16, Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q4_0 or IQ4_NL.",
    ),
]
VISION_TYPE_HELP = (
    "Weight type of the vision tower and projectors: F32, F16, BF16, Q8_0, Q6_K, Q5_K, Q4_K, Q4_0 or IQ4_NL; "
    "auto is the one of F16, BF16, Q8_0 and Q6_K that this CPU multiplies fastest."
)
VisionTypeOption = Annotated[str, typer.Option("--vision-type", metavar="T", help=VISION_TYPE_HELP)]
LoraModeOption = Annotated[
    str,
    typer.Option(
        "--lora",
        metavar="merge|separate|ignore",
        help="Merge a LoRA adapter into the weights, write it to a separate file, or ignore it.",
    ),
]
AdapterOption = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        metavar="DIR|HUB_ID",
        help="PEFT adapter: a directory or a hub id.",
        show_default="the one in SRC, if any",
    ),
]
RevisionOption = Annotated[
    str | None,
    typer.Option("--revision", metavar="REV", help="Branch, tag or commit of the hub repository.", show_default="main"),
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print what would be written without writing it.")]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Replace the model in OUT; other files in it are left alone.")
]

# --- the models folder ---

HubNamesArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="HUB_ID...",
        help="Models of the hub: 'owner/name', or with a quantization 'owner/name:Q4_K_M'.",
    ),
]
HubNameArgument = Annotated[str, typer.Argument(metavar="HUB_ID", help="A model that 'granite4v models list' shows.")]
PulledNamesArgument = Annotated[
    list[str], typer.Argument(metavar="HUB_ID...", help="Models that 'granite4v models list' shows.")
]

# --- measurement ---

ImageOption = Annotated[Path, typer.Option("--image", metavar="FILE", help="Image to encode.")]
BenchPromptOption = Annotated[str, typer.Option("--prompt", metavar="TEXT", help="Question about the image.")]
DecodedTokensOption = Annotated[
    int,
    typer.Option(
        "--max-tokens", metavar="N", min=1, help="Number of tokens to decode; end-of-text tokens are ignored."
    ),
]
RepeatOption = Annotated[
    int, typer.Option("--repeat", metavar="N", min=1, help="Number of runs, each with empty caches.")
]
TogetherOption = Annotated[
    int,
    typer.Option(
        "--parallel", metavar="N", min=1, max=512, help="Also generate N answers at once, compared with one alone."
    ),
]
JsonOnlyOption = Annotated[bool, typer.Option("--json", help="Print only the JSON line.")]

# --- comparison with the reference ---

ReferenceOption = Annotated[
    Path, typer.Option("--reference", metavar="HF_DIR", help="Checkpoint from which the model was converted.")
]
ImagesOption = Annotated[
    list[Path] | None, typer.Option("--image", metavar="FILE", help="Image to compare on. May be repeated.")
]
ComparedPromptOption = Annotated[str, typer.Option("--prompt", metavar="TEXT", help="Question for both models.")]
PositionsOption = Annotated[
    int,
    typer.Option("--positions", metavar="N", min=1, help="Number of positions of the reference's answer to compare."),
]
ReferenceAdapterOption = Annotated[
    Path | None, typer.Option("--adapter", metavar="PATH", help="PEFT adapter to merge into the reference.")
]
ExactOption = Annotated[
    bool,
    typer.Option("--exact", help="Use a float32 KV cache and no flash attention; always on for F32 models."),
]


def check_sampling(frames: int | None, fps: float | None) -> None:
    """Raises BadParameter if both --frames and --fps are given."""
    if frames is not None and fps is not None:
        raise typer.BadParameter("give --frames or --fps, not both.", param_hint="--frames, --fps")


def fill_in_tasks(params: Iterable[Any]) -> None:
    """Puts the names of the tasks into the help texts of a command's parameters. Called only before they are shown,
    because the table of tasks takes longer to import than all commands together."""
    from granite4v.runtime.formats.tasks import TASKS

    for param in params:
        if getattr(param, "help", None):
            param.help = param.help.replace("{tasks}", ", ".join(TASKS))


def fastest_vision_type(threads: int | None) -> str:
    """Resolves `--vision-type auto` for this machine; prints the type and the measurements on stderr."""
    from granite4v import converter
    from granite4v.cli.progress import Progress

    with Progress(delay_s=0.5) as progress:
        found = converter.fastest_vision_type(threads, lambda: progress.stage("measure", 0, 1))
        progress.note(f"note: {found}")
    return found.type_name


def model_path(model: str | None, *, quiet: bool = False) -> str | Path:
    """Resolves `--model` to a path: a path itself, a model of the hub, or the embedded model for 'nano' or None.

    Prints a note on stderr if no model is given, and shows the progress of downloads and conversions. `quiet`: print
    nothing about the embedded model.
    """
    from granite4v import default_model
    from granite4v.cli.progress import Progress

    if quiet and (model is None or default_model.is_embedded(model)):
        return default_model.find_model(model, lambda line: None)
    with Progress(delay_s=0.5) as progress:
        if model is None:
            progress.note(NO_MODEL)
        return default_model.find_model(model, progress.note, progress.written, progress.pulled)
