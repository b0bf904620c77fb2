"""docling's picture description stage: describes pictures, and reads charts as tables.

Chart data goes into the field that docling's own chart stage fills in, so that stage is not needed.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import PIL.Image
from docling.datamodel.accelerator_options import AcceleratorOptions
from docling.datamodel.base_models import DoclingComponentType, ErrorItem, FailureCategory
from docling.datamodel.document import ConversionResult
from docling.models.base_model import ItemAndImageEnrichmentElement
from docling.models.picture_description_base_model import PictureDescriptionBaseModel
from docling_core.types.doc import DoclingDocument, NodeItem, PictureItem, PictureMeta
from pydantic import PrivateAttr

from granite4v.docling_plugin.options import Granite4vPictureOptions
from granite4v.docling_plugin.questions import Asker, Question, Reply
from granite4v.docling_plugin.shared_model import shared_model
from granite4v.runtime.formats.docling_ import CREATED_BY, chart_field
from granite4v.runtime.formats.tasks import find_task
from granite4v.runtime.known_tasks import is_known

CHART_TASK = "chart2csv"


class _Picture(ItemAndImageEnrichmentElement):
    """A picture and the result of its conversion, since docling passes the result only to `prepare_element`."""

    _result: ConversionResult | None = PrivateAttr(default=None)


class Granite4vPictureModel(PictureDescriptionBaseModel):
    """The picture description model, created by docling's pipeline from `Granite4vPictureOptions`.

    The options that skip pictures (by area or class) skip descriptions only; charts are read in any case.
    """

    def __init__(
        self,
        *,
        enabled: bool,
        enable_remote_services: bool,
        artifacts_path: Path | str | None,
        options: Granite4vPictureOptions,
        accelerator_options: AcceleratorOptions,
    ) -> None:
        """Loads the model if `enabled`. Raises what `granite4v.load` raises."""
        super().__init__(
            enabled=enabled,
            enable_remote_services=enable_remote_services,
            artifacts_path=artifacts_path,
            options=options,
            accelerator_options=accelerator_options,
        )
        self.options: Granite4vPictureOptions = options
        self.provenance = CREATED_BY
        self._reads_charts = False
        self._described = Reply()  # the latest reply; set only in the copy made for a batch
        if enabled:
            model = shared_model(options, accelerator_options)
            self._describing = Asker(model, "prompt", prompt=options.prompt, max_tokens=options.max_tokens)
            self._charting = Asker(model, CHART_TASK, max_tokens=options.max_tokens)
            self._reads_charts = options.charts != "none" and is_known(model, find_task(CHART_TASK))
            if options.charts != "none" and not self._reads_charts:
                logging.getLogger("granite4v").warning(
                    "the chat template of '%s' does not know the task '%s'; charts are described alone",
                    *(options.model, CHART_TASK),
                )

    @classmethod
    def get_options_type(cls) -> type[Granite4vPictureOptions]:
        return Granite4vPictureOptions

    def prepare_element(self, conv_res: ConversionResult, element: NodeItem) -> ItemAndImageEnrichmentElement | None:
        """Returns a picture as docling prepares it, with its result; None for one that docling skips."""
        prepared = super().prepare_element(conv_res, element)
        if prepared is None:
            return None
        picture = _Picture(item=prepared.item, image=prepared.image)
        picture._result = conv_res
        return picture

    def __call__(
        self, doc: DoclingDocument, element_batch: Iterable[ItemAndImageEnrichmentElement]
    ) -> Iterable[NodeItem]:
        """Yields the described items of a batch. Chart data is added after the last description."""
        elements = list(element_batch)
        result = next((one._result for one in elements if isinstance(one, _Picture)), None)
        charts = [(one.item, Question(self._charting, one.image)) for one in elements if self._is_chart(one.item)]
        batch = copy.copy(self)  # docling may run batches of several documents concurrently
        for item in super(Granite4vPictureModel, batch).__call__(doc, elements):
            _report(result, doc, item, "a picture", batch._described, "its description is kept up to where it was cut")
            if self.enabled and not item.meta.description.text:  # an empty description is dropped
                item.meta.description = None
                item.annotations = [one for one in item.annotations if getattr(one, "text", None) != ""]
            yield item
        for item, question in charts:
            reply = question.reply()
            _report(result, doc, item, "a chart", reply, "it is kept up to the last complete row")
            if reply.value is not None:
                item.meta = item.meta or PictureMeta()
                item.meta.tabular_chart = chart_field(reply.value, reply.confidence)

    def _annotate_images(self, images: Iterable[PIL.Image.Image]) -> Iterable[str]:
        questions = [Question(self._describing, image) for image in images]
        for question in questions:
            self._described = question.reply()
            yield self._described.value or ""

    def _is_chart(self, item: PictureItem) -> bool:
        if not self._reads_charts or (item.meta is not None and item.meta.tabular_chart is not None):
            return False
        if self.options.charts == "all":
            return True
        classes: Any = None if item.meta is None else item.meta.classification
        return classes is not None and classes.get_main_prediction().class_name in self.options.chart_types


def _report(
    result: ConversionResult | None, doc: DoclingDocument, item: NodeItem, what: str, reply: Reply, kept: str
) -> None:
    """Adds the problem of a reply, if any, to the errors of the result; logs it if the result is unknown."""
    if reply.problem is None:
        return
    page = item.prov[0].page_no if item.prov else None
    place = what if page is None else f"{what} on page {page}"
    message = f"{place}: {reply.problem}{f'; {kept}' if reply.value else ''}"
    if result is None:
        logging.getLogger("granite4v").warning("'%s', %s", doc.name, message)
        return
    result.errors.append(
        ErrorItem(
            component_type=DoclingComponentType.MODEL,
            module_name=__name__,
            error_message=message,
            category=FailureCategory.INFERENCE_FAILURE,
            page_no=page,
        )
    )
