"""Resolves model names to paths, and provides the embedded model `nano`, the default.

The embedded model is a small checkpoint inside the package. It is converted on first use, to F16 with its adapter
merged, and kept in the cache, in a folder whose name depends on the checkpoint, the package version and `FORMAT`. A
file lock lets one process at a time convert. The folder is created atomically. It contains a record of sizes and
checksums; a folder that does not match its record is converted again.

The converter and the runtime are imported inside functions: the converter is needed once, and commands that only look
up the path need neither.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import granite4v
from granite4v.errors import ArgumentError, CheckpointError, HubError, ModelFileError, OutputError
from granite4v.extras import check_installed
from granite4v.paths import cache_folder, temporary_folder

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from granite4v.choices import CacheType, Device, VisionCompute
    from granite4v.converter import Progress
    from granite4v.models import Checkpoint, Conversion, HubName, Installed, PullProgress
    from granite4v.runtime import Model
    from granite4v.runtime.engine.page_store import PageStore
    from granite4v.runtime.engine.parallel import Workload
    from granite4v.runtime.extract import Extraction
    from granite4v.runtime.extract.batch import Say
    from granite4v.runtime.extract.cluster import OnRay
    from granite4v.runtime.extract.options import ExtractFields
    from granite4v.runtime.extract.state import Watch

    OnProgress = Callable[[Progress], None]
    OnPull = Callable[[PullProgress], None]
    Report = Callable[[str], None]

NAME = "nano"
FORMAT = 1  # increment when the converter writes different files for the same checkpoint
TEXT_TYPE = VISION_TYPE = "F16"
RECORD = "files.json"  # {file name: [bytes, crc32]}
LOCK_TIMEOUT_S = 120.0  # a conversion takes seconds; a process that holds the lock for longer is hung
READ_BYTES = 1 << 20


def load(
    path: str | Path | None = None,
    *,
    n_ctx: int | None = None,
    n_threads: int | None = None,
    n_parallel: int | None = None,
    device: Device = "auto",
    mmproj: str | Path | None = None,
    lora: bool | str | Path | None = None,
    exact: bool | None = None,
    vision_compute: VisionCompute = "file",
    workload: Workload | None = None,
    page_store: PageStore | bool | None = None,
    cache_type: CacheType | None = None,
) -> Model:
    """Loads a model (see `Model.load`) by path or name (see `find_model`); the embedded model by default.

    The embedded model is small and was trained on synthetic documents; real documents need a real model. Its conversion
    on first use, and the download of a model from the hub, are logged by the logger 'granite4v' at level INFO. Raises
    what `find_model` and `Model.load` raise.
    """
    from granite4v.runtime import Model

    return Model.load(
        find_model(path, logging.getLogger("granite4v").info),
        n_ctx=n_ctx,
        n_threads=n_threads,
        n_parallel=n_parallel,
        device=device,
        mmproj=mmproj,
        lora=lora,
        exact=exact,
        vision_compute=vision_compute,
        workload=workload,
        page_store=page_store,
        cache_type=cache_type,
    )


def extract(
    inputs: Sequence[str | Path] | str | Path,
    tasks: Sequence[str] | str = (),
    *,
    model: Model | str | Path | None = None,
    ray: str | None = None,
    watch: Watch | None = None,
    say: Say | None = None,
    **options: Unpack[ExtractFields],
) -> Extraction:
    """Extracts records from documents (see `runtime.extract.extract`), with the embedded model unless one is given.

    `ray`: the address of a Ray cluster whose nodes read the pages; 'auto' uses the cluster of this machine, or starts
    one for this run. `model` must then be a path or name, and every node must have the model or find it by that name.
    A worker uses all cores of its node, or `n_threads` of them; `parallel` applies to each worker.

    For instance:

        import granite4v

        schema = {"type": "object", "properties": {"total": {"type": ["string", "null"]}}, "required": ["total"]}
        with granite4v.extract("scans/", ["tables_html", "kvp"], schema=schema, model="out/", out="read/") as records:
            for record in records:
                if record.error:
                    print(record.source, record.page, record.error)
                elif record.task == "kvp" and record.valid:
                    print(record.source, record.page, record.value["total"])
                for table in record.tables:
                    print(table.texts())
    """
    from granite4v.runtime.extract import extract as run_extract

    if model is None or isinstance(model, str | Path):
        found = find_model(model, logging.getLogger("granite4v").info)
        return run_extract(inputs, tasks, model=on_ray(model, found, ray), watch=watch, say=say, **options)
    if ray is not None:
        raise ArgumentError("with 'ray', every node loads a model of its own; give its path or name.")
    return run_extract(inputs, tasks, model=model, watch=watch, say=say, **options)


class DocumentReader:
    """Turns batches of documents into records, for `map_batches` of a Ray Dataset or any other pipeline.

        import granite4v, ray

        scans = ray.data.from_items([{"path": "s3://scans/a.pdf", "id": 1}, {"path": "s3://scans/b.pdf", "id": 2}])
        records = scans.map_batches(
            granite4v.DocumentReader,
            fn_constructor_args=("tables_html",),
            compute=ray.data.ActorPoolStrategy(size=2),
            num_cpus=4,
            batch_size=16,
        )

    A batch is a dict of lists or NumPy arrays, a pandas.DataFrame or a pyarrow.Table. It has a column `path` (paths or
    URLs), or a column `bytes` (file contents) with the names of the files in an optional `path`. The result is a
    pyarrow.Table like that of `read_results(..., arrow=True)`, with one row per page and task; a failure is a row with
    its `error`. The other columns of the batch are repeated in each row of their document.
    """

    def __init__(
        self,
        tasks: Sequence[str] | str = (),
        *,
        model: str | Path | None = None,
        **options: Unpack[ExtractFields],
    ) -> None:
        """Loads the model, once for each worker. `options` are those of `extract`, except those about output files,
        which are rejected; `n_threads` defaults to the cores that Ray gives the worker. Raises ArgumentError, and what
        `load` raises."""
        from granite4v.runtime.engine.parallel import Workload
        from granite4v.runtime.extract import ExtractOptions
        from granite4v.runtime.extract.arguments import checked
        from granite4v.runtime.extract.batch_columns import PATHS
        from granite4v.runtime.extract.document_batches import cores

        for name in ("out", "formats", "resume", "report", "csv_safe", "retry_failed"):
            if options.get(name):
                raise ArgumentError(
                    f"'{name}' is about output files, but a pipeline writes its records itself; leave it out."
                )
        _, self._options = checked(PATHS, ExtractOptions(tasks=tasks, **options))
        chosen = self._options
        self._model = load(
            model,
            n_ctx=chosen.n_ctx,
            n_threads=chosen.n_threads or cores(),
            n_parallel=chosen.parallel,
            device=chosen.device,
            mmproj=chosen.mmproj,
            vision_compute=chosen.vision_compute,
            workload=Workload(None, chosen.max_tokens),
            page_store=chosen.page_store,
            cache_type=chosen.cache_type,
        )

    def __call__(self, batch: Any) -> Any:
        """Returns the records of one batch. Raises ArgumentError for a batch of another type, with neither column, or
        with a column that has the same name as a column of the records."""
        from granite4v.runtime.extract.document_batches import answered

        return answered(batch, self._options, self._model)

    def close(self) -> None:
        self._model.close()


def on_ray(name: str | Path | None, path: str | Path, address: str | None) -> OnRay | str | Path:
    """Wraps the model for `extract`, so that the nodes of a Ray cluster load it; returns `path` as it is without an
    address. `path` is what `find_model` returned for `name` on this machine. Raises Granite4vError if the package `ray`
    is not installed."""
    if address is None:
        return path
    from granite4v.runtime.extract.cluster import OnRay

    check_installed("'ray' (--ray)", "ray", "ray")
    return OnRay(address, name, path, find_model)


def find_model(
    name: str | Path | None, report: Report, written: OnProgress | None = None, pulled: OnPull | None = None
) -> str | Path:
    """Resolves a model name to a path: the embedded model for None and 'nano', an existing path, or else a model of
    the Hugging Face hub ('owner/name', 'owner/name:Q4_K_M'), downloaded on first use.

    A `Path` is never a hub name. `report` gets a line about each step that takes time; `written` and `pulled` follow
    the progress of conversions and downloads. Raises HubError for a name that the hub does not have or cannot be asked
    for, ModelFileError for a name that is neither a path nor a hub id, TypeError for what is no name at all,
    CheckpointError and OutputError.
    """
    if not isinstance(name, str | Path | None):
        raise TypeError(
            f"the model is {name!r:.60}; expected a path, the name of a model, or None for the embedded one."
        )
    if name is None or is_embedded(name):
        return embedded_model(report, written)
    if isinstance(name, Path) or _is_path(name):
        return name
    wanted = hub_name(name)
    from granite4v import models

    model = models.find(wanted)
    if model is None:
        try:
            model = pull_model(wanted, report, written, pulled)
        except HubError as error:
            raise HubError(f"there is no file or folder '{name}' here; {error}") from None
    models.mark_used(model)
    return model.path


def hub_name(text: str) -> HubName:
    """Parses a hub name. Raises HubError for a web address, ModelFileError for any other text that is no hub name."""
    from granite4v.models.names import HUB_URL, parse

    if url := HUB_URL.fullmatch(text):
        raise HubError(f"'{text}' is a web address; give the hub id '{url[1]}'.")
    name = parse(text)
    if name is None:
        raise ModelFileError(
            f"'{text}' does not exist, and it is no hub id ('owner/name', or 'owner/name:Q4_K_M') either; give a model "
            "directory made by 'granite4v convert', a text GGUF file, or a hub id."
        )
    return name


def pull_model(
    name: HubName,
    report: Report,
    written: OnProgress | None = None,
    pulled: OnPull | None = None,
    *,
    revision: str | None = None,
) -> Installed:
    """Downloads a model from the hub into the models folder (see `models.pull`); converts a checkpoint as
    `granite4v convert` does."""
    from granite4v import models

    return models.pull(
        name, _conversion(report, written), revision=revision, say=report, progress=pulled or (lambda _: None)
    )


def _conversion(report: Report, written: OnProgress | None) -> Conversion:
    from granite4v import converter
    from granite4v.models import Conversion

    def run(checkpoint: Checkpoint, target: Path) -> None:
        source = converter.Location(checkpoint.folder, checkpoint.repository, checkpoint.commit)
        summary = converter.convert(source, target, converter.Options(checkpoint.text_type), written, report)
        for warning in summary.plan.warnings:
            report(f"warning: {warning}")

    def check(text_type: str) -> None:
        converter.check_options(converter.Options(text_type))

    return Conversion(converter.Options().text_type, check, run)


def _is_path(name: str) -> bool:
    """Whether a name is an existing file or folder, or can only be meant as a path; the loader reports what is wrong
    with it."""
    try:
        return name.startswith((".", "/", "~")) or name.endswith(".gguf") or Path(name).exists()
    except (OSError, ValueError):  # too long, not readable, or with a NUL
        return True


def is_embedded(name: str | Path) -> bool:
    """Whether a model name means the embedded model: it is 'nano', and no file or folder has that name."""
    return name == NAME and not Path(NAME).exists()


def checkpoint_folder() -> Path:
    """The checkpoint inside the package. Raises CheckpointError if it is missing."""
    folder = Path(granite4v.__file__).parent / NAME
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"the embedded model is missing from this installation ('{folder}' has no config.json); reinstall "
            "granite4v, or give another model."
        )
    return folder


def embedded_model(report: Report, progress: OnProgress | None = None) -> Path:
    """Returns the model directory of the embedded model; converts it unless the cache has it.

    `report` gets a line about each step that takes time or fails. If the cache cannot be written, as in containers with
    a read-only home, the model is converted in a temporary folder that is removed when the process ends, and `report`
    gets a line that says how to avoid that. Raises CheckpointError if the package lacks the model, OutputError if the
    temporary folder cannot be written either.
    """
    checkpoint = checkpoint_folder()
    target = cache_folder() / _folder_name(checkpoint)
    if is_intact(target):
        return target
    try:
        return _make_once(checkpoint, target, report, progress)
    except (OSError, NotImplementedError, OutputError) as error:  # NotImplementedError: a file system without locks
        report(
            f"the embedded model cannot be kept in '{target.parent}' ({str(error).rstrip('.')}), so it is converted "
            "for this run only; set GRANITE4V_CACHE to a writable folder."
        )
    try:
        return _make_once(checkpoint, temporary_folder() / target.name, report, progress)
    except (OSError, NotImplementedError) as error:
        raise OutputError(
            f"the embedded model can be written neither to the cache nor to a temporary folder ({error}); set "
            "GRANITE4V_CACHE to a writable folder."
        ) from None


def is_intact(folder: Path) -> bool:
    """Whether a folder holds exactly the GGUF files of its record, with the recorded sizes and checksums."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        names = {path.name for path in folder.glob("*.gguf")}
        return names == set(record) and all(_checksum(folder / name) == record[name] for name in names)
    except (OSError, ValueError, TypeError):  # no folder, no record, or an invalid one
        return False


def _folder_name(checkpoint: Path) -> str:
    """Returns a folder name that changes with the checkpoint's content, the package version and `FORMAT`. Reads 20 MB
    in 8 ms of CPU time."""
    package = importlib.metadata.version("granite4v")
    try:
        files = {path.name: _checksum(path) for path in sorted(checkpoint.iterdir()) if path.is_file()}
    except OSError as error:
        raise CheckpointError(f"the embedded model cannot be read: {error}; reinstall granite4v.") from None
    identity = json.dumps([package, FORMAT, TEXT_TYPE, VISION_TYPE, files])
    return f"{NAME}-{package}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


def _checksum(path: Path) -> list[int]:
    """[bytes, crc32]: detects accidents, not tampering."""
    n_bytes = crc = 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(READ_BYTES):
            n_bytes, crc = n_bytes + len(piece), zlib.crc32(piece, crc)
    return [n_bytes, crc]


def _make_once(checkpoint: Path, target: Path, report: Report, progress: OnProgress | None) -> Path:
    """Converts to `target`; if another process is converting, waits for it and uses its result. Raises OSError,
    OutputError."""
    # not at the top: the import takes 25 ms, and a model in the cache needs no lock
    from filelock import FileLock, Timeout

    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(target.parent / f"{NAME}.lock")
    try:
        held = lock.acquire(blocking=False)
    except Timeout:
        report("another process is converting the embedded model; waiting for it ...")
        held = lock.acquire(timeout=LOCK_TIMEOUT_S)
    with held:
        if is_intact(target):
            return target
        for left_over in target.parent.glob(f".{NAME}-*-partial-*"):  # of a killed process
            shutil.rmtree(left_over, ignore_errors=True)
        if target.exists():
            report(f"the embedded model in '{target}' is damaged; converting it again ...")
            shutil.rmtree(target)
        else:
            report(f"converting the embedded model to '{target}' ...")
        _make(checkpoint, target, progress)
    return target


def _make(checkpoint: Path, target: Path, progress: OnProgress | None) -> None:
    """Converts to `target` and adds the record; the folder appears complete or not at all."""
    from granite4v.converter import Options, convert
    from granite4v.converter.output import files_in_place

    with files_in_place(target, ()) as work:
        paths = convert(checkpoint, work, Options(TEXT_TYPE, VISION_TYPE), progress).paths
        record = {path.name: _checksum(path) for path in paths}
        (work / RECORD).write_text(json.dumps(record), encoding="utf-8")
