"""`granite4v serve`: an OpenAI-compatible server for one model."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from granite4v.cli import options
from granite4v.cli.loading import ModelOptions, grouped
from granite4v.cli.progress import Progress
from granite4v.cli.values import finite, unicode_text
from granite4v.cli.verbosity import is_verbose
from granite4v.memory import give_back_freed

if TYPE_CHECKING:
    from granite4v.runtime.model import Model

_MEGABYTE = 1 << 20
_KEY_VARIABLE = "GRANITE4V_API_KEY"
_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://(?:\[[0-9a-f:.]+\]|[^\s/?#@:\[\]]+)(?::[0-9]{1,5})?", re.IGNORECASE)


def _api_key(value: str | None) -> str | None:
    """Refuses an empty key. Click takes an empty environment variable for one that is not set."""
    if value is None and os.environ.get(_KEY_VARIABLE) is not None:
        value = os.environ[_KEY_VARIABLE]
    if value is not None and not value.strip():
        raise typer.BadParameter(
            "the key is empty; expected a text that clients must send. Without the option (and without "
            f"{_KEY_VARIABLE}), the server needs no key."
        )
    return unicode_text(value)


def _origins(values: list[str] | None) -> list[str] | None:
    for value in values or ():
        if not _ORIGIN.fullmatch(value):
            raise typer.BadParameter(
                f"{value!r:.80} is not an origin; expected a scheme, a host and, if it is not the default one, a port, "
                "such as 'https://app.example' or 'http://localhost:3000', without a path; or '*' for all."
            )
    return values


HostOption = Annotated[str, typer.Option("--host", metavar="ADDRESS", help="Address to listen at.")]
PortOption = Annotated[
    int, typer.Option("--port", metavar="N", min=0, max=65535, help="Port to listen at; 0 takes a free one.")
]
ApiKeyOption = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        metavar="KEY",
        envvar=_KEY_VARIABLE,
        callback=_api_key,
        help="Key that clients must send.",
        show_default=False,
    ),
]
CorsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--cors-origin",
        metavar="ORIGIN",
        callback=_origins,
        help="Origin of web pages that may ask. May be repeated.",
    ),
]
AllowedHostOption = Annotated[
    list[str] | None,
    typer.Option(
        "--allowed-host",
        metavar="NAME",
        help="Another name under which clients reach a server at a loopback address. May be repeated.",
    ),
]
MediaPathOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--media-path",
        metavar="DIR",
        exists=True,
        file_okay=False,
        help="Directory whose images clients may name by path. May be repeated.",
    ),
]
NameOption = Annotated[
    str | None,
    typer.Option("--served-name", metavar="NAME", help="What answers call the model.", show_default="its directory"),
]
ParallelOption = Annotated[
    int | None,
    typer.Option(
        "--parallel",
        metavar="N",
        min=1,
        help="Most answers to generate at once; always 1 where the decoder attends to images.",
        show_default="4",
    ),
]
QueueOption = Annotated[
    int, typer.Option("--max-queue", metavar="N", min=0, help="Most requests that wait; others are refused.")
]
BodyOption = Annotated[int, typer.Option("--max-body", metavar="MB", min=1, help="Most megabytes of a request.")]
MaxImagesOption = Annotated[
    int, typer.Option("--max-images", metavar="N", min=1, help="Most images and PDF pages of a request.")
]
MaxFramesOption = Annotated[
    int, typer.Option("--max-frames", metavar="N", min=1, max=1024, help="Most frames of the videos of a request.")
]
TimeOption = Annotated[
    float,
    typer.Option("--max-time", metavar="SECONDS", min=1, callback=finite, help="Longest time of a request."),
]


@grouped
def serve(
    *,
    loading: ModelOptions,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8080,
    api_key: ApiKeyOption = None,
    parallel: ParallelOption = None,
    served_name: NameOption = None,
    cors_origin: CorsOption = None,
    allowed_host: AllowedHostOption = None,
    media_path: MediaPathOption = None,
    max_queue: QueueOption = 32,
    max_body: BodyOption = 64,
    max_images: MaxImagesOption = 16,
    max_frames: MaxFramesOption = 64,
    max_time: TimeOption = 3600.0,
    lora: options.LoraOption = None,
    page_store: options.PageStoreOption = True,
) -> None:
    """Serve a model to clients of OpenAI's API, and a web page at '/'.

    Endpoints: /v1/chat/completions, /v1/responses, /v1/completions, /v1/models, /v1/chat/completions/input_tokens,
    /tokenize, /parse, /health, /metrics, /openapi.json. Images and videos are sent as data URLs, PDFs as file parts;
    the server fetches nothing. The KV cache of images is kept on disk, private to the user who runs the server. SIGTERM
    or Ctrl-C stops the server; answers in flight get at most two seconds to finish. --verbose prints a line for each
    request, without its content.
    """
    from granite4v.runtime.llama.files import ModelFiles
    from granite4v.runtime.server import Limits, ServerOptions, create_app, run
    from granite4v.runtime.server.serving import listen

    give_back_freed()
    listening = listen(host, port)
    path = loading.find()
    ModelFiles.open(path, mmproj=loading.mmproj).close()  # nobody is told an address before there is a model
    with Progress() as progress:

        def load() -> Model:
            return loading.load(path, progress, n_parallel=parallel, lora=lora, page_store=page_store)

        limits = Limits(
            body_bytes=max_body * _MEGABYTE,
            n_images=max_images,
            n_pages=max_images,
            n_frames=max_frames,
            n_waiting=max_queue,
            time_s=max_time,
        )
        chosen = ServerOptions(
            model_name=served_name or Path(loading.model or "nano").name,
            api_key=api_key,
            cors_origins=tuple(cors_origin or ()),
            hosts=_hosts(listening.getsockname()[0], host, allowed_host or []),
            media_paths=tuple(media_path or ()),
            limits=limits,
        )
        _log()
        run(create_app(load, chosen), listening, lambda address: progress.say(f"listening at {address}"))


def _hosts(address: str, host: str, others: list[str]) -> tuple[str, ...]:
    """The accepted values of the Host header; empty, for any, unless the server listens at a loopback address.

    At a loopback address, other names are refused: through a name that resolves to it (DNS rebinding), a web page
    anywhere could send requests from the user's browser. `address`: where the server listens; `host`: the same as the
    user spelled it, such as '127.1' or a name.
    """
    found = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(found, "ipv4_mapped", None)  # '::ffff:127.0.0.1'
    names = {"localhost", "127.0.0.1", "::1", *(name.lower() for name in (host, *others))}
    return tuple(names) if (mapped or found).is_loopback else ()


def _log() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name, level in (
        ("granite4v.server", logging.INFO if is_verbose() else logging.WARNING),
        ("uvicorn", logging.ERROR),
    ):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.addHandler(handler)
        logger.propagate = False
