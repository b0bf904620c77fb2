"""Runs `granite4v serve` as a child process, for checks that use it over HTTP."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType


class Server:
    """A server on a free port, ready to answer; it is terminated when the context is left."""

    def __init__(self, *arguments: str) -> None:
        number, path = tempfile.mkstemp(prefix="granite4v-serve-", suffix=".log")
        self._log = Path(path)
        command = [sys.executable, "-m", "granite4v", "serve", "--port", "0", *arguments]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=number, env=dict(os.environ))
        os.close(number)
        try:
            self.port = int(self._said(r"listening at http://127\.0\.0\.1:(\d+)"))
            while not self._is_ready():
                time.sleep(0.05)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def metrics(self) -> dict[str, float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=60) as reply:
            lines = reply.read().decode().splitlines()
        pairs = (line.rpartition(" ") for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in pairs}

    def close(self) -> int:
        """Ends the server with SIGTERM and returns its exit status."""
        self._process.terminate()
        try:
            return self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise
        finally:
            self._log.unlink()

    def _said(self, pattern: str) -> str:
        until = time.monotonic() + 300
        while True:
            if found := re.search(pattern, self.log):
                return found[1]
            if self._process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"the server does not listen: {self.log}")
            time.sleep(0.05)

    def _is_ready(self) -> bool:
        if self._process.poll() is not None:
            raise SystemExit(f"the server has ended: {self.log}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=60):
                return True
        except urllib.error.HTTPError:
            return False

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
