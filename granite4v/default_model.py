"""The embedded model `nano`: a small checkpoint inside the package, used where no other model is chosen.

It is converted on first use, to F16 with its adapter merged, and kept in the cache, in a folder whose name changes with
the checkpoint, the version of the package and `FORMAT`. A file lock allows one process at a time to convert. The folder
is created atomically. It contains a record of sizes and checksums, by which damage is detected and repaired by
converting again.

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
from typing import TYPE_CHECKING

import granite4v
from granite4v.errors import CheckpointError, OutputError
from granite4v.paths import cache_folder, temporary_folder

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from granite4v.choices import CacheType, Device, VisionCompute
    from granite4v.converter import Progress
    from granite4v.runtime import Model
    from granite4v.runtime.engine.page_store import PageStore
    from granite4v.runtime.engine.parallel import Workload
    from granite4v.runtime.extract import Extraction
    from granite4v.runtime.extract.batch import Say
    from granite4v.runtime.extract.options import ExtractFields
    from granite4v.runtime.extract.state import Watch

    OnProgress = Callable[[Progress], None]
    Report = Callable[[str], None]

NAME = "nano"
FORMAT = 1  # to be raised when the converter writes different files for the same checkpoint
TEXT_TYPE = VISION_TYPE = "F16"
RECORD = "files.json"  # {file name: [bytes, crc32]}
LOCK_TIMEOUT_S = 120.0  # a conversion takes seconds; a process that holds the lock for longer hangs
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
    """Loads a model (see `Model.load`); without a path, or with 'nano' if no such file exists, the embedded model.

    The embedded model is small and was trained on synthetic documents; real ones need a real model. Its conversion on
    first use is logged by the logger 'granite4v', at level INFO. Raises CheckpointError if the package lacks it,
    OutputError if there is no place to write it to, and what `Model.load` raises.
    """
    from granite4v.runtime import Model

    report = logging.getLogger("granite4v").info
    found = embedded_model(report) if path is None or is_embedded(path) else path
    return Model.load(
        found,
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
    watch: Watch | None = None,
    say: Say | None = None,
    **options: Unpack[ExtractFields],
) -> Extraction:
    """Extracts records from documents (see `runtime.extract.extract`), with the embedded model unless one is given.

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

    if model is None or (isinstance(model, str | Path) and is_embedded(model)):
        model = embedded_model(logging.getLogger("granite4v").info)
    return run_extract(inputs, tasks, model=model, watch=watch, say=say, **options)


def is_embedded(name: str | Path) -> bool:
    """Whether a model's name means the embedded one: it is 'nano', and no file or folder has that name."""
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
    """The model directory of the embedded model; converts it unless the cache has it.

    `report` gets a line about each step that takes time or fails. Where the cache cannot be written, as in containers
    with a read-only home, the model is converted in a temporary folder that is removed when the process ends, and
    `report` gets a line that says how to avoid that. Raises CheckpointError if the package lacks the model, OutputError
    if the temporary folder cannot be written either.
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
    """Whether a folder holds exactly the model files of its record, with their sizes and checksums."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        names = {path.name for path in folder.glob("*.gguf")}
        return names == set(record) and all(_checksum(folder / name) == record[name] for name in names)
    except (OSError, ValueError, TypeError):  # no folder, no record, or an invalid one
        return False


def _folder_name(checkpoint: Path) -> str:
    """A name that changes with the checkpoint's content, the package and `FORMAT`. Reads 20 MB: 8 ms of CPU."""
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
    """Converts to `target`, unless another process is doing so. Raises OSError, OutputError."""
    # not at the top: it takes 25 ms to import, and a model in the cache needs no lock
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
        for left_over in target.parent.glob(f".{NAME}-*-partial-*"):  # by a process that was killed
            shutil.rmtree(left_over, ignore_errors=True)
        if target.exists():
            report(f"the embedded model in '{target}' is damaged; converting it again ...")
            shutil.rmtree(target)
        else:
            report(f"converting the embedded model to '{target}' ...")
        _make(checkpoint, target, progress)
    return target


def _make(checkpoint: Path, target: Path, progress: OnProgress | None) -> None:
    """Converts to a new folder and adds the record; the folder appears complete or not at all."""
    from granite4v.converter import Options, convert
    from granite4v.converter.output import files_in_place

    with files_in_place(target, ()) as work:
        paths = convert(checkpoint, work, Options(TEXT_TYPE, VISION_TYPE), progress).paths
        record = {path.name: _checksum(path) for path in paths}
        (work / RECORD).write_text(json.dumps(record), encoding="utf-8")
