"""Options of the docling stages that use a model of granite4v."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from docling.datamodel.pipeline_options import BaseTableStructureOptions, PictureDescriptionBaseOptions
from docling_core.types.doc.labels import PictureClassificationLabel
from pydantic import BaseModel, ConfigDict, Field, model_validator

from granite4v.choices import MAX_THREADS, CacheType, VisionCompute

Charts = Literal["classified", "all", "none"]


class ModelOptions(BaseModel):
    """The model to use, and how to run it. Stages of a process that have equal options share one loaded model.

    An unknown name is rejected, on assignment too: a misspelt option would otherwise leave its default in effect.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    model: Annotated[
        str | Path | None,
        Field(
            description=(
                "Directory made by `granite4v convert`, text GGUF file, or model of the Hugging Face hub "
                "('owner/name', 'owner/name:Q4_K_M'), which is fetched on first use. By default the small model "
                "inside the package, which reads nothing but synthetic documents."
            )
        ),
    ] = None
    mmproj: Annotated[
        str | Path | None, Field(description="Vision file of a text GGUF file that has none beside it.")
    ] = None
    n_ctx: Annotated[int | None, Field(ge=1, description="Context size in tokens, prompt and answer together.")] = None
    n_threads: Annotated[
        int | None,
        Field(
            ge=1,
            le=MAX_THREADS,
            description="CPU threads. By default those set in `accelerator_options`, otherwise one per core.",
        ),
    ] = None
    n_parallel: Annotated[
        int | None,
        Field(ge=1, description="Maximum number of answers at once. By default measured, once per machine."),
    ] = None
    vision_compute: Annotated[VisionCompute, Field(description="See `granite4v.load`.")] = "file"
    cache_type: Annotated[CacheType | None, Field(description="See `granite4v.load`.")] = None
    max_tokens: Annotated[
        int | None,
        Field(ge=1, description="Most tokens of an answer. By default 4096, or as many as fit into the context."),
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _without_kind(cls, given: Any) -> Any:
        """Removes `kind`, an attribute of the class, which docling's configurations contain; rejects a wrong one."""
        if isinstance(given, dict) and "kind" in given:
            kind = getattr(cls, "kind", None)
            if given["kind"] != kind:
                raise ValueError(f"kind is {given['kind']!r:.60}; expected {kind!r}.")
            return {name: value for name, value in given.items() if name != "kind"}
        return given


class Granite4vTableOptions(ModelOptions, BaseTableStructureOptions):
    """Options of the stage that reads each table from its image."""

    kind: ClassVar[str] = "granite4v_table"

    scale: Annotated[
        float, Field(gt=0, le=10, description="Pixels of a table's image for each point (1/72 inch) of the page.")
    ] = 2.0


class Granite4vPictureOptions(ModelOptions, PictureDescriptionBaseOptions):
    """Options of the stage that describes pictures and reads charts as tables."""

    kind: ClassVar[str] = "granite4v_picture"

    batch_size: Annotated[int, Field(ge=1, description="Pictures that are asked about at once.")] = 16
    prompt: Annotated[str, Field(min_length=1, description="The question about each picture.")] = (
        "Describe this image in a few sentences."
    )
    charts: Annotated[
        Charts,
        Field(
            description=(
                "Which pictures are also read as charts: those that docling's picture classifier found to be of "
                "`chart_types`, all, or none."
            )
        ),
    ] = "classified"
    chart_types: Annotated[list[PictureClassificationLabel], Field(description="Classes that are read as charts.")] = [
        PictureClassificationLabel.BAR_CHART,
        PictureClassificationLabel.LINE_CHART,
        PictureClassificationLabel.PIE_CHART,
        PictureClassificationLabel.SCATTER_PLOT,
        PictureClassificationLabel.OTHER_CHART,
    ]
