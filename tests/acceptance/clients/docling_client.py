"""Converts pages with docling against a server. Run by `clients` in an interpreter that has docling.

    python docling_client.py URL DIRECTORY

The directory has table.png, chart.png, form.png and template.json. Prints one JSON object: the page converted by the
VLM pipeline with the preset's own question and with a task tag, the chart from the chart stage, and the fields from
docling's extraction prompt for Granite Vision, which docling itself sends to transformers only.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from docling.datamodel.accelerator_options import AcceleratorOptions
from docling.datamodel.base_models import InputFormat, ItemAndImageEnrichmentElement
from docling.datamodel.chart_extraction_options import ChartExtractionVlmEngineOptions
from docling.datamodel.pipeline_options import VlmConvertOptions, VlmPipelineOptions
from docling.datamodel.vlm_engine_options import ApiVlmEngineOptions, VlmEngineType
from docling.document_converter import DocumentConverter, ImageFormatOption
from docling.models.extraction import prompt_utils
from docling.models.stages.chart_extraction.granite_vision import ChartExtractionVlmEngineModel
from docling.pipeline.vlm_pipeline import VlmPipeline
from docling.utils.api_image_request import api_image_request
from docling_core.types.doc import DoclingDocument, TableData
from PIL import Image


def main(url: str, folder: Path) -> None:
    engine = ApiVlmEngineOptions(
        engine_type=VlmEngineType.API_OPENAI,
        url=f"{url}/v1/chat/completions",
        headers={"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"},
    )
    found = {
        "markdown": converted(engine, folder / "table.png"),
        "html": converted(engine, folder / "table.png", "<tables_html>"),
        "chart": chart(engine, folder / "chart.png"),
        "fields": fields(engine, folder / "form.png", (folder / "template.json").read_text(encoding="utf-8")),
    }
    print(json.dumps(found))


def converted(engine: ApiVlmEngineOptions, page: Path, prompt: str | None = None) -> dict[str, Any]:
    """Converts the page with the VLM pipeline and the preset of Granite Vision."""
    chosen = VlmConvertOptions.from_preset("granite_vision", engine_options=engine)
    chosen.scale = 1.0  # nano reads letters of one size only
    if prompt is not None:
        chosen.model_spec.prompt = prompt
    options = VlmPipelineOptions(vlm_options=chosen, enable_remote_services=True)
    image = ImageFormatOption(pipeline_cls=VlmPipeline, pipeline_options=options)
    result = DocumentConverter(format_options={InputFormat.IMAGE: image}).convert(page)
    return {
        "status": result.status.value,
        "errors": [error.error_message for error in result.errors],
        "text": result.pages[0].predictions.vlm_response.text,
        "tables": [cells(table.data) for table in result.document.tables],
    }


def chart(engine: ApiVlmEngineOptions, page: Path) -> dict[str, Any]:
    """Reads the chart with docling's chart stage: the CSV and the summary of its preset's three questions."""
    options = ChartExtractionVlmEngineOptions.from_preset("granite_vision_v4", engine_options=engine)
    options.chart2csv = options.chart2summary = True
    options.chart2code = False  # docling takes it from a code fence, which nano does not write
    stage = ChartExtractionVlmEngineModel(
        enabled=True,
        artifacts_path=None,
        options=options,
        accelerator_options=AcceleratorOptions(),
        enable_remote_services=True,
    )
    document = DoclingDocument(name="chart")
    picture = document.add_picture()
    with Image.open(page) as image:
        element = ItemAndImageEnrichmentElement(item=picture, image=image.convert("RGB"))
        list(stage(document, [element]))
    return {
        "cells": cells(picture.meta.tabular_chart.chart_data),
        "summary": picture.meta.description and picture.meta.description.text,
    }


def fields(engine: ApiVlmEngineOptions, page: Path, template: str) -> str:
    """Returns the reply to docling's own extraction prompt, sent with the pipeline's own request function."""
    with Image.open(page) as image:
        reply = api_image_request(
            url=engine.url,
            image=image.convert("RGB"),
            prompt=prompt_utils._build_extraction_prompt(template),
            headers=engine.headers,
            timeout=engine.timeout,
            temperature=0.0,
            max_tokens=4096,
            response_format={"type": "json_schema", "json_schema": {"name": "form", "schema": json.loads(template)}},
        )
    return str(reply.text)


def cells(table: TableData) -> list[list[str]]:
    return [[cell.text for cell in row] for row in table.grid]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
