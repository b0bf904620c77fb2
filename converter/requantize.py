"""Converts a vision file to another weight type: one of ours, or one that llama.cpp's converter wrote.

The metadata stays the same, except for the file type, the provenance and a padded width. Every tensor is read, padded
and quantized some rows at a time as in a conversion, and gets the type that a conversion gives it. The result for F16
weights is therefore the same as that of a conversion.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import gguf

from granite4v import gguf_keys as keys
from granite4v.converter import policy
from granite4v.converter.conversion import Progress
from granite4v.converter.plan import PlannedFile, PlannedTensor
from granite4v.converter.safetensors_file import SourceTensor
from granite4v.converter.stream import n_cores
from granite4v.converter.tensors.rules import TensorRule
from granite4v.converter.writer import Typed, write_file
from granite4v.errors import ModelFileError, OutputError
from granite4v.families.registry import read_vision
from granite4v.families.vision_layout import ffn_padded, padded_width, row_padded, tensor_kind
from granite4v.ggml.gguf_file import GgufFile, TensorInfo
from granite4v.gguf_role import ROLE_NAMES, gguf_files, requantized, role
from granite4v.paths import check_space, complete_file

SOURCE_TYPES = policy.PLAIN  # their rounding error is negligible compared with that of another quantization
KEPT = "a layer of the decoder, in the type that the conversion gave it"
_OWN_KEYS = (keys.GENERAL_ARCHITECTURE, keys.GENERAL_ALIGNMENT)  # the writer sets these
_TYPE_IN_NAME = re.compile(rf"(?<![a-z0-9])({'|'.join(policy.VISION_TYPES)})(?![a-z0-9])", re.IGNORECASE)


def requantize(
    source: str | Path,
    vision_type: str,
    out: str | Path | None = None,
    *,
    force: bool = False,
    n_threads: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Path:
    """Writes a vision file in another weight type; returns the new file's path.

    `source`: a vision file, or a model directory with one. `out`: a file, or a directory for it; by default the
    directory of the source. `force`: replace `out`. Raises Granite4vError for an unknown type, ModelFileError for a
    file that cannot be quantized, OutputError for a target that exists or cannot be written, or with which a model
    directory would have two vision files to choose from. No partial output is left behind, not even on an interrupt.
    """
    vision_type = policy.check_vision_type(vision_type)
    path = find_vision_file(Path(source))
    with GgufFile.open(path) as file:
        target = _target(path, vision_type, None if out is None else Path(out))
        planned = replace(plan_file(file, vision_type), name=target.name)
    check_target(path, target, force)
    check_choice(path, target)
    check_space(target, planned.data_bytes)
    done_bytes = 0

    def advance(n_bytes: int, tensor: str) -> None:
        nonlocal done_bytes
        done_bytes += n_bytes
        if progress is not None:
            progress(Progress(done_bytes, planned.data_bytes, target.name, tensor))

    with complete_file(target) as partial:
        write_file(planned, partial, n_threads or n_cores(), advance)
    return target


def find_vision_file(path: Path) -> Path:
    """Returns the file itself, or the vision file of a directory; if there are several, the one that the others were
    made from.

    Raises ModelFileError if there is none, or more than one original.
    """
    if not path.is_dir():
        return path
    found = vision_files(path)
    originals = [file for file in found if requantized(file) not in {other.name for other in found}]
    if not originals:
        raise ModelFileError(f"'{path}' contains no vision file (mmproj-*.gguf); give one, or a directory with one.")
    if len(originals) > 1:
        names = ", ".join(f"'{file.name}'" for file in originals)
        raise ModelFileError(f"'{path}' contains more than one vision file: {names}; give the file instead.")
    return originals[0]


def vision_files(folder: Path) -> list[Path]:
    """The vision files of a folder, sorted by name. Raises ModelFileError if one of its GGUF files is damaged."""
    return [file for file in gguf_files(folder) if _is_vision(file)]


def plan_file(file: GgufFile, vision_type: str) -> PlannedFile:
    """Plans what `requantize` writes. Raises ModelFileError for a file that is not a vision file of a known family, and
    for weights that are quantized to few bits already."""
    if role(file) != "vision":
        raise ModelFileError(f"'{file.path}' is {ROLE_NAMES[role(file)]}; give a vision file (mmproj-*.gguf).")
    family, config = read_vision(file)
    _check_types(file, vision_type)
    shapes = {name: info.shape for name, info in file.tensors.items()}
    names = {theirs: ours for ours, theirs in family.gguf_names(config, shapes).items()}
    is_padded = vision_type not in policy.FLOATS
    block = policy.vision_block(vision_type) if is_padded else 1
    tensors = tuple(
        _tensor(file, info, names.get(info.name, info.name), vision_type, block) for info in file.tensors.values()
    )
    metadata: dict[str, Any] = {
        key: Typed(file[key], *file.kind(key)) for key in file if key not in _OWN_KEYS and file[key] != []
    }
    width = config.tower.intermediate_size
    if padded_width(width, block) != width:
        metadata[keys.VISION_FEED_FORWARD_LENGTH] = padded_width(width, block)
    metadata |= _provenance(file, vision_type)
    return PlannedFile(file.path.name, keys.ARCH_CLIP, metadata, tensors)


def check_target(source: Path, target: Path, force: bool) -> None:
    """Raises OutputError if the target exists, unless `force`; always if it is a directory or the source file."""
    if not target.exists():
        return
    if target.is_dir() or os.path.samefile(source, target):
        what = "a directory" if target.is_dir() else "the file to read"
        raise OutputError(f"'{target}' is {what}; give another file with --out.")
    if not force:
        raise OutputError(f"'{target}' exists; give another file with --out, or --force to replace it.")


def check_choice(source: Path, target: Path) -> None:
    """Raises OutputError if the target would be the second vision file to choose from in a model's folder, which could
    then not be loaded any more. A folder with several originals cannot be loaded anyway."""
    files, has_text = _parts(target.parent)
    others = [file for file in files if file.name != target.name]
    made_from = {file.name: requantized(file) for file in others} | {target.name: source.name}
    rivals = [file.name for file in others if file.name not in made_from.values()]
    if not has_text or not rivals or not (len(rivals) == 1 or any(made_from[name] for name in rivals)):
        return
    names = ", ".join(f"'{name}'" for name in rivals)
    its = "that file" if len(rivals) == 1 else "those files"
    raise OutputError(
        f"'{target.parent}' contains {names} already; with '{target.name}' beside it, the model would have more than "
        f"one vision file to choose from, and not load. Remove {its} first, or write elsewhere with --out (out= in "
        "Python)."
    )


def _parts(folder: Path) -> tuple[list[Path], bool]:
    """The vision files of a folder, and whether it has a text model. Damaged files are left out."""
    roles: dict[Path, str] = {}
    for path in gguf_files(folder) if folder.is_dir() else []:
        with contextlib.suppress(ModelFileError), GgufFile.open(path) as file:
            roles[path] = role(file)
    return [path for path, one in roles.items() if one == "vision"], "text" in roles.values()


def _is_vision(path: Path) -> bool:
    with GgufFile.open(path) as file:
        return role(file) == "vision"


def _check_types(file: GgufFile, vision_type: str) -> None:
    own = [info for info in file.tensors.values() if not info.name.startswith(keys.CROSS_PREFIX)]
    matrices = {info.type_name for info in own if tensor_kind(info.name, info.shape) == "matrix"}
    if matrices == {policy.BASE[vision_type]}:
        raise ModelFileError(f"all matrices of '{file.path}' are {vision_type} already; there is nothing to do.")
    rounded = sorted({info.type_name for info in own} - set(SOURCE_TYPES))
    if rounded:
        raise ModelFileError(
            f"'{file.path}' has weights that were rounded to {', '.join(rounded)} before; in {vision_type} they would "
            f"keep that error and get another one. Give the model's {' or '.join(SOURCE_TYPES)} file."
        )


def _tensor(file: GgufFile, info: TensorInfo, name: str, vision_type: str, block: int) -> PlannedTensor:
    """Plans one tensor. `name`: our name for it, whatever it is called in the file. Decoder layers are copied
    unchanged."""
    if name.startswith(keys.CROSS_PREFIX):
        source = SourceTensor(info.name, file.path, info.type_name, info.shape, info.offset)
        rule = TensorRule(info.name, info.name, info.shape)
        return PlannedTensor(info.name, info.shape, policy.Choice(info.type_name, KEPT), source, rule)
    padded = ffn_padded(name, info.shape, block)
    choice = policy.vision_type(name, padded, vision_type)
    source = SourceTensor(info.name, file.path, info.type_name, info.shape, info.offset)
    rule = TensorRule(info.name, info.name, info.shape, padded=padded if padded != info.shape else None)
    return PlannedTensor(info.name, row_padded(padded, choice.type_name), choice, source, rule)


def _provenance(file: GgufFile, vision_type: str) -> Mapping[str, Any]:
    types = {
        name: sum(math.prod(info.shape) for info in file.tensors.values() if info.type_name == name)
        for name in SOURCE_TYPES
    }
    return {
        keys.GENERAL_FILE_TYPE: policy.file_type(vision_type),
        keys.GENERAL_QUANTIZATION_VERSION: gguf.GGML_QUANT_VERSION,
        keys.PROVENANCE_VERSION: packages.version("granite4v"),
        keys.PROVENANCE_POLICY: vision_type,
        keys.REQUANTIZED_FROM: file.path.name,
        keys.REQUANTIZED_FROM_TYPE: max(types, key=types.__getitem__),
    }


def _target(source: Path, vision_type: str, out: Path | None) -> Path:
    """The path to write: 'mmproj-F16.gguf' becomes 'mmproj-Q8_0.gguf'; a name without a type gets it appended."""
    if out is not None and not out.is_dir():
        return out
    stem = _TYPE_IN_NAME.sub(vision_type, source.stem)
    if stem == source.stem:
        stem = f"{stem}-{vision_type}"
    return (source.parent if out is None else out) / f"{stem}.gguf"
