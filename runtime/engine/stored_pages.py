"""One engine's use of the page store: which prompt prefixes are stored, by what key, and when.

A key covers everything that the bits of a state depend on: the files, what computes them here, whether the adapter is
on, and the batches of the prefix with the contents of each position. So an entry is found only if recomputing the
prefix would give the same cells, and a prompt continues from it at the end of a batch, as a prefill would. A prefix
ends where an image ends.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from typing import Any, Protocol

import numpy as np

from granite4v.errors import ModelFileError, PageStoreWarning
from granite4v.runtime.engine.cached_sequence import Batch, total
from granite4v.runtime.engine.page_store import PageStore
from granite4v.runtime.engine.state_file import Description

PENDING_BYTES = 512 << 20  # limit for states waiting to be written; further ones are not stored
CLOSE_S = 3.0  # how long closing a model waits for its last states to be written


class Identity(Protocol):
    """What states depend on in addition to their prefix, as JSON data."""

    def prepare(self, announce: Callable[[str], None], check: Callable[[], None]) -> None:
        """Must be called before the first call. `announce` is called with what takes seconds; `check` is called
        meanwhile and may raise. Raises ModelFileError."""
        ...

    def __call__(self, adapter: bool, least_rows: int) -> Mapping[str, Any]:
        """Identity of prefixes with an adapter or without, whose smallest batch has `least_rows` rows. Raises
        ModelFileError once nothing may be stored any more."""
        ...

    def of_images(self) -> Mapping[str, Any]:
        """Identity of encoded images alone. Raises ModelFileError as a call does."""
        ...


class StoredPrefix:
    """A prefix of a prompt for which the store has a file."""

    def __init__(self, batches: Sequence[Batch], load: Callable[[], np.ndarray | None], reader: Executor) -> None:
        """`load`: see `PageStore.load`; it is called in a thread of `reader`."""
        self.batches, self.n_tokens = list(batches), total(batches)
        self._load, self._reader = load, reader
        self._reading: Future[np.ndarray | None] | None = None
        self.is_taken = False  # whether a sequence was restored from it

    def begin(self) -> None:
        """Starts reading the state in the background: that takes as long as making a context for it."""
        if self._reading is None:
            with contextlib.suppress(RuntimeError):  # the process is about to end
                self._reading = self._reader.submit(self._load)

    def load(self) -> np.ndarray | None:
        """Returns the state, uint8 `(n,)`; None if it is unusable after all. No reference to it is kept."""
        reading, self._reading = self._reading, None
        return self._load() if reading is None else reading.result()


class StoredPages:
    """Finds the longest stored prefix of a prompt, and writes prefixes in a background thread."""

    def __init__(self, store: PageStore, model: str, identity: Identity) -> None:
        """`model`: a human-readable name."""
        self.store, self._model, self._identity = store, model, identity
        self._reader = ThreadPoolExecutor(1, "granite4v-read-pages")
        self._writer = ThreadPoolExecutor(1, "granite4v-pages")
        self._pending: dict[Future[bool], int] = {}
        self._is_closing = threading.Event()
        self._is_off = self._is_prepared = False

    def _switch_off(self, reason: str) -> None:
        """Disables the store for the rest of this engine's life, with a warning."""
        self._is_off = True
        warnings.warn(f"pages are not stored: {reason}", PageStoreWarning, stacklevel=2)

    def find(
        self,
        plan: Sequence[Batch],
        n_known: int,
        *,
        adapter: bool,
        announce: Callable[[str], None],
        check: Callable[[], None],
    ) -> StoredPrefix | None:
        """Finds the longest stored prefix with more than `n_known` positions. The plan's last position is always
        computed.

        `announce`, `check`: see `Identity.prepare`.
        """
        if self._is_off:
            return None
        try:
            self._identity.prepare(announce, check)
        except ModelFileError as error:
            self._switch_off(str(error))
            return None
        self._is_prepared = True
        for n_batches in reversed(image_ends(plan)):
            prefix = plan[:n_batches]
            if total(prefix) <= n_known:
                return None
            if n_batches == len(plan):
                continue
            key = self._key(prefix, adapter=adapter)
            if key is None:
                return None
            if self.store.holds(key):
                return StoredPrefix(prefix, functools.partial(self.store.load, key), self._reader)
        return None

    def save(self, plan: Sequence[Batch], n_batches: int, state: Callable[[], np.ndarray], *, adapter: bool) -> None:
        """Stores the first batches of a plan, which end with an image, unless they are already stored.

        Of several images, only the prefix up to the first and the one up to the last are stored: either may be asked
        about again, and each prefix in between would take as much room as the longest. `state()` copies the state now;
        it is written later.
        """
        ends, prefix = image_ends(plan), plan[:n_batches]
        if self._is_off or n_batches not in (ends[0], ends[-1]):
            return
        key = self._key(prefix, adapter=adapter)
        if key is None or self.store.holds(key) or self._is_behind():
            return
        description = Description(key, self._model, total(prefix), ends.index(n_batches) + 1, time.time())
        self._write(description, state())

    # --- images for cross-attention, which are not part of the decoder's cells ---

    def find_image(self, digest: bytes) -> np.ndarray | None:
        """Returns the encoder's result for an image, uint8 `(n,)`; None if it is not stored, or before the first
        `find`."""
        key = self._image_key(digest)
        return None if key is None else self.store.load(key)

    def save_image(self, digest: bytes, values: np.ndarray) -> None:
        """Stores an encoded image, unless it is already stored; does nothing before the first `find`. `values` must not
        change afterwards."""
        key = self._image_key(digest)
        if key is None or self.store.holds(key) or self._is_behind():
            return
        self._write(Description(key, self._model, 1, 1, time.time()), values.reshape(-1).view(np.uint8))

    def _image_key(self, digest: bytes) -> str | None:
        """None before the first `find`, and when the store is off."""
        if self._is_off or not self._is_prepared:
            return None
        return self._hashed(lambda: {**self._identity.of_images(), "image": digest.hex()})

    # --- writing ---

    def _is_behind(self) -> bool:
        """Whether so much is waiting to be written that new states are skipped."""
        self._pending = {future: n_bytes for future, n_bytes in self._pending.items() if not future.done()}
        return sum(self._pending.values()) > PENDING_BYTES

    def _write(self, description: Description, state: np.ndarray) -> None:
        try:
            future = self._writer.submit(self.store.save, description, state, self._is_closing.is_set)
        except RuntimeError:  # the process is about to end
            return
        self._pending[future] = len(state)

    # --- keys ---

    def _key(self, prefix: Sequence[Batch], *, adapter: bool) -> str | None:
        """The key of a prefix; None when the store is off."""
        digest = hashlib.sha256()
        for batch in prefix:
            digest.update(b"batch %d:" % batch.n_tokens)
            for position in batch.keys:
                if isinstance(position, tuple):
                    digest.update(b" image %s %d" % (position[0].hex().encode(), position[1]))
                else:
                    digest.update(f" {position}".encode())
        least_rows = min(batch.n_tokens for batch in prefix)
        return self._hashed(
            lambda: {
                **self._identity(adapter, least_rows),
                "adapter_is_on": adapter,
                "prefix": digest.hexdigest(),
            }
        )

    def _hashed(self, identity: Callable[[], Mapping[str, Any]]) -> str | None:
        try:
            return hashlib.sha256(json.dumps(identity(), sort_keys=True).encode()).hexdigest()
        except ModelFileError as error:
            self._switch_off(str(error))
            return None

    def close(self) -> None:
        """Waits up to `CLOSE_S` for pending writes, and gives up the rest."""
        wait(self._pending, timeout=CLOSE_S)
        self._is_closing.set()
        self._reader.shutdown(wait=False, cancel_futures=True)
        self._writer.shutdown(cancel_futures=True)


def image_ends(plan: Sequence[Batch]) -> list[int]:
    """Numbers of batches after which each image of a plan ends.

    For example, batches of template, image 1, image 1, text, image 2, question give [3, 5]. An image may continue after
    other tokens: batches of template, tile of image 1, token, tile of image 1, question give [4].
    """
    images = [(i + 1, batch.keys) for i, batch in enumerate(plan) if isinstance(batch.keys[-1], tuple)]
    following = itertools.chain((keys[0] for _, keys in images[1:]), [None])
    return [end for (end, keys), other in zip(images, following, strict=False) if other != _next(keys[-1])]


def _next(position: Any) -> tuple[bytes, int]:
    digest, place = position
    return digest, place + 1
