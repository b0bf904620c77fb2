"""Tests of the options of the stages: how docling handles them, and which are rejected."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pytest
import typer
from docling.cli.engine_options import create_engine_options
from docling.datamodel.accelerator_options import AcceleratorOptions
from docling.datamodel.pipeline_options import PdfPipelineOptions
from docling.models.factories.table_factory import TableStructureFactory
from docling.utils.pipeline_cache import create_pipeline_options_hash
from pydantic import ValidationError

import granite4v.docling_plugin as plugin
from granite4v.cli.options import NO_MODEL
from granite4v.docling_plugin import Granite4vPictureOptions, Granite4vTableModel, Granite4vTableOptions
from granite4v.docling_plugin import shared_model as shared

BOTH = (Granite4vTableOptions, Granite4vPictureOptions)


def from_the_command_line(*given: str) -> Any:
    factory = TableStructureFactory()
    factory.process_plugin(plugin.table_structure_engines(), "granite4v", plugin.__name__)
    return create_engine_options(
        factory,
        "granite4v_table",
        flag_kwargs={},
        flag_names={},
        explicit_flag_fields=set(),
        option_values=list(given),
        param_hint="--table-structure-option",
    )


def test_the_options_of_doclings_command_line() -> None:
    chosen = from_the_command_line("model=out/", "scale=3", "n_parallel=4", "cache_type=q8_0")
    assert chosen == Granite4vTableOptions(model="out/", scale=3.0, n_parallel=4, cache_type="q8_0")
    with pytest.raises(typer.BadParameter, match="unknown key 'modle' for engine 'granite4v_table'"):
        from_the_command_line("modle=out/")
    with pytest.raises(typer.BadParameter, match="n_ctx: Input should be greater than or equal to 1"):
        from_the_command_line("n_ctx=0")


@pytest.mark.parametrize("options", BOTH)
def test_dicts_and_copies(options: Any) -> None:
    chosen = options(model="out/", n_ctx=100, n_threads=3)
    content = chosen.model_dump()
    same = (
        options.model_validate(content),
        options.model_validate({"kind": options.kind, **content}),
        options.model_validate_json(chosen.model_dump_json()),
        chosen.model_copy(deep=True),
        copy.deepcopy(chosen),
        pickle.loads(pickle.dumps(chosen)),
    )
    assert all(one == chosen and type(one) is options for one in same)
    assert chosen.model_copy(update={"n_ctx": 200}).n_ctx == 200
    with pytest.raises(ValidationError, match=f"kind is 'docling_tableformer'; expected '{options.kind}'"):
        options.model_validate({"kind": "docling_tableformer"})


def test_pipelines_with_other_options_are_others() -> None:
    def hashed(n_ctx: int) -> str:
        chosen = PdfPipelineOptions(
            table_structure_options=Granite4vTableOptions(model="out/", n_ctx=n_ctx),
            picture_description_options=Granite4vPictureOptions(model="out/"),
        )
        assert (
            chosen.table_structure_options.n_ctx == chosen.model_copy(deep=True).table_structure_options.n_ctx == n_ctx
        )
        return str(create_pipeline_options_hash(chosen))

    assert hashed(100) == hashed(100) != hashed(200)


@pytest.mark.parametrize("options", BOTH)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("modle", "out/"),
        ("n_ctx", 0),
        ("n_threads", 0),
        ("n_threads", 513),
        ("n_parallel", 0),
        ("max_tokens", 0),
        ("scale", 0),
        ("vision_compute", "int4"),
        ("cache_type", "q4_0"),
    ],
)
def test_what_is_no_option_is_refused(options: Any, name: str, value: Any) -> None:
    """On construction and on assignment."""
    with pytest.raises(ValidationError, match=name):
        options(**{name: value})
    chosen = options(model="out/")
    with pytest.raises(ValidationError, match=name):
        setattr(chosen, name, value)
    assert chosen == options(model="out/")


@pytest.mark.parametrize(
    ("name", "value"), [("batch_size", 0), ("prompt", ""), ("charts", "some"), ("chart_types", ["x"])]
)
def test_what_is_no_option_of_pictures_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=name):
        Granite4vPictureOptions(**{name: value})


def test_it_is_told_once_that_the_embedded_model_reads(caplog: pytest.LogCaptureFixture) -> None:
    def stage(**options: Any) -> Granite4vTableModel:
        return Granite4vTableModel(
            True, None, Granite4vTableOptions(n_parallel=2, **options), AcceleratorOptions(device="cpu")
        )

    shared.tell_of_nano.cache_clear()
    with caplog.at_level(logging.WARNING, "granite4v"):
        named = stage(model="nano")
        assert not caplog.messages
        stages = [stage(), stage(), named]
    assert len(stages) == 3
    expected = NO_MODEL.replace("--model given", "model given").replace("--model DIR", "model='DIR' in the options")
    assert caplog.messages == [expected]
