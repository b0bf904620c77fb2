"""Reads complete files and pipes up to a size limit, and identifies the contents of files that are not images."""

from __future__ import annotations

import os
import re
import select
import stat
import time
from pathlib import Path

MAX_FILE_BYTES = 1 << 30  # largest file that is read: twice the largest image that Pillow opens, uncompressed
PIPE_S = 60.0  # longest wait for a byte from a pipe
_NO_WRITER_S = 0.02  # wait between two reads of a pipe that no process has opened for writing
_PIECE_BYTES = 1 << 20


def read_whole(path: Path, limit_bytes: int = MAX_FILE_BYTES, pipe_s: float = PIPE_S) -> bytes:
    """Reads a complete file or pipe of at most `limit_bytes`. `pipe_s`: longest wait for a byte from a pipe.

    Raises OSError with the reason, also for a file over the limit and for devices.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISFIFO(mode):
        return _from_pipe(path, limit_bytes, pipe_s)
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError("it is a device or a socket")
    with path.open("rb") as file:  # raises for a directory
        n_bytes = os.fstat(file.fileno()).st_size
        data = b"" if n_bytes > limit_bytes else file.read(limit_bytes + 1)  # kernel files such as /proc report size 0
    if max(n_bytes, len(data)) > limit_bytes:
        raise OSError(f"it has {max(n_bytes, len(data)):,} bytes, and at most {limit_bytes:,} are read")
    return data


def _from_pipe(path: Path, limit_bytes: int, pipe_s: float) -> bytes:
    """Reads until the writer closes the pipe. Opens it without blocking, since a writer may never come."""
    data = bytearray()
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as pipe:
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        deadline = time.monotonic() + pipe_s
        while len(data) <= limit_bytes:
            if not poll.poll(1000 * max(0.0, deadline - time.monotonic())):
                raise OSError(f"it is a pipe into which nothing came for {pipe_s:g} s")
            piece = pipe.read(_PIECE_BYTES)
            if piece is None or (not piece and not data and time.monotonic() < deadline):
                time.sleep(_NO_WRITER_S)  # no writer yet: some systems report end of file at once
            elif not piece:
                return bytes(data)
            else:
                data += piece
                deadline = time.monotonic() + pipe_s
    raise OSError(f"it is a pipe with more than {limit_bytes:,} bytes; save them to a file")


def printable(path: str) -> str:
    """Converts a path to text that can be written anywhere; bytes that are not UTF-8 become `\\xNN`."""
    try:
        return os.fsencode(path).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # text that no file name can contain
        return path.encode("utf-8", "backslashreplace").decode()


def shown(path: str) -> str:
    """Formats a path for a message: printable, and without characters that would move a terminal's cursor."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in printable(path))


_HEIF = rb"heic|heix|heim|heis|hevc|mif1|msf1"  # brands of HEIF images, which use the same container as MP4
_VIDEO = re.compile(
    rb".{4}ftyp(?!avi[fs]|" + _HEIF + rb")|\0.{3}(?:moov|mdat|wide|free)|\x1aE\xdf\xa3|RIFF.{4}AVI |FLV\x01|OggS|"
    rb"\0\0\x01[\xba\xb3]|\x30\x26\xb2\x75\x8e\x66\xcf\x11|G.{187}G.{187}G",
    re.DOTALL,
)
_PDF = re.compile(rb"\s*%PDF-")
_OTHERS = (
    (re.compile(rb"\s*(\xef\xbb\xbf)?\s*<(!doctype\s+html|html|head|body)", re.IGNORECASE), "a web page"),
    (re.compile(rb"\s*(\xef\xbb\xbf)?\s*<(\?xml[^>]*>\s*<)?svg", re.IGNORECASE), "an SVG drawing"),
    (re.compile(rb"PK(\x03\x04|\x05\x06)"), "an office document or a ZIP archive"),
    (re.compile(rb"\xd0\xcf\x11\xe0"), "an old office document"),
    (re.compile(rb"(\x1f\x8b|7z\xbc\xaf|BZh|\xfd7zXZ|Rar!)"), "an archive"),
    (re.compile(rb".{4}ftyp(" + _HEIF + rb")", re.DOTALL), "a HEIC (HEIF) image"),
    (re.compile(rb".{4}ftypavi[fs]", re.DOTALL), "an AVIF image"),
    (re.compile(rb"\0\0\0\x0cJXL |\xff\x0a"), "a JPEG XL image"),
    (re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"), "a JPEG 2000 image"),
    (re.compile(rb"%!PS|\xc5\xd0\xd3\xc6"), "PostScript"),
    (re.compile(rb"AT&TFORM"), "a DjVu document"),
    (_VIDEO, "a video"),
    (re.compile(rb"version https://git-lfs"), "a Git LFS pointer, not the file itself ('git lfs pull' gets it)"),
)


def is_pdf(head: bytes) -> bool:
    return _PDF.match(head) is not None


def is_video(head: bytes) -> bool:
    """Whether a file that begins with `head` is probably a video in one of the common containers."""
    return _VIDEO.match(head) is not None


def what_it_holds(head: bytes) -> str | None:
    """Names what a file that begins with `head` probably contains, as the object of 'holds' in a message; None if
    unknown."""
    for pattern, what in _OTHERS:
        if pattern.match(head):
            return what
    if not head.strip(b"\0"):
        return "nothing but zero bytes"
    text = head.decode("utf-8", "ignore")
    is_text = len(text.encode()) > len(head) - 4 and all(char.isprintable() or char.isspace() for char in text)
    return "text" if is_text else None


_URL = re.compile(r"(?!file:)([a-z][a-z0-9+.-]+):/+(?=[^/])", re.IGNORECASE)


def url_in(text: str) -> str | None:
    """Recovers the URL from a text that was treated as a path, which may have dropped one of its slashes; None for
    other texts."""
    match = _URL.match(text)
    return None if match is None else f"{match[1]}://{text[match.end() :]}"
