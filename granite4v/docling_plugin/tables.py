"""docling's table structure stage: reads every table of a page from its image.

The layout stage finds the tables. Each table is cropped from the page and sent to the model. The answer is OTSL,
constrained by its grammar, and is converted to docling's cells. A table that cannot be read adds an error to the
result; the page and other tables are not affected.

A page is passed on before its tables are read; docling waits for them when it assembles the page. Meanwhile more pages
arrive, so the tables of several pages are read in parallel.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from docling.datamodel.accelerator_options import AcceleratorOptions
from docling.datamodel.base_models import (
    Cluster,
    DoclingComponentType,
    ErrorItem,
    FailureCategory,
    Page,
    Table,
    TableStructurePrediction,
)
from docling.datamodel.document import ConversionResult
from docling.models.base_layout_model import TABLE_LABELS
from docling.models.base_table_model import BaseTableStructureModel
from docling.utils.profiling import TimeRecorder
from pydantic import PrivateAttr

from granite4v.docling_plugin.options import Granite4vTableOptions
from granite4v.docling_plugin.questions import Asker, Question, Reply
from granite4v.docling_plugin.shared_model import shared_model
from granite4v.errors import PromptError
from granite4v.runtime.engine.stream import Cancel
from granite4v.runtime.formats.docling_ import docling_cells
from granite4v.runtime.formats.otsl import otsl_tags
from granite4v.runtime.formats.table import stacked
from granite4v.runtime.formats.tasks import find_task
from granite4v.runtime.known_tasks import is_known

TASK = "tables_otsl"
AHEAD = 2  # a new page waits while more tables per parallel sequence are pending; bounds the pages in memory


class Granite4vTableModel(BaseTableStructureModel):
    """The table model, created by docling's pipeline from `Granite4vTableOptions`."""

    def __init__(
        self,
        enabled: bool,
        artifacts_path: Path | None,
        options: Granite4vTableOptions,
        accelerator_options: AcceleratorOptions,
        enable_remote_services: bool = False,
    ) -> None:
        """Loads the model if `enabled`. `artifacts_path` and `enable_remote_services` are ignored. Raises what
        `granite4v.load` raises, and PromptError for a model that does not know the task."""
        self.enabled, self.options = enabled, options
        self._pending: list[weakref.ref[_Reading]] = []  # of all conversions, oldest first
        self._adding = threading.Lock()
        if enabled:
            model = shared_model(options, accelerator_options)
            if not is_known(model, find_task(TASK)):
                raise PromptError(
                    f"the chat template of '{options.model}' does not know the task '{TASK}'; give the options a model "
                    "that reads tables."
                )
            self._asker = Asker(model, TASK, max_tokens=options.max_tokens)
            self._most_ahead = AHEAD * model.n_parallel

    @classmethod
    def get_options_type(cls) -> type[Granite4vTableOptions]:
        return Granite4vTableOptions

    def predict_tables(self, conv_res: ConversionResult, pages: Sequence[Page]) -> list[TableStructurePrediction]:
        """Returns a prediction for each page, also stored in the page. Access to its `table_map` waits for the
        tables."""
        predictions = []
        for page in pages:
            prediction = page.predictions.tablestructure or TableStructurePrediction()
            if clusters := self._tables_of(page):
                with TimeRecorder(conv_res, "table_structure"), self._adding:
                    self._wait_for_room()
                    cancel = self._past_deadline(conv_res)
                    asked = [(cluster, self._ask_about(page, cluster, cancel)) for cluster in clusters]
                    reading = _Reading(conv_res, page, asked)
                    self._pending.append(weakref.ref(reading))
                prediction = _Coming(table_map=prediction.table_map)
                prediction._reading = reading
            page.predictions.tablestructure = prediction
            predictions.append(prediction)
        return predictions

    def _tables_of(self, page: Page) -> list[Cluster]:
        if not self.enabled or page._backend is None or not page._backend.is_valid() or not page.predictions.layout:
            return []
        return [cluster for cluster in page.predictions.layout.clusters if cluster.label in TABLE_LABELS]

    def _wait_for_room(self) -> None:
        """Waits for the oldest pages until at most `_most_ahead` tables are pending."""
        while True:
            waiting = [reading for reading in self._readings() if reading.n_unanswered]
            self._pending = [weakref.ref(reading) for reading in waiting]
            if sum(reading.n_unanswered for reading in waiting) <= self._most_ahead:
                return
            waiting[0].replies()

    def _readings(self) -> list[_Reading]:
        return [reading for reference in self._pending if (reading := reference()) is not None]

    def _past_deadline(self, conv_res: ConversionResult) -> Cancel | None:
        """Returns a function that says whether the document's deadline has passed, and then cancels all of its tables:
        docling no longer needs them, and a thread that still waits for them should return soon. None without a
        deadline."""
        deadline: float | None = getattr(conv_res, "_conversion_deadline", None)

        def is_past() -> bool:
            if deadline is None or time.monotonic() <= deadline:
                return False
            for reading in self._readings():
                reading.cancel(conv_res)
            return True

        return None if deadline is None else is_past

    def _ask_about(self, page: Page, cluster: Cluster, cancel: Cancel | None) -> Question | Reply:
        if cancel is not None and cancel():
            return Reply(problem="it is not read, since the document's time is over")
        try:
            image = page.get_image(scale=self.options.scale, cropbox=cluster.bbox)
        except Exception as error:  # of PDFium, of Pillow, or of another backend
            return Reply(problem=f"its page cannot be drawn ({error})")
        if image is None or not all(image.size):
            return Reply(problem="there is no image of it")
        return Question(self._asker, image, [cell.text.strip() for cell in cluster.cells], cancel)


class _Reading:
    """The tables of a page that the model was asked about. Thread-safe."""

    def __init__(self, result: ConversionResult, page: Page, asked: Sequence[tuple[Cluster, Question | Reply]]) -> None:
        self._result, self._page, self._asked = result, page, asked
        self._lock = threading.RLock()
        self._replies: list[tuple[Cluster, Reply]] | None = None
        self._tables: dict[int, Table] | None = None

    @property
    def n_unanswered(self) -> int:
        return sum(isinstance(question, Question) and not question.is_answered for _, question in self._asked)

    def cancel(self, result: ConversionResult) -> None:
        """Cancels the pending answers if they belong to this result."""
        for _, question in self._asked if result is self._result else ():
            if isinstance(question, Question):
                question.cancel()

    def replies(self) -> list[tuple[Cluster, Reply]]:
        """Waits for all answers."""
        with self._lock:
            if self._replies is None:
                with TimeRecorder(self._result, "table_structure"):
                    self._replies = [
                        (cluster, question.reply() if isinstance(question, Question) else question)
                        for cluster, question in self._asked
                    ]
            return self._replies

    def tables(self) -> dict[int, Table]:
        """Waits for the tables and returns them by cluster id. Adds their errors to the result, once."""
        with self._lock:
            if self._tables is None:
                self._tables = self._read(self.replies())
            return self._tables

    def _read(self, replies: Sequence[tuple[Cluster, Reply]]) -> dict[int, Table]:
        result, page = self._result, self._page
        tables = {cluster.id: _as_docling(page, cluster, reply.value) for cluster, reply in replies if reply.value}
        result.errors += [_error(page, reply) for _, reply in replies if reply.problem is not None]
        scores = [reply.confidence if reply.value else 0.0 for _, reply in replies]
        known = [score for score in scores if score is not None]
        if known:
            result.confidence.pages[page.page_no].table_score = sum(known) / len(known)
        return tables


class _Coming(TableStructurePrediction):
    """A prediction whose tables are still pending; the first access to `table_map` waits for them."""

    _reading: _Reading | None = PrivateAttr(default=None)

    def __getattribute__(self, name: str) -> Any:
        if name in ("table_map", "__dict__") and (reading := self._reading) is not None:
            super().__getattribute__("__dict__")["table_map"].update(reading.tables())
            self._reading = None
        return super().__getattribute__(name)


def _as_docling(page: Page, cluster: Cluster, tables: Any) -> Table:
    """Stacks the tables of an answer into one docling table, since they come from one region of the page."""
    table = stacked(tables)
    return Table(
        label=cluster.label,
        id=cluster.id,
        page_no=page.page_no,
        cluster=cluster,
        otsl_seq=[*otsl_tags(table)],
        num_rows=table.n_rows,
        num_cols=table.n_cols,
        table_cells=docling_cells(table),
    )


def _error(page: Page, reply: Reply) -> ErrorItem:
    kept = "" if reply.value is None else "; it is kept up to the last complete row"
    return ErrorItem(
        component_type=DoclingComponentType.MODEL,
        module_name=__name__,
        error_message=f"a table on page {page.page_no}: {reply.problem}{kept}",
        category=FailureCategory.INFERENCE_FAILURE,
        page_no=page.page_no,
    )
