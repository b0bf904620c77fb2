"""The reader process, which opens files and renders pages, so that no file can crash, hang or bloat its parent.

Started by `reader`. Takes one request at a time on standard input and writes one reply to each on standard output. It
ends with its parent: a thread notices the end of standard input even while a page is being rendered. It imports neither
NumPy (except for deep greyscale) nor llama.cpp: it is restarted after every crash, so it must be small.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import resource
import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import PIL.Image

from granite4v.clip_projector.images import open_rgb
from granite4v.errors import DocumentError, ImageError, ImageWarning, PasswordError
from granite4v.families.base import tiling_from
from granite4v.memory import limit_address_space
from granite4v.runtime.documents.content import open_page_source, readable
from granite4v.runtime.documents.limits import Limits
from granite4v.runtime.documents.page_source import PageSource
from granite4v.runtime.documents.protocol import PREFIX, packed
from granite4v.runtime.documents.selection import Crop
from granite4v.runtime.documents.sources import Document

OUT_OF_MEMORY = 77  # exit status of a worker that has exceeded its memory limit
_CHECK_S = 0.02  # between two checks of the memory during a request

Request = tuple[dict[str, Any], bytes]


def main(setup: str) -> None:
    """Answers requests until standard input ends. `setup`: JSON of `limits` and `max_image_pixels`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes our standard input
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints to standard output must not end up between the replies
    options = json.loads(setup)
    limits = Limits(**options["limits"])
    PIL.Image.MAX_IMAGE_PIXELS = options["max_image_pixels"]
    limit_address_space(2 * limits.memory_bytes)  # a backstop: `_watch_memory` acts earlier, and its status says why
    requests: queue.SimpleQueue[Request] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(sys.stdin.buffer, requests), daemon=True).start()
    busy = threading.Event()
    threading.Thread(target=_watch_memory, args=(limits.memory_bytes, busy), daemon=True).start()
    _send(replies, {"ready": True})
    # until here, the parent could have read from standard error why the reader does not start
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    handler = RequestHandler(limits)
    while True:
        request, content = requests.get()
        busy.set()
        seconds = resource.getrusage(resource.RUSAGE_SELF)
        _limit_cpu(seconds.ru_utime + seconds.ru_stime + 4 * (limits.open_s + limits.page_s))
        reply, pixels = handler.answer(request, content)
        _send(replies, reply, pixels)
        del reply, pixels, request, content  # a page's pixels must not stay in memory until the next request
        busy.clear()


class RequestHandler:
    """Answers requests, with one document open at a time."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._source: PageSource | None = None
        self._id: int | None = None  # of the document that is open

    def answer(self, request: dict[str, Any], content: bytes) -> tuple[dict[str, Any], bytes]:
        """Returns the header and payload of the reply to `load`, `open` or `render`; an error is a reply as well."""
        name = request["about"]
        try:
            if request["op"] == "load":
                path = request["document"]["path"]
                return load(path or content, None if path else name)
            if request["op"] == "open":
                source = self._open(request, content)
                return {"n_pages": source.n_pages, "damage": source.damage, "index": source.index}, b""
            return self._render(request, content)
        except Exception as error:
            known = readable(error, name)
            kind = next((kind for kind in (PasswordError, ImageError) if isinstance(known, kind)), DocumentError)
            return {"error": kind.__name__, "message": str(known)}, b""

    def _open(self, request: dict[str, Any], content: bytes) -> PageSource:
        document = request["document"]
        if self._source is not None and self._id == document["id"]:
            return self._source
        if self._source is not None:
            self._source.close()
            self._source = self._id = None
        path = document["path"]
        self._source = open_page_source(
            Document(document["source"], None if path is None else Path(path)),
            content if path is None or content else None,
            document["state"],
            document["password"],
            document["index"],
            self._limits,
        )
        self._id = document["id"]
        return self._source

    def _render(self, request: dict[str, Any], content: bytes) -> tuple[dict[str, Any], bytes]:
        source = self._open(request, content)
        crop, tiling = request["crop"], request["tiling"]
        if tiling is not None:
            tiling = tiling_from(tiling)
        if crop is not None:
            crop = Crop(tuple(crop["values"]), tuple(crop["relative"]))
        page = source.render(request["number"], crop, tiling)
        return {"size": page.image.size, "dpi": page.dpi, "warnings": page.warnings}, page.image.tobytes()


def load(source: str | bytes, name: str | None = None) -> tuple[dict[str, Any], bytes]:
    """Returns the reply to `load`: an image opened like `load_image`. `name`: what messages call an image in bytes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        image = open_rgb(source, name)
    said = [str(one.message) for one in caught if issubclass(one.category, ImageWarning)]
    return {"size": image.size, "dpi": None, "warnings": said}, image.tobytes()


def _send(stream: BinaryIO, header: dict[str, Any], payload: bytes = b"") -> None:
    stream.write(packed(header, len(payload)))
    stream.write(payload)
    stream.flush()


def _receive(stream: BinaryIO, requests: queue.SimpleQueue[Request]) -> None:
    while len(prefix := stream.read(PREFIX.size)) == PREFIX.size:
        n_header, n_bytes = PREFIX.unpack(prefix)
        header, content = stream.read(n_header), stream.read(n_bytes)
        if len(header) + len(content) < n_header + n_bytes:
            break
        requests.put((json.loads(header), content))
        del content
    os._exit(0)  # the parent is gone, or done


def _limit_cpu(seconds: float) -> None:
    """Limits the total CPU time, to end a worker whose parent was killed while a library held the GIL, so that no
    thread of ours could notice."""
    with contextlib.suppress(OSError, ValueError):
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        limit = int(seconds) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _watch_memory(limit_bytes: int, busy: threading.Event) -> None:
    idle_bytes = _resident_bytes()
    while busy.wait():
        if _resident_bytes() - idle_bytes > limit_bytes:
            os._exit(OUT_OF_MEMORY)
        time.sleep(_CHECK_S)


def _resident_bytes() -> int:
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except (OSError, ValueError):  # not Linux: the peak, in bytes on macOS and in KiB elsewhere
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
