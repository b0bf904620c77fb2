"""The engine of a loaded model: its parts, each opened on first use, and the thread that runs them.

Any thread may submit requests and read their answers; only the engine's thread calls llama.cpp and ggml. The vision
file's weights are read at the first image, the text file's after that. So a text-only request never touches the vision
file, and the two memory peaks do not add up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING, Any, TypeVar, cast

from granite4v.choices import CacheType, VisionCompute
from granite4v.ggml.backend import Aborted, check_threads, find_device
from granite4v.ggml.cpu import FreeThreads
from granite4v.runtime.answer import Answer
from granite4v.runtime.engine.attention import Attention
from granite4v.runtime.engine.cross_attention import CrossAttention, CrossRule
from granite4v.runtime.engine.injection import EmbeddingRows
from granite4v.runtime.engine.kv_cache import Context, KvCache
from granite4v.runtime.engine.page_identity import PageIdentity
from granite4v.runtime.engine.page_store import PageStore
from granite4v.runtime.engine.parallel import Workload, most_cells, n_sequences
from granite4v.runtime.engine.scheduler import Counters, Scheduler
from granite4v.runtime.engine.sequence import Advances
from granite4v.runtime.engine.stored_pages import StoredPages, StoredPrefix
from granite4v.runtime.engine.stream import Cancel, Channel, Progress, Stream
from granite4v.runtime.engine.task import Rows, Task
from granite4v.runtime.engine.text_model import TextModel, context_size
from granite4v.runtime.engine.thread import EngineThread, close_at_exit
from granite4v.runtime.engine.vision import Vision
from granite4v.runtime.llama.abort import AbortFlag
from granite4v.runtime.llama.context import LlamaContext
from granite4v.runtime.llama.files import ModelFiles
from granite4v.runtime.llama.placement import N_UBATCH
from granite4v.runtime.prompt.spans import ImageSpan, Prompt

if TYPE_CHECKING:
    from granite4v.clip_projector import Image, ImageFeatures, View, VisionEncoder
    from granite4v.clip_projector.cross_features import CrossFeatures
    from granite4v.runtime.engine.vision import Features

T = TypeVar("T")

# Weight types for which a row's values depend on whether the row is alone in a batch, and on nothing else of it.
SAME_FROM_TWO_ROWS = frozenset({"F32", "F16", "BF16", "Q8_0"})
_LOOK_S = 1.0  # polling interval for paused answers, in case nothing wakes the thread


class Engine:
    """The parts of one model, and its thread."""

    def __init__(
        self,
        files: ModelFiles,
        *,
        n_ctx: int | None,
        n_threads: int | None,
        n_parallel: int | None,
        device: str,
        exact: bool,
        vision_compute: VisionCompute = "file",
        workload: Workload | None = None,
        page_store: PageStore | None = None,
        cache_type: CacheType = "f16",
    ) -> None:
        """`n_parallel`: requests computed concurrently; for the others see `Model.load`. Raises DeviceError, TypeError,
        ArgumentError."""
        find_device(device)  # a missing device is reported now, not after the first image
        self.files, self.device, self.exact, self.cache_type = files, device, exact, cache_type
        self.n_threads = check_threads(n_threads)
        # an explicit n_threads is kept; `exact` compares values, which depend on the number of threads
        self._free_threads = FreeThreads(self.n_threads) if n_threads is None and not exact else None
        self.warnings: list[str] = []
        self.n_ctx = n_ctx = context_size(files, n_ctx, self.warnings)
        self.n_ubatch = min(N_UBATCH, self.n_ctx)
        self.n_parallel, self.width = n_sequences(
            files, n_parallel, workload, self.n_ctx, device, self.n_threads, cache_type, exact=exact
        )
        self.n_parallel = min(self.n_parallel, self.n_ubatch)
        self._abort = AbortFlag()
        self._thread = EngineThread("granite4v", self._abort)
        self._has_workload = workload is not None
        self._is_batch = workload is not None and self.n_parallel > 1
        # stored pages are shared with conversations, which do not prefer flash attention; `exact` has none
        prefers_flash = None if exact else self._has_workload and page_store is None
        self._attention = Attention.chosen(files, device, cache_type, n_ctx, self.n_ubatch, prefers_flash)
        self._cache = KvCache(
            self._open_context,
            self.n_ctx,
            self.n_parallel,
            opens_all=self._is_batch,
            most_cells=most_cells(files, cache_type=cache_type) if self._is_batch else None,
        )
        parts = (files, device, self.n_threads, self._abort)
        self._vision = Vision(*parts, lambda digest: self._cache.holds((digest, 0)), vision_compute)
        same_from_two = {info.type_name for info in files.text.tensors.values()} <= SAME_FROM_TWO_ROWS
        least_rows = 2 if self._is_batch and same_from_two else 1
        fills = self._is_batch and self._attention.has_tiles
        rows: dict[str, Any] = {"least_rows": least_rows, "most_rows": self._attention.kernels.most_rows}
        self._scheduler = Scheduler(self._cache, self, self.n_ubatch, fills_questions=fills, **rows)
        is_compiled = bool(self._attention.kernels.products)
        self._text = TextModel(*parts, exact=exact, for_many=self._is_batch, compiled=is_compiled)
        self._cross = CrossAttention.of(*parts, exact=exact)
        self._pages = None if page_store is None else self._open_pages(page_store)
        self._vision.stored = self._pages if files.is_cross_attending else None
        self._changed = threading.Condition()  # guards everything below
        self._inbox: list[Task] = []
        self._calls: list[Callable[[], None]] = []
        self._is_running = self._is_started = self._has_news = False
        self._computing: tuple[Channel, ...] = ()
        self.is_closed = False

    def _open_pages(self, store: PageStore) -> StoredPages:
        path, chosen = self.files.text.path.absolute(), self._attention.settings
        parts = (self.files, self._vision, self._text, self._cross)
        identity = PageIdentity(*parts, device=self.device, n_threads=self.n_threads, attention=chosen)
        return StoredPages(store, f"{path.parent.name}/{path.name}", identity)

    # --- state ---

    @property
    def settings(self) -> dict[str, Any]:
        """The settings chosen for this machine, as plain data."""
        kernels = self._vision.encoder().kernels if self._vision.is_open else {}
        return {
            "device": self.device,
            "n_threads": self.n_threads,
            "n_parallel": self.n_parallel,
            "n_ubatch": self.n_ubatch,
            "n_ctx": self._cache.n_cells,
            **self._attention.settings,
            "text_buffer_types": self._text.placement.n_copies,
            "vision_compute": self._vision.compute,
            "vision_kernels": {kind: kernel.name for kind, kernel in kernels.items()},
        }

    @property
    def counters(self) -> Counters:
        """What was computed since the model was loaded."""
        return dataclasses.replace(self._scheduler.counters)

    @property
    def n_sequences_in_use(self) -> int:
        return self._cache.n_in_use

    @property
    def text_is_open(self) -> bool:
        return self._text.is_open

    @property
    def vision_is_open(self) -> bool:
        return self._vision.is_open

    def check_usable(self) -> None:
        """Raises ValueError for a model that was closed, DeviceError in a forked process."""
        self._thread.check_process()
        if self.is_closed:
            raise ValueError("the model is closed")

    # --- called from any thread ---

    def submit(
        self,
        prompt: Prompt,
        advances: Advances,
        answer: Answer,
        *,
        max_tokens: int,
        adapter: bool,
        cancel: Cancel | None = None,
        progress: Progress | None = None,
        listener: Callable[[], None] | None = None,
    ) -> Stream:
        """Begins a request. Its answer is generated even if nobody reads the stream, up to the stream's queue size."""
        channel = Channel(answer, self._wake, listener=listener)
        task = Task(prompt.spans, advances, channel, max_tokens=max_tokens, adapter=adapter, images=prompt.images)
        answer.timings.n_prompt, answer.timings.n_image = prompt.n_tokens, prompt.n_image_tokens
        if self._cross is not None and self._cross.rule == "transformers":  # rows depend on later images
            self.clear()
        # made before the request is queued: if Ctrl-C comes in between, dropping the stream cancels the request
        stream = Stream(channel, cancel=cancel, progress=progress, check=self._thread.check_process)
        self._thread.check_process()  # before the lock, which may have been held at a fork
        with self._changed:
            self.check_usable()
            self._inbox.append(task)
            self._start()
        return stream

    def call(self, function: Callable[[Progress], T], progress: Progress | None = None) -> T:
        """Calls a function in the engine's thread, between two steps, and returns its result. Ctrl-C aborts it.

        `function` gets a callback for reporting progress. The latest report is passed to `progress` in the waiting
        thread, which may therefore use the model.
        """
        wanted = Channel(Answer(), self._wake)
        results: list[T] = []

        def run() -> None:
            error: BaseException | None = None
            try:
                with self._computing_for((wanted,)):
                    results.append(function(wanted.report))
            except BaseException as raised:
                aborted = isinstance(raised, Aborted) and self.is_closed
                error = ValueError("the model is closed") if aborted else raised
            wanted.finish(error)

        self._thread.check_process()
        with self._changed:
            self.check_usable()
            self._calls.append(run)
            self._start()
        Stream(wanted, progress=progress, check=self._thread.check_process).result()
        return results[0]

    def encode(self, image: Image | View, progress: Progress | None = None) -> Features:
        """Returns an image's embeddings. `progress` is called in the calling thread."""
        self.files.need_vision()
        return self.call(lambda report: self._vision.features(image, report), progress)

    def encoder(self) -> VisionEncoder:
        """Returns the encoder itself, for callers that inspect it while nothing else is computed."""
        self.check_usable()
        self.files.need_vision()
        return self._vision.encoder()

    def follow(self, rule: CrossRule) -> None:
        """Sets the rule by which rows attend to images, before the first request: 'transformers' to compare with it."""
        self._vision.states_after = rule == "transformers"
        if self._cross is not None:
            self._cross.rule = rule

    def clear(self) -> None:
        """Forgets all images and prompts except those of requests in progress."""

        def clear(_: Progress) -> None:
            self._vision.clear()
            self._cache.clear()
            if self._cross is not None:
                self._cross.forget()

        self.call(clear)

    def close(self) -> bool:
        """Ends all requests, with an error for those who wait for them, and frees everything. Returns False if it has
        nothing to do: on a second call, which only waits for the first one to finish, and in a forked process.

        The engine's thread frees what it may be using. So everything is freed and nobody waits forever, even if Ctrl-C
        interrupts the wait for its end, or if the garbage collector calls this in the engine's thread.
        """
        if not self._thread.is_ours:
            return False
        with self._changed:
            is_first, self.is_closed = not self.is_closed, True
            if is_first and self._is_started:
                self._thread.stop(self._free)
            self._has_news = True
            self._changed.notify_all()
        if is_first and not self._is_started:
            self._free()
        self._thread.join()
        return is_first

    def _free(self) -> None:
        self._scheduler.end_all(ValueError("the model is closed"))
        for task in self._inbox:
            task.channel.finish(ValueError("the model is closed"))
        for call in self._calls:
            call()
        if self._pages is not None:
            self._pages.close()
        self._cache.close()
        if self._cross is not None:
            self._cross.close()
        self._text.close()
        self._vision.close()
        self.files.close()

    # --- the engine's thread ---

    def _start(self) -> None:
        """Makes the thread work. The caller holds the lock."""
        self._has_news = True
        self._changed.notify_all()
        if not self._is_running:
            close_at_exit(self)
            self._is_started = True
            self._thread.run(self._work)
            self._is_running = True  # set last: if Ctrl-C comes before, the next request starts the work again

    def _wake(self, *, blocking: bool = True) -> None:
        """Called from a consumer's thread when it has cancelled or read on."""
        if not self._changed.acquire(blocking=blocking):
            return  # only a finalizer does not wait: see `Channel.abandon`
        try:
            self._has_news = True
            if self._computing and all(channel.is_cancelled for channel in self._computing):
                self._abort.raise_()
            self._changed.notify_all()
        finally:
            self._changed.release()

    def _work(self) -> None:
        """Runs calls and scheduler steps until there is nothing left to do."""
        while True:
            with self._changed:
                if self.is_closed:
                    return
                tasks, self._inbox = self._inbox, []
                calls, self._calls = self._calls, []
                self._has_news = False
                if not tasks and not calls and self._scheduler.is_idle:
                    self._is_running = False
                    return
            for call in calls:
                call()
            try:
                for task in tasks:
                    self._scheduler.add(task)
                did = self._scheduler.step()
            except BaseException as error:  # no exception may leave consumers waiting or end this thread
                self._scheduler.end_all(error)
                continue
            with self._changed:
                while not did and not self._has_news and not self.is_closed:
                    self._changed.wait(_LOOK_S)
                    did = True  # check again: a dropped stream may have been unable to wake this thread

    @contextlib.contextmanager
    def _computing_for(self, channels: tuple[Channel, ...]) -> Iterator[None]:
        """Aborts native code inside the block once every consumer has cancelled, or raises Aborted at once."""
        with self._changed:
            self._abort.clear()
            if self.is_closed or all(channel.is_cancelled for channel in channels):
                raise Aborted
            self._computing = channels
        try:
            yield
        finally:
            with self._changed:
                self._computing = ()

    # --- resources for the scheduler ---

    def computing(self, tasks: SequenceOf[Task]) -> contextlib.AbstractContextManager[None]:
        return self._computing_for(tuple(task.channel for task in tasks))

    def find_stored(self, task: Task, n_known: int) -> StoredPrefix | None:
        if self._pages is None or not task.images:
            return None
        start = time.perf_counter()
        with self.computing([task]):
            if not self._text.is_open:  # keys name the kernels, so these are measured first
                for choose in (self._text.choose, self._vision.kernels):
                    choose(lambda: task.channel.report("measure", 0, 1))
            found = self._pages.find(
                task.plan(),
                n_known,
                adapter=task.adapter,
                announce=lambda _: task.channel.report("checksum", 0, 1),
                check=self._check_abort,
            )
        task.answer.timings.load_s += time.perf_counter() - start
        return found

    def _check_abort(self) -> None:
        if self._abort.is_raised:
            raise Aborted

    def store(self, task: Task) -> None:
        held = task.held
        if self._pages is not None and held.batches == list(task.plan()[: len(held.batches)]):
            context = self._cache.context
            self._pages.save(task.plan(), len(held.batches), lambda: context.state(held.id), adapter=task.adapter)

    def prepare(self, task: Task, n_stored: int) -> None:
        """Encodes a request's images before the text weights are in memory, then loads those weights."""
        if self._text.is_open:
            return
        position = 0
        for span in task.spans:
            position += span.n_tokens
            if isinstance(span, ImageSpan) and position > n_stored:
                self._encode(task, span)
        start = time.perf_counter()
        if not n_stored:  # a stored prefix was found under the placement that is already chosen
            with self.computing([task]):
                self._text.choose(lambda: task.channel.report("measure", 0, 1))
        task.channel.report("load", 0, 1)
        self._text.open()
        task.channel.report("load", 1, 1)
        task.answer.timings.load_s += time.perf_counter() - start
        self._vision.release()

    def look(self, tasks: SequenceOf[Task]) -> None:
        if self._cross is None:
            return
        (task,) = tasks
        encode = cast("Callable[[ImageSpan], CrossFeatures]", functools.partial(self._encode, task))
        self._cross.look(task.spans, task.held.n_tokens, encode, self.computing(tasks))

    def rows(self, task: Task, span: ImageSpan) -> Rows:
        if self._cross is not None:
            return self._cross.token_row
        features = self._encode(task, span)
        self._vision.release()
        return EmbeddingRows(cast("ImageFeatures", features), span, self.files)

    def n_arriving(self) -> int:
        return len(self._inbox)

    def prefilled(self, task: Task) -> None:
        # in a batch, nobody asks about a page's embeddings again once the decoder has its rows
        self._vision.trim(to_one=self._has_workload)

    def _encode(self, task: Task, span: ImageSpan) -> Features:
        timings, start = task.answer.timings, time.perf_counter()
        with self.computing([task]):
            if not self._vision.knows(task.images[span.index]):
                timings.n_encoded += 1
                self._vision.encoder(lambda: task.channel.report("measure", 0, 1))
        opened = time.perf_counter()
        with self.computing([task]):
            features = self._vision.features(task.images[span.index], task.channel.report)
        timings.load_s += opened - start
        timings.encode_s += time.perf_counter() - opened
        return features

    def _open_context(self, n_cells: int, n_sequences: int) -> Context:
        return LlamaContext(
            self._text.model,
            n_cells,
            self.n_ubatch,
            self.n_threads,
            n_seq_max=n_sequences,
            exact=self.exact,
            flash=self._attention.flash,
            node_callback=self._attention.node_callback,
            cache_type=self.cache_type,
            abort=self._abort,
            hook=None if self._cross is None else self._cross.hook,
            free_threads=self._free_threads,
        )
