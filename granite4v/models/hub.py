"""Lists repositories of the Hugging Face hub, and downloads their files; interrupted downloads are resumed.

huggingface_hub handles the endpoint, the token, proxies and offline mode (HF_ENDPOINT, HF_TOKEN, HF_HOME,
HF_HUB_OFFLINE). It does not resume a file that an earlier process began (as of 2.4 it removes such files), so that is
done here, with its HTTP session.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_session, hf_hub_url
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from granite4v.errors import HubError
from granite4v.models.repository import HubFile, Repository
from granite4v.paths import disk_errors

PIECE_BYTES = 1 << 18
WAITS_S = (0.5, 1.0, 2.0, 4.0)  # waits after consecutive attempts without progress
MAX_RETRY_AFTER_S = 20.0
_KEY = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")  # SHA-256, or git's SHA-1
_PASSING = (408, 429, 500, 502, 503, 504)  # HTTP statuses that are worth a retry


class _PassingError(HubError):
    """A failure that is worth a retry. `wait_s`: how long the server asked to wait."""

    wait_s: float | None = None


def endpoint() -> str:
    return str(constants.ENDPOINT)


def list_repository(name: str, revision: str | None = None) -> Repository:
    """Lists the files of a repository at a branch, tag or commit ('main' by default). Raises HubError."""
    info = _attempt(
        lambda: HfApi().model_info(
            name, revision=revision, files_metadata=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
        ),
        name,
        revision,
    )
    files = tuple(found for sibling in info.siblings or () if (found := _hub_file(sibling)) is not None)
    if not info.sha or not files:
        raise HubError(
            f"{constants.ENDPOINT} lists no files of '{name}'; check the name, and HF_ENDPOINT if it is set."
        )
    return Repository(name, info.sha, files)


def _hub_file(sibling: Any) -> HubFile | None:
    """Converts an entry of a listing; None if it lacks what a download needs. Names and checksums become local file
    names, and a mirror is not trusted, so they are checked."""
    path, n_bytes, sha256 = sibling.rfilename, sibling.size, sibling.lfs.sha256 if sibling.lfs else None
    file = HubFile(path, n_bytes, sha256, sibling.blob_id)
    is_known = isinstance(n_bytes, int) and n_bytes >= 0 and isinstance(file.key, str)
    return file if is_known and _KEY.fullmatch(file.key) and path.isprintable() else None


def download(repository: Repository, file: HubFile, path: Path, advance: Callable[[int], None]) -> None:
    """Downloads a file to `path`, and resumes after the bytes that an earlier attempt left there.

    `advance` gets the number of bytes of each piece, and a negative number when the server restarts from the beginning.
    Interrupted transfers are resumed. Raises HubError when nothing more arrives, OutputError for disk errors. Received
    bytes stay in `path`.
    """
    url = hf_hub_url(repository.name, file.path, revision=repository.commit)
    waits = list(WAITS_S)
    with disk_errors(path), open(path, "r+b" if path.exists() else "w+b") as target:
        furthest = target.seek(0, os.SEEK_END)
        while (have := target.tell()) < file.n_bytes:
            try:
                for piece in _pieces(url, have, repository.name):
                    if piece is None:  # the server sends the file from its beginning
                        target.seek(0)
                        target.truncate()
                        advance(-have)
                        continue
                    target.write(piece)
                    target.flush()  # keeps the bytes if this process is killed
                    advance(len(piece))
                    # only new bytes reset the waits: a server that always restarts and breaks off makes no progress
                    if target.tell() > furthest:
                        furthest, waits = target.tell(), list(WAITS_S)
                    if target.tell() >= file.n_bytes:  # the checksum detects excess bytes
                        break
                if target.tell() <= have:
                    raise _PassingError(f"{constants.ENDPOINT} sent nothing of '{file.path}'; try again later.")
            except _PassingError as error:
                _wait(waits, error)


def _attempt(ask: Callable[[], Any], name: str, revision: str | None) -> Any:
    waits = list(WAITS_S)
    while True:
        try:
            return ask()
        except Exception as error:  # huggingface_hub's HTTP library decides what it raises, which changes with versions
            said = _as_hub_error(error, name, revision)
            if not isinstance(said, _PassingError):
                raise said from None
            _wait(waits, said)


def _wait(waits: list[float], error: _PassingError) -> None:
    """Waits before the next attempt. Raises HubError after the last one, or if the server asks to wait longer than
    MAX_RETRY_AFTER_S."""
    if not waits or (error.wait_s or 0) > MAX_RETRY_AFTER_S:
        raise HubError(str(error)) from None
    time.sleep(max(waits.pop(0), error.wait_s or 0))


def _pieces(url: str, start: int, name: str) -> Iterator[bytes | None]:
    """Yields the bytes of a file from `start` on. If the server sends them from the beginning instead, yields None
    first. Raises HubError."""
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        with get_session().stream(
            "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, follow_redirects=True
        ) as response:
            hf_raise_for_status(response)
            if start and not (
                response.status_code == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
            ):
                if response.status_code == 206:
                    raise HubError(f"'{url}' answers with another part of the file than was asked for; try again.")
                yield None
            yield from response.iter_bytes(PIECE_BYTES)
    except HubError:
        raise
    except Exception as error:  # as in `_attempt`
        raise _as_hub_error(error, name) from None


def _as_hub_error(error: Exception, name: str, revision: str | None = None) -> HubError:
    """Converts an error to a HubError that says what happened and what to do about it."""
    here = constants.ENDPOINT
    if isinstance(error, OfflineModeIsEnabled):
        return HubError(
            f"{here} cannot be asked about '{name}': HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) forbids it; unset that, "
            "or give a model that 'granite4v models list' shows."
        )
    if isinstance(error, GatedRepoError):
        return HubError(
            f"'{name}' is gated: accept its conditions at {here}/{name}, then log in with 'hf auth login', or set "
            "HF_TOKEN."
        )
    if isinstance(error, RevisionNotFoundError):
        return HubError(f"'{name}' has no revision '{revision or 'main'}'; look at {here}/{name}/tree/main.")
    if isinstance(error, DisabledRepoError):
        return HubError(f"access to '{name}' is disabled by {here}; choose another model.")
    status = (
        getattr(getattr(error, "response", None), "status_code", None) if isinstance(error, HfHubHTTPError) else None
    )
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return HubError(
            f"{here} has no repository '{name}', or it is private; check the name, or log in with 'hf auth login' (or "
            "HF_TOKEN) to an account that may read it."
        )
    if status in (401, 403):
        return HubError(
            f"{here} refuses access to '{name}' (status {status}); check HF_TOKEN, or log in again with 'hf auth "
            "login'."
        )
    if status == 429:
        return _rate_limit(error, here)
    text = f"status {status}" if status else _first_line(error)
    if status and status not in _PASSING:
        return HubError(f"{here} answers with {text} for '{name}'; check the name, and HF_ENDPOINT if it is set.")
    return _PassingError(
        f"'{name}' cannot be fetched from {here}: {text}. Check the network, or try again later; what is downloaded is "
        "kept."
    )


def _rate_limit(error: Exception, here: str) -> _PassingError:
    after = getattr(error, "response").headers.get("Retry-After", "")  # noqa: B009  # its type is another library's
    wait_s = float(after) if after.isdecimal() else None
    when = f"in {wait_s:.0f} seconds" if wait_s else "in a few minutes"
    passing = _PassingError(
        f"{here} limits how much may be asked of it (status 429); try again {when}, or log in with 'hf auth login' for "
        "a higher limit."
    )
    passing.wait_s = wait_s
    return passing


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
