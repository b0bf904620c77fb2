"""docling's table structure stage, on its own pages, with the embedded model."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from docling.datamodel.accelerator_options import AcceleratorOptions
from docling.datamodel.base_models import Page, TableStructurePrediction
from docling.models.base_table_model import BaseTableStructureModel
from docling.utils.otsl import parse_otsl_output
from docling_core.types.doc import DocItemLabel
from PIL import Image

import granite4v
from granite4v.docling_plugin import Granite4vTableModel, Granite4vTableOptions, tables
from granite4v.docling_plugin.shared_model import shared_model
from granite4v.docling_plugin.tables import AHEAD
from granite4v.errors import PromptError
from granite4v.runtime.engine.engine import Engine
from granite4v.runtime.formats import Table, read_otsl, write_otsl
from granite4v.runtime.formats.docling_ import docling_cells
from granite4v.runtime.formats.otsl import otsl_tags
from scripts.nano.documents import draw_document
from scripts.nano.truth import HELD_OUT_SEEDS
from tests.helpers.docling_pages import BrokenBackend, ImageBackend, page_of, result_for
from tests.helpers.tables import PLAIN_TEXTS, random_table
from tests.toy.checkpoint import PRESETS

N_PARALLEL = 4


def picture(seed: int) -> Image.Image:
    return draw_document(HELD_OUT_SEEDS + seed, "table", 0.5, "Aileron").picture


def stage(**options: object) -> Granite4vTableModel:
    chosen = Granite4vTableOptions(scale=1.0, n_parallel=N_PARALLEL, **options)
    return Granite4vTableModel(True, None, chosen, AcceleratorOptions(device="cpu"))


@pytest.fixture(scope="module")
def reads() -> Granite4vTableModel:
    return stage()


def texts(prediction: TableStructurePrediction, table: int) -> list[tuple[int, int, str]]:
    cells = prediction.table_map[table].table_cells
    return [(cell.start_row_offset_idx, cell.start_col_offset_idx, cell.text) for cell in cells]


def asked_alone(image: Image.Image) -> list[tuple[int, int, str]]:
    """Returns what the model answers without docling."""
    with granite4v.load(n_parallel=N_PARALLEL, device="cpu") as model:
        answer = model.generate(
            "<tables_otsl>", [image], constraint=granite4v.grammar_for("tables_otsl"), max_tokens=1000
        )
    (table,) = read_otsl(answer.text)
    return [(cell.row, cell.col, cell.text) for cell in table.cells]


def test_every_table_of_every_page_is_read_from_its_own_image(reads: Granite4vTableModel, tmp_path: Path) -> None:
    pictures = [picture(seed) for seed in range(3)]
    pages = [page_of(1, pictures[:2]), page_of(2, pictures[2:])]
    result = result_for(tmp_path / "a.pdf")
    first, second = reads.predict_tables(result, pages)
    assert [sorted(first.table_map), sorted(second.table_map)] == [[0, 1], [0]]
    found = [texts(first, 0), texts(first, 1), texts(second, 0)]
    assert found == [asked_alone(one) for one in pictures] and len({str(one) for one in found}) == 3
    table = first.table_map[1]
    assert (table.page_no, table.id, table.label) == (1, 1, DocItemLabel.TABLE)
    assert table.cluster is pages[0].predictions.layout.clusters[1]
    assert table.num_rows == 1 + max(row for row, _, _ in found[1])
    assert table.otsl_seq.count("nl") == table.num_rows and any(cell.column_header for cell in table.table_cells)
    assert pages[0].predictions.tablestructure is first and result.errors == []
    scores = [result.confidence.pages[number].table_score for number in (1, 2)]
    assert all(0.5 < score <= 1 for score in scores) and scores[0] != scores[1]


def test_the_stage_is_called_as_docling_calls_it(reads: Granite4vTableModel, tmp_path: Path) -> None:
    page = page_of(1, [picture(0)], texts=["of no use", ""])
    (done,) = reads(result_for(tmp_path / "a.pdf"), iter([page]))
    assert done is page and texts(page.predictions.tablestructure, 0) == asked_alone(picture(0))


def test_a_page_that_fails_costs_no_other_its_tables(reads: Granite4vTableModel, tmp_path: Path) -> None:
    pages = [page_of(1, [picture(0)]), page_of(2, [picture(1)] * 2, backend=BrokenBackend), page_of(3, [picture(2)])]
    result = result_for(tmp_path / "a.pdf")
    predictions = reads.predict_tables(result, pages)
    assert [len(one.table_map) for one in predictions] == [1, 0, 1]
    assert [(error.page_no, error.error_message) for error in result.errors] == [
        (2, "a table on page 2: its page cannot be drawn (Failed to load page.)")
    ] * 2
    assert result.confidence.pages[2].table_score == 0


def test_a_table_of_no_size_is_an_error_beside_the_others(reads: Granite4vTableModel, tmp_path: Path) -> None:
    page = page_of(1, [picture(0), picture(1)])
    box = page.predictions.layout.clusters[0].bbox
    box.r = box.l
    result = result_for(tmp_path / "a.pdf")
    (prediction,) = reads.predict_tables(result, [page])
    assert list(prediction.table_map) == [1] and len(result.errors) == 1


def test_an_answer_that_is_cut_keeps_its_complete_rows(tmp_path: Path) -> None:
    result = result_for(tmp_path / "a.pdf")
    (prediction,) = stage(max_tokens=60).predict_tables(result, [page_of(1, [picture(0)])])
    whole = asked_alone(picture(0))
    kept = texts(prediction, 0)
    assert 0 < len(kept) < len(whole) and kept == whole[: len(kept)]
    (error,) = result.errors
    assert error.error_message == (
        "a table on page 1: the answer did not end by itself (length); it is kept up to the last complete row"
    )


def test_what_does_not_fit_into_the_context_is_an_error(tmp_path: Path) -> None:
    result = result_for(tmp_path / "a.pdf")
    (prediction,) = stage(n_ctx=64).predict_tables(result, [page_of(1, [picture(0)])])
    assert not prediction.table_map and "context" in result.errors[0].error_message


def test_a_document_that_docling_has_given_up_is_not_read_on(reads: Granite4vTableModel, tmp_path: Path) -> None:
    result = result_for(tmp_path / "a.pdf")
    result._conversion_deadline = time.monotonic() - 1
    (prediction,) = reads.predict_tables(result, [page_of(1, [picture(0)] * (N_PARALLEL + 1))])
    assert not prediction.table_map and len(result.errors) == N_PARALLEL + 1
    assert all("the document's time is over" in error.error_message for error in result.errors)


def engine_of(table_stage: Granite4vTableModel) -> Engine:
    return shared_model(table_stage.options, AcceleratorOptions(device="cpu")).engine


@contextlib.contextmanager
def held(table_stage: Granite4vTableModel) -> Iterator[None]:
    """Blocks the engine until the block ends, so that the model answers nothing."""
    is_held, go = threading.Event(), threading.Event()

    def hold(_: object) -> None:
        is_held.set()
        go.wait()

    thread = threading.Thread(target=engine_of(table_stage).call, args=(hold,))
    thread.start()
    is_held.wait()
    try:
        yield
    finally:
        go.set()
        thread.join()


def predicting(table_stage: Granite4vTableModel, result: object, page: Page) -> threading.Thread:
    thread = threading.Thread(target=table_stage.predict_tables, args=(result, [page]))
    thread.start()
    return thread


def test_pages_are_handed_on_before_their_tables_are_read(reads: Granite4vTableModel, tmp_path: Path) -> None:
    result = result_for(tmp_path / "a.pdf")
    pages = [page_of(1, [picture(0)]), page_of(2, [picture(1)])]
    with held(reads):
        for page in pages:
            thread = predicting(reads, result, page)
            thread.join(60)
            assert not thread.is_alive()
        assert not result.confidence.pages
    found = [texts(page.predictions.tablestructure, 0) for page in reversed(pages)]
    assert found == [asked_alone(picture(1)), asked_alone(picture(0))]
    assert sorted(result.confidence.pages) == [1, 2]
    copy = pages[0].predictions.model_copy(deep=True)
    assert copy.tablestructure.model_dump() == pages[0].predictions.tablestructure.model_dump()


def test_pages_wait_where_many_tables_are_on_their_way(reads: Granite4vTableModel, tmp_path: Path) -> None:
    result = result_for(tmp_path / "a.pdf")
    many, one = page_of(1, [picture(0)] * (AHEAD * N_PARALLEL + 1)), page_of(2, [picture(1)])
    with held(reads):
        predicting(reads, result, many).join()
        waiting = predicting(reads, result, one)
        waiting.join(0.2)
        assert waiting.is_alive() and one.predictions.tablestructure is None
    waiting.join()
    assert len(many.predictions.tablestructure.table_map) == AHEAD * N_PARALLEL + 1
    assert texts(one.predictions.tablestructure, 0) == asked_alone(picture(1))


def test_all_tables_of_a_document_that_docling_gives_up_are_given_up(
    reads: Granite4vTableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Including those that nobody waits for yet."""
    is_over, was_noticed = threading.Event(), threading.Event()

    def now() -> float:
        if is_over.is_set():
            was_noticed.set()
        return 2.0 * is_over.is_set()

    monkeypatch.setattr(tables, "time", SimpleNamespace(monotonic=now))
    result = result_for(tmp_path / "a.pdf")
    result._conversion_deadline = 1.0
    engine = engine_of(reads)
    n_decoded = engine.counters.n_decoded
    with held(reads):
        (first,), (second,) = (reads.predict_tables(result, [page_of(i, [picture(i)])]) for i in (1, 2))
        looking = threading.Thread(target=lambda: first.table_map)
        looking.start()
        is_over.set()
        assert was_noticed.wait(60)
    looking.join()
    engine.call(lambda _: None)
    assert engine.n_sequences_in_use == 0 and engine.counters.n_decoded == n_decoded
    assert not first.table_map and not second.table_map
    assert [error.error_message for error in result.errors] == [
        f"a table on page {i}: the answer did not end by itself (cancelled)" for i in (1, 2)
    ]


@pytest.mark.parametrize("is_enabled", [True, False])
def test_pages_without_a_picture_or_a_task_get_an_empty_prediction(
    reads: Granite4vTableModel, tmp_path: Path, is_enabled: bool
) -> None:
    disabled = Granite4vTableModel(False, None, Granite4vTableOptions(model="does/not/exist"), AcceleratorOptions())
    page = page_of(1, [picture(0)])
    if is_enabled:
        page._backend = ImageBackend(None)
    (prediction,) = (reads if is_enabled else disabled).predict_tables(result_for(tmp_path / "a.pdf"), [page])
    assert prediction == TableStructurePrediction()


def test_no_pages_and_no_tables(reads: Granite4vTableModel, tmp_path: Path) -> None:
    result = result_for(tmp_path / "a.pdf")
    page = page_of(1, [picture(0)])
    page.predictions.layout.clusters = []
    assert reads.predict_tables(result, []) == []
    assert reads.predict_tables(result, [page, Page(page_no=2)]) == [TableStructurePrediction()] * 2
    assert not result.confidence.pages


def test_a_model_that_reads_no_tables_is_refused(make_model: object) -> None:
    path = make_model(PRESETS["tiny-clip-llama"])  # type: ignore[operator]
    with pytest.raises(PromptError, match=r"does not know the task 'tables_otsl'"):
        stage(model=str(path))


def test_the_cells_are_those_that_docling_reads_in_the_same_answer() -> None:
    for seed in range(300):
        text = write_otsl(random_table(seed, PLAIN_TEXTS))
        tags, cells, n_rows, n_cols = parse_otsl_output(text)
        (table,) = read_otsl(text)
        assert [*otsl_tags(table)] == tags and (table.n_rows, table.n_cols) == (n_rows, n_cols)
        assert [_flagless(cell) for cell in docling_cells(table)] == [_flagless(cell) for cell in cells]


def _flagless(cell: object) -> dict[str, object]:
    """Removes the flags that docling takes from a cell's tag and we take from its row."""
    return cell.model_dump(exclude={"column_header", "row_header", "row_section"})  # type: ignore[attr-defined]


def test_the_options_are_of_its_own_kind() -> None:
    assert Granite4vTableOptions.kind == "granite4v_table"
    assert Granite4vTableModel.get_options_type() is Granite4vTableOptions
    assert issubclass(Granite4vTableModel, BaseTableStructureModel)


def test_tables_are_stacked() -> None:
    from granite4v.runtime.formats.table import stacked

    first, second = read_otsl("[<otsl><ched>a<ched>b<nl><fcel>c<fcel>d<nl></otsl>,<otsl><ched>e<nl></otsl>]")
    one = stacked([first, second])
    assert isinstance(one, Table) and one.texts() == [["a", "b"], ["c", "d"], ["e", ""]]
    assert one.n_header_rows == 1 and stacked([first]) == first
