"""Opens a Hugging Face checkpoint: reads its configuration and tensor headers, but not the weights."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from granite4v.converter.files import exists, read_json
from granite4v.converter.hub import Location
from granite4v.converter.safetensors_file import ELEMENT_BYTES, SourceTensor, read_header
from granite4v.errors import CheckpointError
from granite4v.families.hf_fields import Fields, shown

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD = re.compile(r"model-(\d{1,6})-of-(\d{1,6})\.safetensors")
SHARD_NAME = re.compile(r"[\w][\w.\- ]{0,200}\.safetensors")
MAX_SHARDS = 10_000
# Weights in formats that are not converted, and what to do about them.
_SAVE_AGAIN = (
    "get the checkpoint's safetensors files, or write them with transformers: "
    "AutoModelForImageTextToText.from_pretrained('{folder}').save_pretrained('NEW_FOLDER')."
)
OTHER_FORMATS = {
    "consolidated*.safetensors": "that file has the tensor names of the model's authors instead of Hugging Face's. "
    "Get the checkpoint's 'model*.safetensors' files.",
    "consolidated*.pth": "that file is a pickle with the tensor names of the model's authors. Get the checkpoint in "
    "Hugging Face's format, with 'model*.safetensors' files.",
    "pytorch_model*.bin": f"that file is a pickle, which can run code when it is opened. Instead, {_SAVE_AGAIN}",
    "*.gguf": "a GGUF file is converted already; use it with --model.",
}
FINGERPRINT_BYTES = 64  # hashed of every tensor; enough to tell apart two trainings of the same model


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's configuration and tensors. `tensors`: by name. `problems`: messages about what is wrong with their
    files, to be reported together with all other problems.

    `incomplete`: files are missing, so the tensors in them are not reported one by one.
    """

    location: Location
    config: Mapping[str, Any]
    preprocessor: Fields
    tensors: Mapping[str, SourceTensor]
    problems: tuple[str, ...] = ()
    incomplete: bool = False

    @property
    def folder(self) -> Path:
        return self.location.folder

    def fingerprint(self) -> str:
        """An id of these weights, 16 hexadecimal digits: the same for every conversion of one checkpoint.

        Hashes config.json, and the name, type, shape and first bytes of every tensor. Raises CheckpointError.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
            n_bytes = ELEMENT_BYTES.get(tensor.dtype, 0) * tensor.n_rows * tensor.n_cols
            try:
                with tensor.path.open("rb") as file:
                    file.seek(tensor.offset_bytes)
                    digest.update(file.read(min(FINGERPRINT_BYTES, n_bytes)))
            except OSError as error:
                raise CheckpointError(f"cannot read '{tensor.path}': {error.strerror or error}.") from None
        return digest.hexdigest()[:16]


def open_checkpoint(location: Location) -> Checkpoint:
    """Reads configuration and tensor headers; raises CheckpointError if there is no checkpoint that can be read."""
    _check_format(location.folder)
    config = read_json(location.folder / "config.json")
    tensors, problems, absent = _read_tensors(location.folder)
    settings = _preprocessor(location.folder)
    return Checkpoint(location, config, settings, tensors, (*absent, *problems), incomplete=bool(absent))


def has_weights(folder: Path) -> bool:
    """Whether the directory holds a model, and not only an adapter."""
    return exists(folder / INDEX) or exists(folder / SINGLE) or bool(_numbered_shards(folder))


def _check_format(folder: Path) -> None:
    """Raises CheckpointError if the weights are only in a format that is not converted."""
    if has_weights(folder):
        return
    for pattern, advice in OTHER_FORMATS.items():
        for path in sorted(folder.glob(pattern))[:1]:
            raise CheckpointError(
                f"'{folder}' holds '{path.name}', but neither '{SINGLE}' nor '{INDEX}'; {advice.format(folder=folder)}"
            )


def _read_tensors(folder: Path) -> tuple[dict[str, SourceTensor], list[str], list[str]]:
    """Reads the tensor headers of a model directory. Returns the tensors, messages about problems with the files, and
    messages about missing files.

    A single file takes precedence over shards, as in transformers. Raises CheckpointError if there is neither.
    """
    if exists(folder / SINGLE):
        return *_merge([folder / SINGLE]), []
    if exists(folder / INDEX):
        return _read_indexed(folder)
    numbered = _numbered_shards(folder)
    if not numbered:
        raise CheckpointError(
            f"'{folder}' has neither '{SINGLE}' nor '{INDEX}'; weights are read from safetensors files alone. Download "
            "the checkpoint again."
        )
    absent = [f"shard '{path.name}' is missing" for path in numbered if not path.exists()]
    return *_merge([path for path in numbered if path.exists()]), absent


def _numbered_shards(folder: Path) -> list[Path]:
    """The paths of `model-1-of-n` to `model-n-of-n` if at least one of them exists; otherwise empty."""
    matches = [match for path in folder.glob("model-*.safetensors") if (match := SHARD.fullmatch(path.name))]
    if not matches:
        return []
    digits, total = len(matches[0].group(1)), matches[0].group(2)
    if int(total) > MAX_SHARDS:
        raise CheckpointError(
            f"'{matches[0].group()}' in '{folder}' is one of {total} files; expected {MAX_SHARDS:,} at most."
        )
    return [folder / f"model-{i:0{digits}}-of-{total}.safetensors" for i in range(1, int(total) + 1)]


def _read_indexed(folder: Path) -> tuple[dict[str, SourceTensor], list[str], list[str]]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"'{folder / INDEX}' has no 'weight_map'; download it again.")
    invalid = [name for name in weight_map.values() if not isinstance(name, str) or not SHARD_NAME.fullmatch(name)]
    if invalid:
        raise CheckpointError(
            f"'{folder / INDEX}' places tensors in {shown(invalid[0])}; expected the name of a .safetensors file "
            "beside it."
        )
    files = sorted(set(weight_map.values()))
    absent = [name for name in files if not exists(folder / name)]
    tensors, problems = _merge([folder / name for name in files if name not in absent])
    for name, file_name in weight_map.items():
        if file_name not in absent and (name not in tensors or tensors[name].path.name != file_name):
            problems.append(f"'{INDEX}' places {name!r} in '{file_name}', which does not hold it")
    return tensors, problems, [f"'{INDEX}' names '{name}', which is not in '{folder}'" for name in absent]


def _merge(paths: list[Path]) -> tuple[dict[str, SourceTensor], list[str]]:
    tensors: dict[str, SourceTensor] = {}
    problems: list[str] = []
    for path in paths:
        found, wrong = read_header(path)
        problems += wrong
        for tensor in found:
            if tensor.name in tensors:
                problems.append(f"{tensor.name!r} is in both '{tensors[tensor.name].path.name}' and '{path.name}'")
            tensors[tensor.name] = tensor
    return tensors, problems


def _preprocessor(folder: Path) -> Fields:
    """Reads the image processor's settings. Versions of transformers put them in different files."""
    merged: dict[str, Any] = {}
    files: list[str] = []
    for name in ("preprocessor_config.json", "processor_config.json"):
        if exists(folder / name):
            settings = Fields(read_json(folder / name), name)
            own = {} if name.startswith("processor") else settings.values
            found = settings.section("image_processor", own).values
            files += [name] if found else []
            merged |= found
    if not merged:
        raise CheckpointError(
            f"'{folder}' has no 'preprocessor_config.json' (or 'processor_config.json' with an image processor); it "
            "says how images are scaled and normalized. Copy it from the original checkpoint."
        )
    return Fields(merged, " and ".join(files))
