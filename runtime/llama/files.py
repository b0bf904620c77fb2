"""Finds the files of a model, and checks that they belong together. Reads headers only.

A model is a directory, or a text GGUF with its vision file next to it or named by an option. Files may come from our
converter, from llama.cpp's, or from a publisher's repository: their roles are read from their metadata, never from
their names.
"""

from __future__ import annotations

import re
import stat
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from granite4v import gguf_keys as keys
from granite4v.clip_projector.files import url_in
from granite4v.errors import ModelFileError
from granite4v.families.base import VisionConfig
from granite4v.families.hf_fields import MAX_WIDTH
from granite4v.families.registry import read_vision
from granite4v.ggml.gguf_file import GgufFile
from granite4v.gguf_role import ROLE_NAMES, gguf_files, role, without_sources

MAX_COUNT = (1 << 31) - 1
MAX_LAYERS = 512  # LLAMA_MAX_LAYERS; llama.cpp aborts the process on a file with more
_LATER_SHARD = re.compile(r"-(?!00001-)\d{5}-of-\d{5}\.gguf$")
_FIRST_SHARD = re.compile(r"-00001-of-(\d{5})\.gguf$")
_AGAIN = "convert it again with 'granite4v convert'"


@dataclass(frozen=True)
class Injection:
    """Maps each image stream to a slot of an embedding row, and to the decoder layer that the slot feeds.

    A row of an embedding batch is `n_slots` embeddings wide. Slot 0 is the input of layer 0; `deepstack_mapping` of the
    text file has one entry for each layer: the slot added before it, or -1. With streams for layers 0, 3 and 7 of nine
    it is [-1, -1, -1, 1, -1, -1, -1, 2, -1]: slots 0, 1, 2 feed layers 0, 3, 7.
    """

    slots: tuple[int, ...]
    layers: tuple[int, ...]
    n_slots: int


class ModelFiles:
    """The opened headers of one model's files: the text file, and the vision file and adapter if there are any."""

    def __init__(self, text: GgufFile, vision: GgufFile | None, adapter: GgufFile | None) -> None:
        self.text, self.vision, self.adapter = text, vision, adapter
        self.left_out: list[ModelFileError] = []  # why other files in the folder were skipped
        self.vision_config: VisionConfig | None = None
        self.injection: Injection | None = None  # None without a vision file, and for cross-attention

    @classmethod
    def open(
        cls, path: str | Path, *, mmproj: str | Path | None = None, adapter: str | Path | None = None
    ) -> ModelFiles:
        """Opens the files of a model directory or of a text GGUF. Raises ModelFileError when they
        do not fit together."""
        left_out: list[ModelFileError] = []
        files = cls(
            *_resolve(_path(path, "model"), _optional(mmproj, "mmproj"), _optional(adapter, "adapter"), left_out)
        )
        files.left_out = left_out
        try:
            files._check()
        except BaseException:
            files.close()
            raise
        return files

    @property
    def architecture(self) -> str:
        return str(self.text.text(keys.GENERAL_ARCHITECTURE))

    @property
    def text_paths(self) -> list[Path]:
        """The text file, or all its parts if it is split."""
        path = self.text.path
        match = _FIRST_SHARD.search(path.name)
        if match is None:
            return [path]
        stem, n = path.name[: match.start()], int(match[1])
        return [path.with_name(f"{stem}-{i:05}-of-{n:05}.gguf") for i in range(1, n + 1)]

    def text_key(self, key: str) -> str:
        """The text file's name for a key of `gguf_keys` that contains `{arch}`."""
        return keys.text_key(key, self.architecture)

    def _check(self) -> None:
        n_embd = self.text.integer(self.text_key(keys.EMBEDDING_LENGTH), 1, MAX_WIDTH)
        self.text.integer(self.text_key(keys.CONTEXT_LENGTH), 1, MAX_COUNT)
        n_layers = self.text.integer(self.text_key(keys.BLOCK_COUNT), 0, MAX_COUNT)
        if not 0 < n_layers <= MAX_LAYERS:
            raise ModelFileError(
                f"'{self.text.path}' has {n_layers:,} layers; llama.cpp takes 1 to {MAX_LAYERS}. {_AGAIN.capitalize()}."
            )
        if self.adapter is not None:
            self._check_adapter(self.adapter)
        if self.vision is None:
            return
        _check_pair(self.text, self.vision)
        self.vision_config = read_vision(self.vision)[1]
        if self.vision_config.text_hidden_size != n_embd:
            raise ModelFileError(
                f"'{self.vision.path}' makes embeddings of width {self.vision_config.text_hidden_size}, but "
                f"'{self.text.path}' takes width {n_embd}; the two belong to different models."
            )
        cross = self.vision_config.cross_attention
        if cross is not None:
            if cross.layers[-1] >= n_layers + len(cross.layers):
                raise ModelFileError(
                    f"'{self.vision.path}' has the decoder's layer {cross.layers[-1]}, but with the {n_layers} of "
                    f"'{self.text.path}' there are {n_layers + len(cross.layers)}; the two belong to different models."
                )
            return
        self.injection = self._injection(self.vision, self.vision_config)

    def _check_adapter(self, adapter: GgufFile) -> None:
        architecture = adapter.get(keys.GENERAL_ARCHITECTURE)
        if architecture != self.architecture:
            raise ModelFileError(
                f"the adapter '{adapter.path}' is for architecture {architecture!r}, but '{self.text.path}' has "
                f"{self.architecture!r}; use the adapter that was converted together with this model."
            )
        _check_pair(self.text, adapter)

    def _injection(self, vision: GgufFile, config: VisionConfig) -> Injection:
        key = self.text_key(keys.DEEPSTACK_MAPPING)
        mapping = self.text.integers(key, -1, MAX_LAYERS, [], max_length=MAX_LAYERS)
        layer_of_slot = {slot: layer for layer, slot in enumerate(mapping) if slot > 0}
        n_slots = 1 + len(layer_of_slot)
        if sorted(layer_of_slot) != list(range(1, n_slots)):
            raise ModelFileError(
                f"'{self.text.path}' numbers its image streams {sorted(layer_of_slot)}; expected 1, 2, ... without "
                f"gaps. {_AGAIN.capitalize()}."
            )
        slot_of_layer = {0: 0} | {layer: slot for slot, layer in layer_of_slot.items()}
        layer_of_slot[0] = 0
        if keys.TEXT_LAYERS in vision:
            wanted = [stream.text_layer for stream in config.streams]
            if any(layer not in slot_of_layer for layer in wanted):
                raise ModelFileError(
                    f"'{vision.path}' makes streams for decoder layers {wanted}, but '{self.text.path}' takes them "
                    f"at {sorted(slot_of_layer)}; the two belong to different models."
                )
            slots = [slot_of_layer[layer] for layer in wanted]
        else:
            slots = list(range(len(config.streams)))
            if len(slots) != n_slots:
                raise ModelFileError(
                    f"'{vision.path}' makes {len(slots)} image streams, but '{self.text.path}' takes {n_slots}; the "
                    "two belong to different models."
                )
        return Injection(tuple(slots), tuple(layer_of_slot[slot] for slot in slots), n_slots)

    @property
    def is_cross_attending(self) -> bool:
        """Whether the decoder attends to images, in layers of the vision file, instead of taking them as rows."""
        return self.vision_config is not None and self.vision_config.cross_attention is not None

    def need_vision(self) -> None:
        """Raises ModelFileError for a model without a vision file."""
        if self.vision is None:
            raise ModelFileError(
                f"'{self.text.path}' has no vision file in its directory, so it cannot process images; give "
                "one with '--mmproj', or a model directory that contains both."
            )

    def close(self) -> None:
        for file in (self.text, self.vision, self.adapter):
            if file is not None:
                file.close()

    def __enter__(self) -> ModelFiles:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _path(value: str | Path, name: str) -> Path:
    if not isinstance(value, str | Path):
        raise TypeError(f"the path of the {name} is {value!r:.60}; expected text or a Path.")
    return Path(value)


def _optional(value: str | Path | None, name: str) -> Path | None:
    return None if value is None else _path(value, name)


def _resolve(
    path: Path, mmproj: Path | None, adapter: Path | None, left_out: list[ModelFileError]
) -> tuple[GgufFile, GgufFile | None, GgufFile | None]:
    """Opens the files to use. A directory may hold one file of each role; for a text file, its folder is searched."""
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        url = url_in(str(path))
        raise ModelFileError(
            f"'{url}' is a URL; download the model and give its directory."
            if url is not None
            else f"'{path}' does not exist; give a model directory made by 'granite4v convert', or a text GGUF file."
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ModelFileError(
            f"cannot read '{path}': {getattr(error, 'strerror', None) or error}; give a model directory made by "
            "'granite4v convert', or a text GGUF file."
        ) from None
    opened: list[GgufFile] = []

    def open_as(wanted: str, file: Path) -> GgufFile:
        gguf = GgufFile.open(file)
        opened.append(gguf)
        if keys.GENERAL_ARCHITECTURE not in gguf:
            raise ModelFileError(f"'{file}' has no key '{keys.GENERAL_ARCHITECTURE}'; {_AGAIN}.")
        if role(gguf) != wanted:
            raise ModelFileError(f"'{file}' is {ROLE_NAMES[role(gguf)]}, but {ROLE_NAMES[wanted]} is needed there.")
        return gguf

    try:
        if is_folder:
            beside = _by_role(path, left_out)
            text = open_as("text", _only(beside["text"], "text", path))
        else:
            text = open_as("text", path)
            beside = _partners(text, left_out)
        if mmproj is None and beside["vision"]:
            mmproj = _only(without_sources(beside["vision"]), "vision", path)
        if adapter is None and beside["adapter"]:
            adapter = _only(beside["adapter"], "adapter", path)
        if adapter is None and left_out and text.get(keys.PROVENANCE_ADAPTER) == "separate":
            raise left_out[0]  # the unreadable file may be the adapter that this model needs
        return (
            text,
            open_as("vision", mmproj) if mmproj is not None else None,
            open_as("adapter", adapter) if adapter is not None else None,
        )
    except BaseException:
        for gguf in opened:
            gguf.close()
        raise


_NAMES = {"text": "text model", "vision": "vision file (mmproj)", "adapter": "LoRA adapter"}
_OPTIONS = {
    "text": "give the text GGUF itself instead of the directory",
    "vision": "choose one with '--mmproj' (mmproj= in Python), or remove the others",
    "adapter": "remove all but one",
}


def _by_role(folder: Path, left_out: list[ModelFileError]) -> dict[str, list[Path]]:
    roles: dict[str, list[Path]] = {"text": [], "vision": [], "adapter": [], "other": []}
    for file in gguf_files(folder):
        if _LATER_SHARD.search(file.name):
            continue
        try:
            with GgufFile.open(file) as gguf:
                roles[role(gguf)].append(file)
        except ModelFileError as error:
            left_out.append(error)
    if left_out and not (roles["text"] and roles["vision"]):  # else unrelated to a complete model
        raise left_out[0]
    return roles


def _partners(text: GgufFile, left_out: list[ModelFileError]) -> dict[str, list[Path]]:
    """Finds vision files and adapters next to a text file that was given alone, except those of other conversions."""
    roles: dict[str, list[Path]] = {"text": [], "vision": [], "adapter": [], "other": []}
    for file in gguf_files(text.path.parent):
        if file == text.path or _LATER_SHARD.search(file.name):
            continue
        try:
            gguf = GgufFile.open(file)
        except ModelFileError as error:  # an unrelated broken file is no reason to refuse this model
            left_out.append(error)
            continue
        with gguf:
            if gguf.get(keys.PAIR_ID) == text.get(keys.PAIR_ID):
                roles[role(gguf)].append(file)
    return roles


def _only(found: list[Path], part: str, where: Path) -> Path:
    if not found:
        raise ModelFileError(
            f"'{where}' contains no {_NAMES[part]} (*.gguf); make one with 'granite4v convert', or give a text GGUF "
            "file."
        )
    if len(found) > 1:
        names = ", ".join(f"'{file.name}'" for file in found)
        raise ModelFileError(f"'{where}' contains more than one {_NAMES[part]}: {names}; {_OPTIONS[part]}.")
    return found[0]


def _check_pair(text: GgufFile, other: GgufFile) -> None:
    ours, theirs = text.get(keys.PAIR_ID), other.get(keys.PAIR_ID)
    if ours and theirs and ours != theirs:
        raise ModelFileError(
            f"'{text.path}' and '{other.path}' come from different conversions (pair ids {ours!r} and {theirs!r}); "
            "use two files of one conversion."
        )
