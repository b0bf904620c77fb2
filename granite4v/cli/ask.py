"""`granite4v ask`: one question about images, the answer on stdout."""

from __future__ import annotations

import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

import typer

from granite4v.cli import options
from granite4v.cli.ask_images import open_images, render_pages
from granite4v.cli.progress import Progress, plural
from granite4v.cli.streams import to_json
from granite4v.errors import ImageWarning

if TYPE_CHECKING:
    from granite4v.clip_projector import Video
    from granite4v.runtime import Answer


def ask(
    *,
    images: options.ImagesArgument = None,
    videos: options.VideosOption = None,
    frames: options.FramesOption = None,
    fps: options.FpsOption = None,
    prompt: options.PromptArgument,
    model: options.ModelOption = None,
    mmproj: options.MmprojOption = None,
    lora: options.LoraOption = None,
    system: options.SystemOption = None,
    max_tokens: options.MaxTokensOption = 512,
    temperature: options.TemperatureOption = 0.0,
    top_k: options.TopKOption = 0,
    top_p: options.TopPOption = 1.0,
    seed: options.SeedOption = None,
    ctx_size: options.ContextOption = None,
    threads: options.ThreadsOption = None,
    device: options.DeviceOption = "auto",
    vision_compute: options.VisionComputeOption = "file",
    cache_type: options.CacheTypeOption = None,
    page_store: options.PageStoreOption = True,
    password: options.PasswordOption = None,
    no_stream: options.NoStreamOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Ask one question about one or more images, pages of PDFs, or videos.

    Only the answer goes to stdout; progress, timings and warnings go to stderr. What the decoder has read of the images
    is kept on disk, private to the user, so that the next question about them is answered without reading them again.
    """
    from granite4v.runtime import Model

    if not images and os.path.isfile(prompt):
        raise typer.BadParameter(f"'{prompt}' is a file; write the question after it.", param_hint="PROMPT")
    is_streamed = not as_json and not no_stream
    with Progress() as progress:
        given, frames_of = open_images(images or []), _open_videos(videos or [], frames, fps)
        path = options.model_path(model)
        with Model.load(
            path,
            n_ctx=ctx_size,
            n_threads=threads,
            device=device,
            mmproj=mmproj,
            vision_compute=vision_compute,
            cache_type=cache_type,
            page_store=page_store,
        ) as loaded:
            if loaded.vision_note is not None:
                progress.say(f"note: {loaded.vision_note}")
            for warning in loaded.warnings:
                progress.say(f"warning: {warning}")
            pictures = render_pages(given, loaded, password)
            stream = loaded.stream(
                _messages(prompt, len(pictures), len(frames_of), system),
                [*pictures, *frames_of],
                max_tokens=max_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
                lora=lora,
                progress=progress.stage,
            )
            for piece in stream:
                if is_streamed:
                    progress.close()  # the answer may stand in the middle of a line
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


def _finish(answer: Answer, *, as_json: bool, is_printed: bool) -> None:
    """Prints what is not printed yet, then on stderr how the answer ended and how long it took."""
    timings = answer.timings
    if as_json:
        print(to_json(answer.as_dict(), indent=2))
    elif not is_printed:
        print(answer.text)
    elif not answer.text.endswith("\n"):
        print()
    if answer.finish_reason == "length":
        print(
            f"the answer was cut off after {plural(len(answer.tokens), 'token')}; raise --max-tokens to allow more",
            file=sys.stderr,
        )
    stored = f", {timings.n_stored:,} from stored pages" if timings.n_stored else ""
    print(
        f"{plural(timings.n_prompt, 'prompt token')} ({timings.n_image:,} of images{stored}): "
        f"images {timings.encode_s:.1f} s, prompt {timings.prefill_s:.1f} s; "
        f"{plural(timings.n_generated, 'token')} generated in {timings.decode_s:.1f} s "
        f"({timings.decode_tok_s:.1f} tokens/s)",
        file=sys.stderr,
    )
