"""`granite4v ask`: one question about pictures, the answer on stdout."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from granite4v.cli.options import (
    ContextOption,
    DeviceOption,
    JsonOption,
    LoraOption,
    MmprojOption,
    ModelOption,
    ThreadsOption,
    finite,
    model_path,
)
from granite4v.cli.streams import to_json

if TYPE_CHECKING:
    from granite4v.runtime import Answer


def ask(
    *,
    images: Annotated[
        list[str] | None, typer.Argument(metavar="IMAGE", help="Pictures; '-' reads one from stdin.")
    ] = None,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The question, or a task tag alone.")],
    model: ModelOption = None,
    mmproj: MmprojOption = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="The most tokens the answer may have.")] = 512,
    temperature: Annotated[
        float, typer.Option(min=0, callback=finite, help="0 takes the most likely token every time.")
    ] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from the k most likely tokens; 0 for all.")] = 0,
    top_p: Annotated[
        float, typer.Option(min=0.01, max=1, callback=finite, help="Draw from the likeliest that add up to p.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(min=0, help="Makes drawing repeatable.", show_default="random")] = None,
    system: Annotated[str | None, typer.Option(help="A system message.", show_default="the template's own")] = None,
    lora: LoraOption = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    ctx: ContextOption = None,
    as_json: JsonOption = False,
    no_stream: Annotated[bool, typer.Option("--no-stream", help="Print the answer when it is complete.")] = False,
) -> None:
    """Ask one question about one or more pictures.

    The answer goes to stdout alone; progress, timings and warnings go to stderr.
    """
    from granite4v.cli.status import Status
    from granite4v.runtime import Model

    if not images and os.path.isfile(prompt):
        raise typer.BadParameter(f"'{prompt}' is a file; write the question after it.", param_hint="PROMPT")
    status = Status()
    try:
        pictures = _pictures(images or [])
        with Model.load(model_path(model), n_ctx=ctx, n_threads=threads, device=device, mmproj=mmproj) as loaded:
            for warning in loaded.warnings:
                print(f"warning: {warning}", file=sys.stderr)
            stream = loaded.stream(
                _messages(prompt, len(pictures), system),
                pictures,
                max_tokens=max_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
                lora=lora,
                progress=status,
            )
            for piece in stream:
                status.clear()
                if not as_json and not no_stream:
                    print(piece, end="", flush=True)
    finally:
        status.clear()
    _finish(stream.answer, as_json=as_json, whole=no_stream)


def _pictures(images: list[str]) -> list[Any]:
    """Opened in a process of their own: what a damaged file does to its decoder stays there."""
    if images.count("-") > 1:
        raise typer.BadParameter("'-' reads standard input, and can be given once.", param_hint="IMAGE")
    if not images:
        return []
    from PIL import Image

    from granite4v.runtime.documents.reader import load_apart

    found = []
    for loaded in load_apart([_from_stdin() if image == "-" else image for image in images]):
        for warning in loaded.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        found.append(Image.frombytes("RGB", loaded.size, bytes(loaded.pixels)))
    return found


def _from_stdin() -> bytes:
    from granite4v.errors import ImageError

    if sys.stdin.isatty():
        raise ImageError("'-' reads an image from standard input, which is a terminal; pipe an image into it.")
    try:
        data = sys.stdin.buffer.read()
    except OSError as error:
        raise ImageError(f"standard input cannot be read: {error.strerror or error}.") from None
    if not data:
        raise ImageError("'-' reads an image from standard input, which is empty or closed; pipe an image into it.")
    return data


def _messages(prompt: str, n_pictures: int, system: str | None) -> list[dict[str, Any]]:
    parts = [*({"type": "image"} for _ in range(n_pictures)), {"type": "text", "text": prompt}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": parts}]
    return [{"role": "system", "content": system}, *messages] if system else messages


def _finish(answer: Answer, *, as_json: bool, whole: bool) -> None:
    timings = answer.timings
    if as_json:
        print(to_json(answer.as_dict(), indent=2))
    elif whole:
        print(answer.text)
    elif not answer.text.endswith("\n"):
        print()
    if answer.finish_reason == "length":
        print(f"the answer was cut at {len(answer.tokens)} tokens; --max-tokens allows more", file=sys.stderr)
    print(
        f"{timings.n_prompt} prompt tokens ({timings.n_image} of images): images {timings.encode_s:.1f} s, "
        f"prompt {timings.prefill_s:.1f} s; {timings.n_generated} tokens in {timings.decode_s:.1f} s "
        f"({timings.decode_tok_s:.1f} a second)",
        file=sys.stderr,
    )
