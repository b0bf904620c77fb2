"""The parent's side of the reader process: starts it, sends requests, enforces its time limits, and reports how it
ended."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any

import PIL.Image

from granite4v.clip_projector.files import shown
from granite4v.errors import DeviceError, DocumentError, Granite4vError, ImageError, PasswordError
from granite4v.families.base import Tiling
from granite4v.runtime.documents.limits import LIMITS, Limits
from granite4v.runtime.documents.protocol import PREFIX, packed
from granite4v.runtime.documents.selection import Crop
from granite4v.runtime.documents.worker import OUT_OF_MEMORY

WORKER = "granite4v.runtime.documents.worker"
# Takes over the parent's module path before any import: with '-c' the current folder would be searched for modules.
_BOOT = (
    "import sys; sys.path[:] = sys.argv[3:]; import importlib; importlib.import_module(sys.argv[1]).main(sys.argv[2])"
)
_START_S = 60
_GRACE_S = 5
_WAIT_S = 0.5  # between two calls of `waiting`
_PIPE_BYTES = 1 << 20  # if the system lets us choose: a page has several megabytes
_IDS = itertools.count()

Waiting = Callable[[str, "int | None", float], None]
Reply = tuple[dict[str, Any], bytearray]


class ReaderEnded(DocumentError):
    """A page or document that crashed its reader or exceeded a limit, twice."""


class _Died(Exception):
    """The reader ended, or was stopped, before it replied.

    `why`: completes 'page 3 of ...'. `by_itself`: False if it exceeded a limit.
    """

    def __init__(self, why: str, *, by_itself: bool) -> None:
        super().__init__(why)
        self.why, self.by_itself = why, by_itself


@dataclass(frozen=True)
class RawPage:
    """A page as the reader sends it: RGB, 3 bytes per pixel, row by row."""

    size: tuple[int, int]
    pixels: bytearray
    dpi: float | None
    warnings: tuple[str, ...]


class Reader:
    """One worker process, started when it is first needed, and again after it has ended."""

    def __init__(self, limits: Limits, waiting: Waiting | None = None) -> None:
        """`waiting`: called with (source, number or None, seconds) about twice a second while a request takes time."""
        self.limits, self._waiting = limits, waiting
        self._process: subprocess.Popen[bytes] | None = None
        self._poll = select.poll()
        self._holds: int | None = None  # id of the document whose content was sent to the process
        self._asked_at = 0.0

    def ask(self, request: dict[str, Any], content: bytes) -> None:
        """Sends a request; `answer` must be called before the next. Raises DeviceError if no reader can be started."""
        if self._process is None:
            self._start()
        assert self._process is not None and self._process.stdin is not None
        document = request["document"]["id"]
        payload = b"" if self._holds == document else content
        self._asked_at = time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # the process has ended: `answer` finds out why
            self._process.stdin.write(packed(request, len(payload)))
            self._process.stdin.write(payload)
            self._process.stdin.flush()
        self._holds = document

    def answer(self, request: dict[str, Any], limit_s: float) -> Reply:
        """Returns the reply to the request. Raises _Died."""
        # the parent may have been busy for longer than the limit while a reply was ready, so allow time to receive it
        deadline = max(self._asked_at + limit_s, time.monotonic() + min(limit_s, _GRACE_S))
        return self._receive(deadline, limit_s, request)

    def close(self) -> None:
        """Ends the process; a second call does nothing."""
        process, self._process, self._holds = self._process, None, None
        if process is None:
            return
        process.kill()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # what is still buffered cannot be sent any more
                    stream.close()
        process.wait()

    def _start(self) -> None:
        setup = {
            "limits": asdict(self.limits),
            "max_image_pixels": PIL.Image.MAX_IMAGE_PIXELS,
        }
        with _scratch_file() as errors:
            try:
                self._process = subprocess.Popen(
                    [sys.executable or "", "-c", _BOOT, WORKER, json.dumps(setup), *map(str, sys.path)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # each of its threads would take address space
                    start_new_session=True,  # a terminal's Ctrl-C is for the parent alone
                )
                assert self._process.stdout is not None
                _widen(self._process.stdout.fileno())
                self._poll = select.poll()
                self._poll.register(self._process.stdout, select.POLLIN)
                self._receive(time.monotonic() + _START_S, _START_S, None)
            except (OSError, ValueError) as error:
                self.close()
                raise DeviceError(
                    f"the process that reads pages cannot be started with '{sys.executable}': {error}."
                ) from None
            except _Died as died:
                errors.seek(0)
                said = errors.read()[-2000:].decode(errors="replace").strip().splitlines()
                raise DeviceError(
                    f"the process that reads pages does not start (it {died.why}): {said[-1] if said else 'no reason'}."
                ) from None

    def _receive(self, deadline: float, limit_s: float, request: dict[str, Any] | None) -> Reply:
        n_header, n_bytes = PREFIX.unpack(self._read(PREFIX.size, deadline, limit_s, request))
        deadline = time.monotonic() + limit_s  # the rest only has to be copied
        header = json.loads(self._read(n_header, deadline, limit_s, request))
        return header, self._read(n_bytes, deadline, limit_s, request)

    def _read(self, n_bytes: int, deadline: float, limit_s: float, request: dict[str, Any] | None) -> bytearray:
        assert self._process is not None and self._process.stdout is not None
        data = bytearray(n_bytes)
        rest = memoryview(data)
        began = time.monotonic()
        while rest:
            now = time.monotonic()
            if not self._poll.poll(1000 * min(_WAIT_S, max(0.0, deadline - now))):
                if time.monotonic() > deadline:
                    self.close()
                    raise _Died(f"takes longer than {limit_s:g} s", by_itself=False)
                if self._waiting is not None and request is not None:
                    seconds = time.monotonic() - began
                    self._waiting(request["document"]["source"], request.get("number"), seconds)
                continue
            n_read = os.readv(self._process.stdout.fileno(), [rest])
            if not n_read:
                raise self._died()
            rest = rest[n_read:]
        return data

    def _died(self) -> _Died:
        assert self._process is not None
        try:
            status = self._process.wait(5)
        except subprocess.TimeoutExpired:  # it closed its end of the pipe but is still running
            status = -signal.SIGKILL
        self.close()
        if status == OUT_OF_MEMORY:
            return _Died(f"needs more than {self.limits.memory_bytes / (1 << 30):g} GiB of memory", by_itself=False)
        return _Died(
            f"ended with {_signal_name(-status)}" if status < 0 else f"ended with status {status}", by_itself=True
        )


def load_apart(sources: Sequence[str | bytes], limits: Limits = LIMITS) -> list[RawPage]:
    """Opens images, given as paths or as encoded bytes, like `load_image`, but in a separate process: an image that
    crashes or bloats a decoder does not crash the caller. Raises ImageError, ReaderEnded, DeviceError."""
    with contextlib.closing(Reader(limits)) as reader:
        return [_document_of(reader, source).load() for source in sources]


def _document_of(reader: Reader, source: str | bytes) -> RemoteDocument:
    if isinstance(source, bytes):
        name = f"the image ({len(source):,} bytes)"
        return RemoteDocument(reader, name, name, path=None, content=source, state=None, password=None)
    return RemoteDocument(reader, source, f"'{shown(source)}'", path=source, content=None, state=None, password=None)


class RemoteDocument:
    """A document that the reader opens, and opens again after every restart.

    Every request has two steps, `begin_...` and `finish_...`, so that the parent can work in between. A request that
    ends the reader is sent once more, to a new one: the first may have ended because of what it had read before.
    """

    def __init__(
        self,
        reader: Reader,
        source: str,
        name: str,
        *,
        path: str | None,
        content: bytes | None,
        state: str | None,
        password: str | None,
        index: list[int] | None = None,
    ) -> None:
        """`name`: for messages. `index`: from an earlier `finish_open`, which makes opening faster."""
        self._reader, self._name, self._content = reader, name, content or b""
        self._document = {
            "id": next(_IDS),
            "source": source,
            "path": path,
            "state": state,
            "password": password,
            "index": index,
        }
        self._request: dict[str, Any] = {}
        self.n_pages = 0
        self.damage: str | None = None
        self.index: list[int] | None = None

    def load(self) -> RawPage:
        """Returns the document as one image, opened like `load_image`. Raises what `finish_open` raises."""
        self._ask({"op": "load", "about": self._name})
        return self.finish_render()

    def begin_open(self) -> None:
        self._ask({"op": "open", "about": self._name})

    def finish_open(self) -> None:
        """Sets `n_pages`, `damage` and `index`. Raises DocumentError, ImageError, ReaderEnded, DeviceError."""
        header, _ = self._answer()
        self.n_pages, self.damage, self.index = header["n_pages"], header["damage"], header["index"]
        self._document["index"] = self.index

    def begin_render(self, number: int, crop: Crop | None, tiling: Tiling | None) -> None:
        self._ask(
            {
                "op": "render",
                "about": self.page_name(number),
                "number": number,
                "crop": None if crop is None else asdict(crop),
                "tiling": None if tiling is None else asdict(tiling),
            }
        )

    def finish_render(self) -> RawPage:
        """Returns the page. Raises what `finish_open` raises."""
        header, pixels = self._answer()
        return RawPage(tuple(header["size"]), pixels, header["dpi"], tuple(header["warnings"]))

    def page_name(self, number: int) -> str:
        return f"page {number} of {self._name}" if self.n_pages > 1 else self._name

    def _ask(self, request: dict[str, Any]) -> None:
        self._request = {**request, "document": self._document}
        self._reader.ask(self._request, self._content)

    def _answer(self) -> Reply:
        limits = self._reader.limits
        limit_s = limits.open_s if self._request["op"] == "open" else limits.page_s
        try:
            header, payload = self._reader.answer(self._request, limit_s)
        except _Died:
            self._reader.ask(self._request, self._content)
            try:
                header, payload = self._reader.answer(self._request, limit_s)
            except _Died as died:
                raise ReaderEnded(_why(died, self._request["op"], self._request["about"])) from None
        if "error" in header:
            raise _ERRORS[header["error"]](header["message"])
        return header, payload


_ERRORS: dict[str, type[Granite4vError]] = {kind.__name__: kind for kind in (ImageError, DocumentError, PasswordError)}


def _why(died: _Died, op: str, about: str) -> str:
    advice = "Print it to a new PDF, or save it as an image, and read that."
    if died.by_itself:
        return (
            f"the page reader {died.why} while {op}ing {about}, twice; the file is damaged or not supported. {advice}"
        )
    return f"{about} {died.why} to {op}, twice; it is damaged or unusually large. {advice}"


def _scratch_file() -> IO[bytes]:
    """Opens a temporary file without a name. If there is no place for one, as in a read-only container, what is written
    is lost, so that pages can be read there as well."""
    try:
        return tempfile.TemporaryFile()
    except OSError:
        return open(os.devnull, "w+b")


def _widen(pipe: int) -> None:
    """Enlarges a pipe's buffer if the system allows it: it may refuse when the user has many pipes."""
    resize = getattr(fcntl, "F_SETPIPE_SZ", None)  # Linux only
    if resize is not None:
        with contextlib.suppress(OSError):
            fcntl.fcntl(pipe, resize, _PIPE_BYTES)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
