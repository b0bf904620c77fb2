"""Options of a server: who may use it, and its limits and timeouts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Limits:
    """Limits of one request, and of requests in flight. A request that exceeds one is refused with a message that names
    the limit.

    `body_bytes`: size of a request's body. `n_images`: images and PDF pages of a request. `n_pixels`: their pixels
    together, including those of video frames. `n_pages`: pages of one PDF. `n_frames`: frames of all videos of a
    request. `video_s`: time to decode one video. `n_choices`: answers to one request. `n_waiting`: requests that wait
    for their turn. `time_s`: time from the arrival of a request to the end of its answer.
    """

    body_bytes: int = 64 << 20
    n_images: int = 16
    n_pixels: int = 100_000_000
    n_pages: int = 16
    n_frames: int = 64
    video_s: float = 60.0
    n_choices: int = 8
    n_waiting: int = 32
    time_s: float = 3600.0


@dataclass(frozen=True)
class ServerOptions:
    """`model_name`: the model's name in replies; by default the name of its directory. `api_key`: required from every
    client that uses the API. `cors_origins`: other origins whose web pages may use the server ('*' for all). `hosts`:
    accepted values of the Host header; empty accepts any. `media_paths`: directories whose files a client may name.

    `stall_s`: how long a client may pause in the middle of sending a request. `patience_s`: how long an answer may take
    before its headers are sent ahead; after that, an error can no longer set the HTTP status. `keepalive_s`: how often
    a waiting client is sent a keep-alive. docling gives up after 60 s without either. `shutdown_s`: how long answers in
    flight may continue after the server was told to stop.
    """

    model_name: str | None = None
    api_key: str | None = field(default=None, repr=False)
    cors_origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    media_paths: tuple[Path, ...] = ()
    limits: Limits = Limits()
    stall_s: float = 30.0
    patience_s: float = 20.0
    keepalive_s: float = 15.0
    shutdown_s: float = 2.0
