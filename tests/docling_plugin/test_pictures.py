"""docling's picture description stage, on documents of its own, with the embedded model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from docling.datamodel.accelerator_options import AcceleratorOptions
from docling.datamodel.base_models import FailureCategory, ItemAndImageEnrichmentElement
from docling.datamodel.document import ConversionResult
from docling_core.types.doc import (
    BoundingBox,
    DoclingDocument,
    ImageRef,
    PictureClassificationMetaField,
    PictureItem,
    PictureMeta,
    ProvenanceItem,
    Size,
)
from docling_core.types.doc.document import PictureClassificationPrediction
from PIL import Image

import granite4v
from granite4v.docling_plugin import Granite4vPictureModel, Granite4vPictureOptions
from granite4v.runtime.formats import read_csv
from scripts.nano.documents import draw_document
from scripts.nano.truth import HELD_OUT_SEEDS
from tests.helpers.docling_pages import result_for

N_PARALLEL = 4


def stage(enabled: bool = True, **options: Any) -> Granite4vPictureModel:
    options = {"n_parallel": N_PARALLEL, "max_tokens": 400, **options}
    return Granite4vPictureModel(
        enabled=enabled,
        enable_remote_services=False,
        artifacts_path=None,
        options=Granite4vPictureOptions(**options),
        accelerator_options=AcceleratorOptions(device="cpu"),
    )


def chart(seed: int) -> Image.Image:
    return draw_document(HELD_OUT_SEEDS + seed, "chart", 0.5, "Aileron").picture


def document(*kinds: str | None) -> DoclingDocument:
    """Returns a document with one picture per kind; None for one without a classification."""
    made = DoclingDocument(name="a")
    made.add_page(1, Size(width=100, height=100))
    for kind in kinds:
        box = BoundingBox(l=0, t=0, r=50, b=50)
        item = made.add_picture(prov=ProvenanceItem(page_no=1, bbox=box, charspan=(0, 0)))
        if kind is not None:
            found = [PictureClassificationPrediction(class_name=kind, confidence=0.9)]
            item.meta = PictureMeta(classification=PictureClassificationMetaField(predictions=found))
    return made


def enriched(model: Granite4vPictureModel, made: DoclingDocument, *images: Image.Image) -> list[PictureItem]:
    """Returns the items of docling's pipeline after the stage."""
    pairs = zip(made.pictures, images, strict=True)
    elements = [ItemAndImageEnrichmentElement(item=item, image=image) for item, image in pairs]
    list(model(made, elements))
    return made.pictures


def rows(item: PictureItem) -> list[list[str]]:
    assert item.meta is not None and item.meta.tabular_chart is not None
    return [[cell.text for cell in row] for row in item.meta.tabular_chart.chart_data.grid]


def test_pictures_are_described_and_charts_become_tables() -> None:
    images = [chart(0), chart(1), chart(2)]
    bar, photo, unknown = enriched(stage(), document("bar_chart", "photograph", None), *images)
    with granite4v.load(n_parallel=N_PARALLEL, device="cpu") as model:
        csv = model.generate("<chart2csv>", images[:1], constraint=granite4v.grammar_for("chart2csv"), max_tokens=400)
        text = model.generate(Granite4vPictureOptions().prompt, images[1:2], max_tokens=400)
    assert rows(bar) == read_csv(csv.text).texts()
    table = bar.meta.tabular_chart
    assert table.created_by == "granite4v" and 0.5 < table.confidence <= 1
    assert [cell.column_header for cell in table.chart_data.table_cells][:2] == [True, True]
    assert photo.meta.description.text == text.text.strip() and photo.meta.description.created_by == "granite4v"
    assert bar.meta.description.text and unknown.meta.description.text
    assert photo.meta.tabular_chart is None and unknown.meta.tabular_chart is None


def test_charts_may_be_all_pictures_or_none() -> None:
    (one,) = enriched(stage(charts="all"), document(None), chart(0))
    assert len(rows(one)) > 1
    (other,) = enriched(stage(charts="none"), document("bar_chart"), chart(0))
    assert other.meta.tabular_chart is None and other.meta.description is not None
    (kept,) = enriched(stage(charts="all"), _with(one), chart(1))
    assert rows(kept) == rows(one)


def _with(item: PictureItem) -> DoclingDocument:
    made = document(None)
    made.pictures[0].meta = PictureMeta(tabular_chart=item.meta.tabular_chart)
    return made


def test_a_picture_that_cannot_be_asked_about_gets_no_entry(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "granite4v"):
        (item,) = enriched(stage(n_ctx=64, charts="all"), document(None), chart(0))
    assert item.meta.description is None and item.meta.tabular_chart is None and not item.annotations
    assert [one.split(": ")[0] for one in caplog.messages if "context" in one] == [
        "'a', a picture on page 1",
        "'a', a chart on page 1",
    ]


def prepared(model: Granite4vPictureModel, result: ConversionResult, *images: Image.Image) -> list[Any]:
    """Returns the elements that docling's pipeline passes to the stage, with `images` as the pictures of the result."""
    for item, image in zip(result.document.pictures, images, strict=True):
        item.image = ImageRef.from_pil(image, dpi=72)
    return [model.prepare_element(result, item) for item in result.document.pictures]


def test_what_is_wrong_with_pictures_is_an_error_of_their_own_result(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Even if one stage describes the pictures of several documents concurrently."""
    made = stage(max_tokens=24, charts="all", prompt="<chart2csv>")
    failing = stage(n_ctx=64)
    results = [result_for(tmp_path / f"{name}.pdf") for name in "abc"]
    for result in results:
        result.document = document(None, None)
    with caplog.at_level(logging.WARNING, "granite4v"):
        one, two = (made(result.document, prepared(made, result, chart(0), chart(1))) for result in results[:2])
        for _ in zip(one, two, strict=True):
            pass
        list(failing(results[2].document, prepared(failing, results[2], chart(0), chart(1))))
    cut = "the answer did not end by itself (length)"
    described = [f"a picture on page 1: {cut}; its description is kept up to where it was cut"] * 2
    read = [f"a chart on page 1: {cut}; it is kept up to the last complete row"] * 2
    for result in results[:2]:
        assert [error.error_message for error in result.errors] == described + read
        assert {(error.page_no, error.category) for error in result.errors} == {(1, FailureCategory.INFERENCE_FAILURE)}
        assert all(item.meta.description.text and len(rows(item)) >= 1 for item in result.document.pictures)
    assert [error.error_message[:24] for error in results[2].errors] == ["a picture on page 1: the"] * 2
    assert all("context" in error.error_message for error in results[2].errors)
    assert not [one for one in caplog.messages if "page" in one]


def test_small_pictures_are_charts_without_a_description() -> None:
    """As in docling's own stages: the threshold applies to descriptions only."""
    made = stage(charts="all", picture_area_threshold=0.9)
    (item,) = enriched(made, document(None), chart(0))
    assert rows(item) and item.meta.description is None


def test_a_stage_that_is_off_loads_no_model() -> None:
    off = stage(enabled=False, model="does/not/exist")
    made = document("bar_chart")
    (item,) = enriched(off, made, chart(0))
    assert item.meta.description is None and item.meta.tabular_chart is None
    assert not off.is_processable(made, item)
    assert Granite4vPictureOptions.kind == "granite4v_picture"
    assert Granite4vPictureModel.get_options_type() is Granite4vPictureOptions
