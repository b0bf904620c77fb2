"""How a server behaves: who may ask, and how much of everything."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Limits:
    """Bounds of one request, and of what is in flight. A request beyond one is refused with a message that names it.

    `body_bytes`: of a request. `n_images`: images and PDF pages of a request, and `n_pixels` of all of them together.
    `n_pages`: of one PDF. `n_frames`: of all videos of a request, whose pixels `n_pixels` counts, too. `video_s`: to
    decode one video. `n_choices`: answers to one request. `n_waiting`: requests that wait for their turn.
    `time_s`: from the arrival of a request to the end of its answer.
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
    """`model_name`: what the server calls its model; the name of its directory by default. `api_key`: demanded of every
    client that asks something. `cors_origins`: web pages of other origins that may ask ('*' for all). `hosts`: values
    of the Host header that are accepted; any where empty. `media_paths`: directories whose files a client may name.

    `stall_s`: how long a client may stop in the middle of sending a request. `patience_s`: how long an answer may take
    before its headers are sent ahead, after which an error no longer has a status of its own; `keepalive_s`: how often
    a client that waits is sent something that means nothing. docling gives up after 60 s without either. `shutdown_s`:
    how long answers may go on after the server was told to end.
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
