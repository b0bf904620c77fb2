"""Lists the GGUF files of a folder and tells which part of a model each one is, by metadata and never by file name."""

from __future__ import annotations

from pathlib import Path

from granite4v import gguf_keys as keys
from granite4v.errors import ModelFileError
from granite4v.ggml.gguf_file import GgufFile

ROLE_NAMES = {
    "text": "a text model",
    "vision": "a vision file (mmproj)",
    "adapter": "a LoRA adapter",
    "other": "a GGUF file without a model (an importance matrix, or a vocabulary)",
}
# general.type of GGUF files without weights to run.
_NO_MODEL = ("imatrix", "dataset", "vocab", "template", "kv_cache")


def role(file: GgufFile) -> str:
    """Returns 'text', 'vision', 'adapter', or 'other' (an importance matrix, a bare vocabulary and the like)."""
    kind, architecture = file.get(keys.GENERAL_TYPE), file.get(keys.GENERAL_ARCHITECTURE)
    if kind == keys.TYPE_ADAPTER:
        return "adapter"
    if architecture == keys.ARCH_CLIP or kind == keys.TYPE_MMPROJ:
        return "vision"
    if kind in _NO_MODEL or keys.GENERAL_ARCHITECTURE not in file:
        return "other"
    if not file.tensors and keys.SPLIT_COUNT not in file:  # the first part of a split file may hold only metadata
        return "other"
    return "text"


def requantized(path: Path) -> str | None:
    """The name of the file that a vision file was requantized from; None if it was not. Raises ModelFileError."""
    with GgufFile.open(path) as file:
        return file.text(keys.REQUANTIZED_FROM, "") or None


def without_sources(files: list[Path]) -> list[Path]:
    """Drops the vision files of one folder from which another of them was requantized."""
    sources = {requantized(file) for file in files} if len(files) > 1 else set()
    return [file for file in files if file.name not in sources]


def gguf_files(folder: Path) -> list[Path]:
    """The GGUF files of a folder, sorted by name, without hidden ones: macOS writes '._name' next to each file on
    foreign disks, and some downloads start as '.name'. Raises ModelFileError when the folder cannot be read.
    """
    try:
        found = sorted(folder.iterdir())
    except OSError as error:
        raise ModelFileError(
            f"cannot read the folder '{folder}': {error.strerror or error}; give a model directory that you may read."
        ) from None
    return [path for path in found if path.suffix == ".gguf" and not path.name.startswith(".") and path.is_file()]
