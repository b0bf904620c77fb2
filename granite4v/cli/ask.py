"""`granite4v ask`: answers one question about images on stdout."""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from granite4v.cli import options
from granite4v.cli.ask_images import open_images, render_pages
from granite4v.cli.loading import ModelOptions, SamplingOptions, grouped
from granite4v.cli.progress import Progress, plural
from granite4v.cli.streams import to_json
from granite4v.cli.verbosity import note, show_timings
from granite4v.errors import ImageWarning

if TYPE_CHECKING:
    from granite4v.clip_projector import Video
    from granite4v.runtime import Answer
    from granite4v.runtime.prompt.spans import Prompt


@grouped
def ask(
    *,
    images: options.ImagesArgument = None,
    videos: options.VideosOption = None,
    frames: options.FramesOption = None,
    fps: options.FpsOption = None,
    prompt: options.PromptArgument,
    loading: ModelOptions,
    lora: options.LoraOption = None,
    system: options.SystemOption = None,
    max_tokens: options.MaxTokensOption = 512,
    sampling: SamplingOptions,
    unconstrained: options.UnconstrainedOption = False,
    page_store: options.PageStoreOption = True,
    password: options.PasswordOption = None,
    no_stream: options.NoStreamOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Ask one question about one or more images, pages of PDFs, or videos.

    If PROMPT is a task tag that the model knows, the answer is constrained to the format of the task, as in 'chat' and
    'extract'. An answer that is cut off at --max-tokens is closed so that it still has that format.

    Only the answer goes to stdout; progress, timings and warnings go to stderr. The KV cache of the images is kept on
    disk, private to the user, so that the next question about them is answered without processing them again.
    """
    if not images and os.path.isfile(prompt):
        raise typer.BadParameter(f"'{prompt}' is a file; write the question after it.", param_hint="PROMPT")
    is_streamed = not as_json and not no_stream
    with Progress() as progress:
        given, frames_of = open_images(images or []), _open_videos(videos or [], frames, fps)
        with loading.load(loading.find(), progress, page_store=page_store) as loaded:
            pictures = render_pages(given, loaded, password)
            messages = _messages(prompt, len(pictures), len(frames_of), system)
            prepared = loaded.prepare(messages, [*pictures, *frames_of], progress=progress.stage)
            stream = loaded.stream(
                prepared,
                max_tokens=max_tokens,
                **asdict(sampling),
                **({} if unconstrained else _task_options(prompt, prepared)),
                lora=lora,
                progress=progress.stage,
            )
            for piece in stream:
                if is_streamed:
                    progress.close()  # the answer may be in the middle of a line
                    print(piece, end="", flush=True)
                else:
                    progress.stage("generate", len(stream.answer.tokens), 0)
    _finish(stream.answer, as_json=as_json, is_printed=is_streamed)


def _open_videos(videos: list[str], frames: int | None, fps: float | None) -> list[Video]:
    if not videos and (frames is not None or fps is not None):
        raise typer.BadParameter("there is no --video to take frames of.", param_hint="--frames, --fps")
    options.check_sampling(frames, fps)
    from granite4v.clip_projector import load_video

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ImageWarning)
        opened = [load_video(video, frames=frames, fps=fps) for video in videos]
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    return opened


def _messages(prompt: str, n_images: int, n_videos: int, system: str | None) -> list[dict[str, Any]]:
    kinds = ["image"] * n_images + ["video"] * n_videos
    parts = [*({"type": kind} for kind in kinds), {"type": "text", "text": prompt}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": parts}]
    return [{"role": "system", "content": system}, *messages] if system else messages


def _task_options(text: str, prompt: Prompt) -> dict[str, Any]:
    """How `chat` answers a task tag: in the format of the task, and stopped when rows repeat. Empty for any other text,
    and for a tag that the model's chat template left in the prompt, as it does not know the task."""
    from granite4v.runtime.formats.task_grammar import grammar_for
    from granite4v.runtime.formats.tasks import TASKS

    task = next((task for task in TASKS.values() if task.tag == text.strip()), None)
    if task is None or task.tag is None or task.tag in prompt.text:
        return {}
    return {"constraint": grammar_for(task.name), "repetition": task.name}


def _finish(answer: Answer, *, as_json: bool, is_printed: bool) -> None:
    """Prints the answer if it was not streamed; then, on stderr, whether it was cut off and how long it took."""
    timings = answer.timings
    if as_json:
        print(to_json(answer.as_dict(), indent=2))
    elif not is_printed:
        print(answer.text)
    elif not answer.text.endswith("\n"):
        print()
    if answer.finish_reason == "length":
        closed = " and closed in the format of its task" if answer.closing is not None else ""
        print(
            f"the answer was cut off after {plural(len(answer.tokens), 'token')}{closed}; raise --max-tokens to allow "
            "more",
            file=sys.stderr,
        )
    elif answer.finish_reason == "repetition":
        print("the answer began to repeat itself and was stopped", file=sys.stderr)
    stored = f", {timings.n_stored:,} from stored pages" if timings.n_stored else ""
    note(
        f"{plural(timings.n_prompt, 'prompt token')} ({timings.n_image:,} of images{stored}): "
        f"images {timings.encode_s:.1f} s, prompt {timings.prefill_s:.1f} s; "
        f"{plural(timings.n_generated, 'token')} generated in {timings.decode_s:.1f} s "
        f"({timings.decode_tok_s:.1f} tokens/s)"
    )
    show_timings("timings", asdict(timings))
