"""Reads tables of generated PDFs through docling's pipeline: the plugin against docling's own Granite Vision stage.

    python -m scripts.docling_tables                                    # 20 PDFs by the plugin, 3 by each side
    python -m scripts.docling_tables --pdfs 0                           # the race alone

The PDFs have two tables a page, of the kind that the embedded model reads: scans, scans with invisible text, and text
with lines. A layout stage of this script gives docling the positions of tables, since docling's own is a model. First
all PDFs are converted with the plugin, to measure the TEDS of its tables, the TEDS of `granite4v extract` on the same
images, and the memory of the process after each PDF. Then each side converts some PDFs, in turn and in its own process,
after one PDF that is not counted: the plugin, and `GraniteVisionTableStructureModel` with the same checkpoint and its
adapter merged, in float32 and bfloat16. The last line on stdout is one JSON object. Needs the extras `dev` and
`docling`; of the latter, docling-slim[convert-core,format-pdf] is enough.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import shutil
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pikepdf
import psutil
import safetensors.torch
import torch
import transformers
from PIL import Image

import granite4v
from granite4v.default_model import checkpoint_folder
from granite4v.runtime.formats import Cell, Table, write_otsl
from scripts.measuring import in_turn, run_json
from scripts.nano.documents import Document, draw_document
from scripts.nano.measures import measure
from scripts.nano.truth import HELD_OUT_SEEDS
from scripts.nano.truth import Table as Truth
from tests.helpers.pdfs import add_image, add_page

if importlib.util.find_spec("torchvision") is None:  # imported by a docling engine that is not used here
    assert not transformers.utils.is_torchvision_available()
    sys.modules["torchvision"] = types.ModuleType("torchvision")
    sys.modules["torchvision.transforms"] = types.ModuleType("torchvision.transforms")
    sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]  # type: ignore[attr-defined]

from docling.datamodel.accelerator_options import AcceleratorOptions
from docling.datamodel.base_models import Cluster, InputFormat, LayoutPrediction, Page
from docling.datamodel.document import ConversionResult
from docling.datamodel.pipeline_options import (
    BaseLayoutOptions,
    BaseTableStructureOptions,
    GraniteVisionTableStructureOptions,
    PdfPipelineOptions,
)
from docling.document_converter import DocumentConverter, PdfFormatOption
from docling.models.base_layout_model import BaseLayoutModel
from docling.models.factories import get_layout_factory, get_table_structure_factory
from docling.models.stages.table_structure.table_structure_model_granite_vision import GraniteVisionTableStructureModel
from docling_core.types.doc import BoundingBox, DocItemLabel

from granite4v.docling_plugin import Granite4vTableOptions

KINDS = ("scan", "scan with text", "text")
SIDES = ("plugin", "float32", "bfloat16")
PAGES, TABLES = 3, 2  # per PDF, per page
LEVEL, FONT = 0.5, "Aileron"
MARGIN = 30
TASK = "tables_otsl"
ARTIFACTS = "ibm-granite--granite-vision-4.1-4b"  # where docling looks for its model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pdfs", type=int, default=20)
    parser.add_argument("--race", type=int, default=3, help="PDFs that each side converts against time")
    parser.add_argument("--runs", type=int, default=1, help="rounds of the race")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--crops", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side is not None:
        print(json.dumps(convert(options.side, options.folder, options.pdfs, options.crops)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder, crops = Path(name) / "pdfs", Path(name) / "crops"
        crops.mkdir()
        write_pdfs(folder, max(options.pdfs, options.race + 1))
        figures: dict[str, Any] = {}
        if options.pdfs:
            done = _child("plugin", folder, options.pdfs, crops)
            rss_mb = [round(value) for value in done["rss_mb"]]
            figures = {"pdfs": options.pdfs, "tables": compare(done["tables"], crops), "rss_mb": rss_mb}
            figures |= {"errors": done["errors"]}
            print(json.dumps(figures), file=sys.stderr)
        if options.race:
            _save_merged(folder / ARTIFACTS)
            sides = {side: functools.partial(_child, side, folder, options.race + 1, None) for side in SIDES}
            figures |= race(in_turn(sides, options.runs))
    print(json.dumps(figures))


def _child(side: str, folder: Path, n_pdfs: int, crops: Path | None) -> dict[str, Any]:
    command = [sys.executable, "-m", "scripts.docling_tables", "--side", side, "--folder", str(folder)]
    command += ["--pdfs", str(n_pdfs), *(["--crops", str(crops)] if crops else [])]
    return run_json(command, Path(__file__).parents[1])


# --- the documents ---


def document(pdf: int, page: int, table: int) -> Document:
    """Draws the table at a place, with its truth."""
    return draw_document(HELD_OUT_SEEDS + (pdf * PAGES + page) * TABLES + table, "table", LEVEL, FONT)


def kind_of(pdf: int) -> str:
    return KINDS[pdf % len(KINDS)]


def write_pdfs(folder: Path, n: int) -> None:
    """Writes `0.pdf` and so on, and `boxes.json`: the boxes of the tables of each page, from the top left."""
    folder.mkdir()
    boxes = {}
    for i in range(n):
        pdf = pikepdf.new()
        boxes[f"{i}.pdf"] = [
            _add_tables(pdf, kind_of(i), [document(i, j, k) for k in range(TABLES)]) for j in range(PAGES)
        ]
        pdf.save(folder / f"{i}.pdf")
    (folder / "boxes.json").write_text(json.dumps(boxes))


def _add_tables(pdf: pikepdf.Pdf, kind: str, documents: Sequence[Document]) -> list[tuple[int, int, int, int]]:
    """Adds a page of one point per pixel, with the tables one below the other. Returns their boxes."""
    sizes = [one.picture.size for one in documents]
    width = max(size[0] for size in sizes) + 2 * MARGIN
    height = sum(size[1] + MARGIN for size in sizes) + MARGIN
    sheet, top, boxes, texts = Image.new("RGB", (width, height), "white"), MARGIN, [], []
    for one, (right, below) in zip(documents, sizes, strict=True):
        assert isinstance(one.truth, Truth)
        boxes.append((MARGIN, top, MARGIN + right, top + below))
        sheet.paste(one.picture, (MARGIN, top))
        texts += list(_text(one.truth, boxes[-1], height, lines=kind == "text"))
        top += below + MARGIN
    shown = "q 0 g 0 G\n" if kind == "text" else f"q {width} 0 0 {height} 0 0 cm /I Do Q q 3 Tr\n"
    page = add_page(pdf, shown + "\n".join([] if kind == "scan" else texts) + "\nQ", (width, height))
    if kind != "text":
        add_image(pdf, page, sheet)
    return boxes


def _text(table: Truth, box: tuple[int, int, int, int], height: int, *, lines: bool) -> Iterator[str]:
    """Yields page content that draws a table's cells in columns of equal width, with lines around them if asked."""
    left, top, right, bottom = box
    wide, high = (right - left) / table.n_cols, (bottom - top) / table.n_rows
    size = min(18.0, 0.6 * high)
    for cell in table.cells:
        x, y = left + cell.col * wide, height - top - cell.row * high
        if lines:
            yield f"{x:.1f} {y:.1f} {cell.colspan * wide:.1f} {-cell.rowspan * high:.1f} re S"
        text = cell.text.replace("\\", "\\\\").replace("(", "\\(").replace(")", "\\)")
        yield f"BT /F {size:.1f} Tf {x + 4:.1f} {y - high / 2 - size / 3:.1f} Td ({text}) Tj ET"


# --- docling ---


class ToldLayoutOptions(BaseLayoutOptions):
    kind: ClassVar[str] = "told"
    boxes: str = ""


class ToldLayout(BaseLayoutModel):
    """A layout stage that places tables where `boxes.json` says."""

    requires_layout_postprocessing = True  # assigns the text of a page to them

    def __init__(self, options: ToldLayoutOptions, **_: object) -> None:
        self._boxes = json.loads(Path(options.boxes).read_text())

    @classmethod
    def get_options_type(cls) -> type[ToldLayoutOptions]:
        return ToldLayoutOptions

    def predict_layout(self, conv_res: ConversionResult, pages: Sequence[Page]) -> list[LayoutPrediction]:
        return [self._layout(self._boxes[conv_res.input.file.name][page.page_no - 1]) for page in pages]

    def _layout(self, boxes: Sequence[Sequence[float]]) -> LayoutPrediction:
        places = [BoundingBox(l=left, t=top, r=right, b=bottom) for left, top, right, bottom in boxes]
        return LayoutPrediction(
            clusters=[Cluster(id=i, label=DocItemLabel.TABLE, bbox=box) for i, box in enumerate(places)]
        )


class Float32Options(GraniteVisionTableStructureOptions):
    kind: ClassVar[str] = "float32"


class Float32Stage(GraniteVisionTableStructureModel):
    """docling's stage in float32 instead of the bfloat16 that it hard-codes."""

    @classmethod
    def get_options_type(cls) -> type[Float32Options]:
        return Float32Options

    def _load_model(self, artifacts_path: Path) -> None:
        super()._load_model(artifacts_path)
        self._model.float()


def converter(side: str, folder: Path, *, keeps_images: bool) -> DocumentConverter:
    get_layout_factory(allow_external_plugins=True).register(ToldLayout, "told", __name__)
    get_table_structure_factory(allow_external_plugins=True).register(Float32Stage, "float32", __name__)
    stages: dict[str, BaseTableStructureOptions] = {
        "plugin": Granite4vTableOptions(scale=1.0),  # docling's stage hard-codes this scale
        "float32": Float32Options(),
        "bfloat16": GraniteVisionTableStructureOptions(),
    }
    options = PdfPipelineOptions(
        allow_external_plugins=True,
        artifacts_path=None if side == "plugin" else folder,
        accelerator_options=AcceleratorOptions(device="cpu", num_threads=torch.get_num_threads()),
        do_ocr=False,
        layout_options=ToldLayoutOptions(boxes=str(folder / "boxes.json"), keep_empty_clusters=True),
        table_structure_options=stages[side],
        generate_page_images=keeps_images,
    )
    return DocumentConverter(format_options={InputFormat.PDF: PdfFormatOption(pipeline_options=options)})


def convert(side: str, folder: Path, n_pdfs: int, crops: Path | None) -> dict[str, Any]:
    """Converts the PDFs. Returns their tables and errors, seconds of all but the first PDF, and memory after each."""
    made, process = converter(side, folder, keeps_images=crops is not None), psutil.Process()
    tables, errors, rss, start = {}, [], [], 0.0
    for i in range(n_pdfs):
        result = made.convert(folder / f"{i}.pdf", raises_on_error=True)
        for page in result.pages:
            for number, table in page.predictions.tablestructure.table_map.items():
                name = f"{i}-{page.page_no - 1}-{number}"
                tables[name] = otsl_of(table)
                if crops is not None:
                    sheet = page.get_image(scale=1.0)  # always the complete page: the PDF is closed
                    sheet.crop(table.cluster.bbox.as_tuple()).save(crops / f"{name}.png")
        errors += [error.error_message for error in result.errors]
        rss.append(process.memory_info().rss / 1e6)
        del result
        start = start or time.perf_counter()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "tables": tables, "errors": errors, "rss_mb": rss}


def otsl_of(table: Any) -> str:
    """Returns docling's table as OTSL; empty if it has no cells, or lacks a cell for a slot."""
    cells = [
        Cell(
            cell.start_row_offset_idx,
            cell.start_col_offset_idx,
            cell.text,
            cell.row_span,
            cell.col_span,
            cell.column_header or cell.row_header or cell.row_section,
        )
        for cell in table.table_cells
    ]
    n_header_rows = len({cell.start_row_offset_idx for cell in table.table_cells if cell.column_header})
    try:
        return write_otsl(Table(table.num_rows, table.num_cols, n_header_rows, tuple(cells)))
    except granite4v.AnswerError:
        return ""


def _save_merged(folder: Path) -> None:
    """Saves the embedded checkpoint for transformers, with its adapter merged."""
    from peft import PeftModel

    checkpoint = checkpoint_folder()
    base = transformers.AutoModelForImageTextToText.from_pretrained(
        checkpoint, config=transformers.AutoConfig.from_pretrained(checkpoint), dtype=torch.float32
    )
    merged = PeftModel.from_pretrained(base, str(checkpoint)).merge_and_unload()
    folder.mkdir()
    for path in checkpoint.iterdir():
        if path.suffix in (".json", ".jinja") and path.name != "adapter_config.json":
            shutil.copy(path, folder)
    # not with save_pretrained, which names the tensors like an adapter's
    tensors = {name: tensor.clone().contiguous() for name, tensor in merged.state_dict().items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    path = folder / "tokenizer_config.json"  # docling's stage batches all tables of a page, which needs left padding
    path.write_text(json.dumps({**json.loads(path.read_text()), "padding_side": "left"}))


# --- figures ---


def compare(found: dict[str, str], crops: Path) -> dict[str, Any]:
    """Returns the mean TEDS of the plugin's tables and of `extract`'s on the same images, by kind of PDF."""
    with granite4v.extract(str(crops), TASK) as records:
        extracted = {Path(record.source).stem: write_otsl(record.tables[0]) for record in records if record.tables}
    scores: dict[str, list[tuple[float, float]]] = {}
    for name, text in found.items():
        place = tuple(map(int, name.split("-")))
        pair = (teds(document(*place), text), teds(document(*place), extracted.get(name, "")))
        scores.setdefault(kind_of(place[0]), []).append(pair)
    return {
        kind: {
            "n": len(pairs),
            "plugin": round(statistics.mean(one for one, _ in pairs), 4),
            "extract": round(statistics.mean(other for _, other in pairs), 4),
        }
        for kind, pairs in scores.items()
    } | {"same_text": sum(found[name] == extracted.get(name) for name in found), "all": len(found)}


def teds(one: Document, text: str) -> float:
    return measure(one, f"<{TASK}>", text).teds or 0.0


def race(rounds: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Returns pages an hour and TEDS of each side, and how many times as fast the plugin is as docling's own stage."""
    figures: dict[str, Any] = {}
    for side, results in rounds.items():
        places = {name: tuple(map(int, name.split("-"))) for name in results[0]["tables"]}
        n_pages = len({place[:2] for place in places.values() if place[0]})
        seconds = statistics.median(one["seconds"] for one in results)
        scores = [teds(document(*places[name]), text) for name, text in results[0]["tables"].items()]
        figures[side] = {"pages_an_hour": round(3600 * n_pages / seconds), "teds": round(statistics.mean(scores), 4)}
    for side in SIDES[1:]:
        figures[f"times {side}"] = round(figures["plugin"]["pages_an_hour"] / figures[side]["pages_an_hour"], 2)
    return figures


if __name__ == "__main__":
    main()
