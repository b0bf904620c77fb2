"""docling's table structure stage: every table of its pages is read from its image.

The layout stage says where tables are. Their images, cut out of the page, are put to the model together, whichever
pages they stand on; answers are OTSL, held to its grammar, and become docling's cells. A table that cannot be read
leaves an error in the result, and neither the page nor other tables suffer.
"""

from __future__ import annotations

import time
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


class Granite4vTableModel(BaseTableStructureModel):
    """Made by docling's pipeline, from `Granite4vTableOptions`."""

    def __init__(
        self,
        enabled: bool,
        artifacts_path: Path | None,
        options: Granite4vTableOptions,
        accelerator_options: AcceleratorOptions,
        enable_remote_services: bool = False,
    ) -> None:
        """Loads the model if `enabled`. `artifacts_path` and `enable_remote_services` are of no use to it. Raises what
        `granite4v.load` raises, and PromptError for a model that does not know the task."""
        self.enabled, self.options = enabled, options
        if enabled:
            model = shared_model(options, accelerator_options)
            if not is_known(model, find_task(TASK)):
                raise PromptError(
                    f"the chat template of '{options.model}' does not know the task '{TASK}'; give the options a model "
                    "that reads tables."
                )
            self._asker = Asker(model, TASK, max_tokens=options.max_tokens)

    @classmethod
    def get_options_type(cls) -> type[Granite4vTableOptions]:
        return Granite4vTableOptions

    def predict_tables(self, conv_res: ConversionResult, pages: Sequence[Page]) -> list[TableStructurePrediction]:
        """A prediction for each page; also kept in the page."""
        with TimeRecorder(conv_res, "table_structure"):
            cancel = _past_deadline(conv_res)
            asked = [self._ask(page, cancel) for page in pages]
            return [self._predict(conv_res, page, questions) for page, questions in zip(pages, asked, strict=True)]

    def _ask(self, page: Page, cancel: Cancel | None) -> list[tuple[Cluster, Question | Reply]]:
        """The tables of a page, and the questions about them."""
        if not self.enabled or page._backend is None or not page._backend.is_valid() or not page.predictions.layout:
            return []
        return [(one, self._ask_about(page, one, cancel)) for one in page.predictions.layout.clusters if _is_table(one)]

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

    def _predict(
        self, conv_res: ConversionResult, page: Page, questions: list[tuple[Cluster, Question | Reply]]
    ) -> TableStructurePrediction:
        prediction = page.predictions.tablestructure = page.predictions.tablestructure or TableStructurePrediction()
        scores: list[float] = []
        for cluster, question in questions:
            reply = question.reply() if isinstance(question, Question) else question
            if reply.value:
                prediction.table_map[cluster.id] = _as_docling(page, cluster, reply.value)
            if reply.problem is not None:
                conv_res.errors.append(_error(page, reply))
            scores += [0.0] if not reply.value else [] if reply.confidence is None else [reply.confidence]
        if scores:
            conv_res.confidence.pages[page.page_no].table_score = sum(scores) / len(scores)
        return prediction


def _past_deadline(conv_res: ConversionResult) -> Cancel | None:
    """Tells whether docling has given the document up: it abandons this thread then, which had better end soon."""
    deadline: float | None = getattr(conv_res, "_conversion_deadline", None)
    return None if deadline is None else lambda: time.monotonic() > deadline


def _is_table(cluster: Cluster) -> bool:
    return cluster.label in TABLE_LABELS


def _as_docling(page: Page, cluster: Cluster, tables: Any) -> Table:
    """One table, since it stood in one place."""
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
