"""Chooses the files of a repository that make up the requested model: GGUF files by name, or a checkpoint.

File names only decide what to download; afterwards the metadata of each file say what it is. Names found in practice:

    granite-vision-4.1-4b-Q4_K_M.gguf    mmproj-model-f16.gguf           a publisher's pair
    text-Q4_K_M.gguf                     mmproj-F16.gguf                 made by 'granite4v convert'
    granite-4.0-3b-vision-LoRA-F16.gguf                                  an adapter that belongs to a pair
    BF16/model-BF16-00001-of-00002.gguf                                  one text model in several files
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from granite4v.errors import HubError
from granite4v.models.names import HubName, preferred
from granite4v.models.repository import HubFile, Repository

VISION_ORDER = ("F16", "BF16", "Q8_0", "F32")
_NO_TEXT = ("mmproj", "imatrix", "lora", "mtp-", "eagle3", "dflash", "draft")  # in file names: not a text model
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})$")
_QUANTIZATION = re.compile(r"(?:^|[-._])((?:UD-)?(?:I?Q\d\w*|TQ\d\w*|BF16|F16|F32|MXFP4\w*|NVFP4))$", re.IGNORECASE)
_CHECKPOINT = re.compile(r"[^/]+\.(?:json|jinja|safetensors)")


@dataclass(frozen=True)
class Choice:
    """The files of one model. `variant` names it within its repository; `is_checkpoint`: it must be converted."""

    variant: str
    files: tuple[HubFile, ...]
    is_checkpoint: bool = False

    @property
    def n_bytes(self) -> int:
        return sum(file.n_bytes for file in self.files)


def choose(repository: Repository, name: HubName, default_type: str) -> Choice:
    """Chooses the model that `name` means in its repository. Raises HubError if there is none, or no single one.

    `default_type`: the text type that a checkpoint is converted to if `name` has no variant.
    """
    texts = text_models(repository.files)
    if texts:
        return _pair(repository, name, texts)
    weights = [file for file in repository.files if _CHECKPOINT.fullmatch(file.path)]
    if any(file.path.endswith(".safetensors") for file in weights) and not name.is_file:
        return Choice((name.variant or default_type).upper(), tuple(weights), is_checkpoint=True)
    raise HubError(
        f"'{name.repository}' has neither GGUF files of a text model nor safetensors; choose a repository that has."
    )


def text_models(files: Iterable[HubFile]) -> dict[str, list[list[HubFile]]]:
    """Groups text models by quantization (by file stem if the name has none). Each model is one file, or all parts of
    a split file; incomplete split files are left out."""
    parts: dict[str, list[HubFile]] = {}
    for file in files:
        if file.path.endswith(".gguf") and not any(mark in file.name.lower() for mark in _NO_TEXT):
            parts.setdefault(_SHARD.sub("", file.path.removesuffix(".gguf")), []).append(file)
    models: dict[str, list[list[HubFile]]] = {}
    for stem, found in parts.items():
        found.sort(key=lambda file: file.path)
        shard = _SHARD.search(found[0].path.removesuffix(".gguf"))
        if shard is None or len(found) == int(shard[2]):
            base = stem.rsplit("/", 1)[-1]
            models.setdefault(quantization(base) or base, []).append(found)
    return models


def quantization(stem: str) -> str | None:
    """The quantization at the end of a file name, in capitals: 'mmproj-model-f16' gives F16; None if there is none."""
    match = _QUANTIZATION.search(stem)
    return match[1].upper() if match else None


def _pair(repository: Repository, name: HubName, texts: dict[str, list[list[HubFile]]]) -> Choice:
    if name.is_file:
        named = [(variant, files) for variant, models in texts.items() for files in models if _has(files, name.variant)]
        if not named:
            raise HubError(f"'{name.repository}' has no text model '{name.variant}'; it has: {_listed(texts)}.")
        # the file name as the variant, so that two files of one quantization get different folders
        variant, files = (str(name.variant), named[0][1])
    else:
        by_upper = {variant.upper(): variant for variant in texts}
        smallest = min(texts, key=lambda variant: sum(file.n_bytes for file in texts[variant][0]))
        wanted = by_upper.get(name.variant.upper()) if name.variant else preferred(texts) or smallest
        if wanted is None:
            raise HubError(f"'{name.repository}' has no '{name.variant}'; it has: {', '.join(sorted(texts))}.")
        if len(texts[wanted]) > 1:
            raise HubError(
                f"'{name.repository}' has several text models of type {wanted}; name one: "
                f"{_listed({wanted: texts[wanted]})}."
            )
        variant, files = wanted, texts[wanted][0]
    chosen = [*files]
    for mark in ("mmproj", "lora"):
        found = [file for file in repository.files if file.path.endswith(".gguf") and mark in file.name.lower()]
        chosen += _companion(found, files[0])
    if len({file.name for file in chosen}) < len(chosen):
        raise HubError(f"'{name.repository}' has files of one name in several folders; download them by hand.")
    return Choice(variant, tuple(chosen))


def _has(files: list[HubFile], wanted: str | None) -> bool:
    return any(file.name == wanted for file in files)


def _listed(texts: dict[str, list[list[HubFile]]]) -> str:
    return ", ".join(sorted(f"'{files[0].name}'" for models in texts.values() for files in models))


def _companion(found: list[HubFile], text: HubFile) -> list[HubFile]:
    """Picks the vision file (or adapter) for a text model: first one in the same folder, then by VISION_ORDER, then
    the smallest. Returns a list of one file, or an empty one."""

    def order(file: HubFile) -> tuple[bool, int, int]:
        kind = quantization(file.name.removesuffix(".gguf"))
        rank = VISION_ORDER.index(kind) if kind in VISION_ORDER else len(VISION_ORDER)
        return _folder(file) != _folder(text), rank, file.n_bytes

    return sorted(found, key=order)[:1]


def _folder(file: HubFile) -> str:
    return file.path.rpartition("/")[0]
