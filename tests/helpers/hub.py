"""A fake of the Hugging Face hub over real HTTP: listings, and files with redirects, ranges and faults.

It serves what huggingface_hub and our downloads request: `/api/models/ID[/revision/REV]?blobs=true`, and
`/ID/resolve/REV/PATH`, which redirects to another host for large files, as the hub does. Every request is logged.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".gguf", ".safetensors")  # stored with LFS, and therefore listed with their SHA-256


@dataclass
class Request:
    """One request, and how it was answered."""

    method: str
    host: str
    path: str
    start: int | None  # of the requested range
    authorization: str | None
    status: int = 0
    n_bytes: int = 0  # of the body that was sent


@dataclass
class Faults:
    """The faults to inject. Values in lists are consumed one by one; those marked 'permanent' are not."""

    statuses: dict[str, list[int]] = field(default_factory=dict)  # by the end of the path; -1: hang up at once
    cuts: dict[str, list[int]] = field(default_factory=dict)  # hang up after this many bytes of a file
    holds: dict[str, int] = field(default_factory=dict)  # pause after this many bytes until `go_on` is set; permanent
    dead_after: dict[str, int] = field(default_factory=dict)  # hang up after this many transfers of a path; permanent
    flips: dict[str, list[int]] = field(default_factory=dict)  # flip a bit of the byte at this offset
    listed: dict[str, dict[str, Any]] = field(default_factory=dict)  # overrides in listings, by path; permanent
    retry_after: str | None = None
    ignores_ranges: bool = False
    gated: set[str] = field(default_factory=set)  # repositories that need a token
    private: set[str] = field(default_factory=set)


class Hub:
    """Repositories by name: {commit: {path: content}}; the last commit is 'main'."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.requests: list[Request] = []
        self.faults = Faults()
        self.go_on = threading.Event()
        self.held = threading.Event()  # set when a transfer pauses
        self.token = "hf_right"
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add(self, name: str, files: dict[str, bytes]) -> str:
        """Adds a commit and returns its hash."""
        content = json.dumps([name, *(hashlib.sha256(data).hexdigest() for data in files.values()), *files])
        commit = hashlib.sha1(content.encode()).hexdigest()
        self.repositories.setdefault(name, {})[commit] = files
        return commit

    def downloads(self, path: str) -> list[tuple[int | None, int]]:
        """Returns (start, bytes sent) for every transfer of a file whose path ends with `path`."""
        found = (one for one in self.requests if one.path.endswith(path) and one.status in (200, 206))
        return [(one.start, one.n_bytes) for one in found if one.n_bytes]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        path = unquote(urlsplit(self.path).path)
        self.request_log = Request(
            self.command,
            self.headers.get("Host", ""),
            path,
            int(asked[1]) if asked else None,
            self.headers.get("Authorization"),
        )
        self.hub.requests.append(self.request_log)
        for suffix, statuses in self.hub.faults.statuses.items():
            if path.endswith(suffix) and statuses:
                self.fail(statuses.pop(0))
                return
        if any(
            path.endswith(one) and len(self.hub.downloads(one)) >= n for one, n in self.hub.faults.dead_after.items()
        ):
            self.fail(-1)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self.list_files(match[1], match[2])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(match[1], match[2], match[3])
        elif match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/([0-9a-f]{40})/(.+)", path):
            self.send(self.hub.repositories[match[1]][match[2]][match[3]], match[3])
        else:
            self.fail(404)

    def fail(self, status: int, code: str = "", message: str = "") -> None:
        if status < 0:
            self.close_connection = True
            return
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        if status == 429 and self.hub.faults.retry_after:
            headers["Retry-After"] = self.hub.faults.retry_after
        self.reply(status, b'{"error": "no"}', headers)

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.request_log.status = status
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def files_of(self, name: str, revision: str | None) -> tuple[str, dict[str, bytes]] | None:
        """Returns the commit and its files; None after answering the request with an error."""
        commits = self.hub.repositories.get(name)
        may_see = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if self.headers.get("Authorization") and not may_see:
            self.fail(401, message="Invalid credentials in Authorization header")
            return None
        if commits is None or (name in self.hub.faults.private and not may_see):
            self.fail(404 if may_see else 401, "RepoNotFound")
            return None
        commit = list(commits)[-1] if revision in (None, "main") else revision
        if commit not in commits:
            self.fail(404, "RevisionNotFound")
            return None
        return str(commit), commits[str(commit)]

    def list_files(self, name: str, revision: str | None) -> None:
        found = self.files_of(name, revision)
        if found is None:
            return
        commit, files = found
        siblings = []
        for path, data in files.items():
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            entry: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": blob}
            if path.endswith(LARGE):
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            siblings.append({**entry, **self.hub.faults.listed.get(path, {})})
        body = {"_id": "1", "id": name, "sha": commit, "siblings": siblings}
        self.reply(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def resolve(self, name: str, revision: str, path: str) -> None:
        found = self.files_of(name, revision)
        if found is None:
            return
        commit, files = found
        may_see = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if name in self.hub.faults.gated and not may_see:
            self.fail(403, "GatedRepo")
        elif path not in files:
            self.fail(404, "EntryNotFound")
        elif path.endswith(LARGE):
            headers = {
                "Location": f"http://localhost:{self.hub.port}/cdn/{name}/{commit}/{path}",
                "X-Repo-Commit": commit,
                "X-Linked-Size": str(len(files[path])),
                "X-Linked-ETag": f'"{hashlib.sha256(files[path]).hexdigest()}"',
            }
            self.reply(302, b"", headers)
        else:
            self.send(files[path], path, commit)

    def send(self, data: bytes, path: str, commit: str = "") -> None:
        """Sends a file from the requested offset, with the faults that are due."""
        for offset in self.hub.faults.flips.get(path, [])[:1]:
            self.hub.faults.flips[path].pop(0)
            data = data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :]
        start = 0 if self.hub.faults.ignores_ranges else self.request_log.start or 0
        body = data[start:]
        self.request_log.status = 206 if start else 200
        self.send_response(self.request_log.status)
        headers = {"Content-Length": str(len(body)), "ETag": f'"{len(data)}"', "X-Repo-Commit": commit}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.send_body(body, path)

    def send_body(self, body: bytes, path: str) -> None:
        cut = self.hub.faults.cuts.get(path, [])
        end = min(cut.pop(0), len(body)) if cut else len(body)
        hold = self.hub.faults.holds.get(path)
        if hold is not None and hold < end:
            self.write(body[:hold])
            self.hub.held.set()
            self.hub.go_on.wait(60)
            self.write(body[hold:end])
        else:
            self.write(body[:end])
        if end < len(body):
            self.close_connection = True

    def write(self, data: bytes) -> None:
        try:
            self.wfile.write(data)
            self.wfile.flush()
            self.request_log.n_bytes += len(data)
        except OSError:  # the client was killed
            self.close_connection = True


@contextmanager
def serving() -> Iterator[Hub]:
    """Runs a hub until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.go_on.set()
        server.shutdown()
        server.server_close()
        thread.join(10)
