"""Runs a conversion from start to end: opens the checkpoint, reads its configuration, plans and writes the files."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from granite4v.converter import policy
from granite4v.converter.adapter import Adapter, base_model_of, has_adapter, open_adapter
from granite4v.converter.checkpoint import has_weights, open_checkpoint
from granite4v.converter.head import decide_head
from granite4v.converter.hub import Location, locate
from granite4v.converter.match import Names, match_tensors
from granite4v.converter.output import check_target, files_in_place
from granite4v.converter.plan import Model, Plan, make_plan
from granite4v.converter.quantized import check_full_precision
from granite4v.converter.stream import n_cores
from granite4v.converter.tensors import vision_tensors
from granite4v.converter.tensors.decoder import decoder_tensors
from granite4v.converter.writer import write_file
from granite4v.errors import CheckpointError, Granite4vError
from granite4v.families.registry import family_of_checkpoint
from granite4v.families.text import is_tied, text_architecture, text_section
from granite4v.models.names import is_hub_id
from granite4v.paths import check_space

LORA_MODES = ("merge", "separate", "ignore")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """Options of a conversion. Types are in upper or lower case; see `policy.TEXT_TYPES` and `VISION_TYPES`."""

    text_type: str = "Q4_K_M"
    vision_type: str = "F16"
    lora: str = "merge"
    adapter: str | None = None
    revision: str | None = None
    force: bool = False
    n_threads: int | None = None


@dataclass(frozen=True)
class Progress:
    """How much has been written. `file` and `tensor`: the names of those being written."""

    done_bytes: int
    total_bytes: int
    file: str
    tensor: str


@dataclass(frozen=True)
class Summary:
    """What was written, where, and how long it took."""

    plan: Plan
    paths: tuple[Path, ...]
    seconds: float

    @property
    def file_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.paths)


def check_options(options: Options) -> tuple[str, str]:
    """Returns the text and vision type in upper case; raises Granite4vError for invalid options."""
    types = policy.check_policies(options.text_type, options.vision_type)
    if options.lora not in LORA_MODES:
        raise Granite4vError(f"unknown adapter mode '{options.lora}'; known: {', '.join(LORA_MODES)}.")
    return types


def plan_conversion(
    source: str | Path | Location, options: Options | None = None, report: Callable[[str], None] | None = None
) -> Plan:
    """Plans what `convert` would write, without writing anything; raises CheckpointError.

    `report`: called before a download. Without it, a download of the base model that an adapter names is logged as a
    warning.
    """
    options = options or Options()
    text_type, vision_type = check_options(options)
    base, adapter_at = _find(source, options, report)
    model = _open_model(base, policy.vision_block(vision_type))
    adapter = _open_adapter(adapter_at, model, options.lora)
    return make_plan(model, text_type, vision_type, adapter, options.lora)


def convert(
    source: str | Path | Location,
    target: str | Path,
    options: Options | None = None,
    progress: Callable[[Progress], None] | None = None,
    report: Callable[[str], None] | None = None,
) -> Summary:
    """Writes a model directory from a checkpoint: a directory, a hub id, or a Location (a directory with its name).

    `report` as for `plan_conversion`; warnings are in the summary's plan. Raises CheckpointError for a problem with
    the checkpoint or adapter; OutputError for a target that exists or cannot be written. Configuration, names and
    shapes are checked before anything is written. No partial output is left behind, not even on an interrupt.
    """
    options, target, began = options or Options(), Path(target), time.perf_counter()
    check_target(target, options.force)
    plan = plan_conversion(source, options, report)
    total_bytes, done_bytes = plan.data_bytes, 0
    check_space(target, total_bytes)
    n_threads = options.n_threads or n_cores()
    names = [file.name for file in plan.files]
    with files_in_place(target, names) as work:
        for file in plan.files:

            def advance(n_bytes: int, tensor: str, file_name: str = file.name) -> None:
                nonlocal done_bytes
                done_bytes += n_bytes
                if progress is not None:
                    progress(Progress(done_bytes, total_bytes, file_name, tensor))

            write_file(file, work / file.name, n_threads, advance)
    return Summary(plan, tuple(target / name for name in names), time.perf_counter() - began)


def _find(
    source: str | Path | Location, options: Options, report: Callable[[str], None] | None
) -> tuple[Location, Location | None]:
    """Locates the base model and the adapter. SRC may hold both, only the model, or an adapter that names its base."""
    here = source if isinstance(source, Location) else locate(str(source), options.revision, report)
    if options.adapter is not None:
        if not has_weights(here.folder) and has_adapter(here.folder):
            raise CheckpointError(f"'{here.name}' is itself an adapter; give the base model as SRC, or no --adapter.")
        adapter = locate(options.adapter, report=report)
        if not has_adapter(adapter.folder):
            raise CheckpointError(f"'{options.adapter}' has no 'adapter_config.json'; it is not a PEFT adapter.")
        return here, adapter
    if not has_adapter(here.folder):
        if options.lora == "separate":
            raise CheckpointError(f"'{here.name}' contains no adapter to write separately; give one with --adapter.")
        return here, None
    if has_weights(here.folder):
        return here, here
    return _base_of(here, report), here


def _base_of(adapter: Location, report: Callable[[str], None] | None) -> Location:
    """Locates the base model that an adapter names: a directory inside the adapter's, another directory, or a hub id.

    A file decides what is downloaded, and not the user, so a download is always announced.
    """
    base = base_model_of(adapter.folder)
    try:
        beside = adapter.folder / base
        if beside.is_dir():
            return locate(str(beside))
        absent = not Path(base).expanduser().is_dir()
    except (OSError, RuntimeError, ValueError):
        absent = True
    if absent and not is_hub_id(base):
        raise CheckpointError(
            f"the adapter '{adapter.name}' names {base!r} as its base model, and there is no such directory; give the "
            f"base model as SRC and the adapter with --adapter '{adapter.name}'."
        )
    announce = report or log.warning
    return locate(base, report=lambda line: announce(f"the adapter '{adapter.name}' names its base model: {line}"))


def _open_model(location: Location, vision_block: int) -> Model:
    checkpoint = open_checkpoint(location)
    family = family_of_checkpoint(checkpoint.config)
    warnings = check_full_precision(checkpoint)
    vision = family.config_from_hf(checkpoint.config, checkpoint.preprocessor)
    text_config = text_section(checkpoint.config)
    architecture = text_architecture(text_config)
    text = architecture.config(text_config, checkpoint.tensors)
    checkpoint, tied, remarks = decide_head(checkpoint, is_tied(checkpoint.config, text_config))
    text_groups = decoder_tensors(text, tied)
    vision_groups = vision_tensors(vision, checkpoint.config, vision_block)
    match = match_tensors(Names.of((*text_groups, *vision_groups)), checkpoint)
    return Model(
        checkpoint=checkpoint,
        family=family,
        vision=vision,
        architecture=architecture,
        text_config=text_config,
        text=text,
        tied=tied,
        text_groups=text_groups,
        vision_groups=vision_groups,
        match=match,
        warnings=(*warnings, *remarks),
    )


def _open_adapter(location: Location | None, model: Model, lora: str) -> Adapter | None:
    if location is None:
        return None
    if lora == "ignore":
        return Adapter(location.folder, location.name, 0.0, {})
    names = Names.of((*model.text_groups, *model.vision_groups))
    shapes = {own: tensor.shape for own, tensor in model.match.tensors.items()}
    return open_adapter(location.folder, location.name, names, shapes, model.checkpoint.location.name)
