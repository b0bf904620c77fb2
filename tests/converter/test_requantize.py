"""A vision file in another weight type: the same as a conversion gives, whoever made the file, or a message and no
file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from granite4v.clip_projector import VisionEncoder, load_image
from granite4v.converter import Options, convert, policy, requantize
from granite4v.errors import Granite4vError, ModelFileError, OutputError
from granite4v.runtime.llama.files import ModelFiles
from tests.helpers.gguf_edit import copy_gguf, older_layout, tensor_bytes, unpadded
from tests.helpers.pictures import noise_picture
from tests.peers.reference import relative_l2
from tests.toy.checkpoint import PRESETS, CheckpointSpec

HALF = replace(PRESETS["tiny"], dtype="float16")
MADE_NEW = {
    "general.file_type",
    "granite4v.quantization_policy",
    "granite4v.version",
    "granite4v.requantized_from",
    "granite4v.requantized_from_type",
    "clip.vision.feed_forward_length",
}


@pytest.fixture
def folder(make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path: Path) -> Path:
    """A model with a half-precision vision file."""
    convert(make_checkpoint(HALF), tmp_path / "model", Options("F32", "F16"))
    return tmp_path / "model"


def fields(path: Path) -> Mapping[str, Any]:
    """Returns metadata with their types."""
    read = gguf.GGUFReader(path).fields
    return {key: (field.types, field.contents()) for key, field in read.items() if not key.startswith("GGUF.")}


def streams(path: Path) -> np.ndarray:
    with VisionEncoder(path, device="cpu", n_threads=2) as encoder:
        return encoder.encode([load_image(noise_picture((150, 100)))])[0].streams.copy()


def test_half_precision_weights_give_what_a_conversion_gives(
    folder: Path, make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path: Path
) -> None:
    source = folder / "mmproj-F16.gguf"
    theirs = unpadded(source, tmp_path / "mmproj-model-f16.gguf", HALF.vision_ffn)
    for kind in policy.VISION_TYPES:
        if kind == "F16":
            continue
        convert(make_checkpoint(HALF), tmp_path / kind, Options("F32", kind))
        expected = tensor_bytes(tmp_path / kind / f"mmproj-{kind}.gguf")
        assert tensor_bytes(requantize(source, kind, tmp_path)) == expected, kind
        if kind not in policy.FLOATS:  # float types keep the width of the source
            other = requantize(theirs, kind)
            assert other.name == f"mmproj-model-{kind}.gguf"
            assert tensor_bytes(other) == expected, kind


def test_metadata_stay_with_their_types_but_for_where_the_file_comes_from(folder: Path) -> None:
    source = folder / "mmproj-F16.gguf"
    extra = copy_gguf(source, folder / "extra.gguf", change={"general.name": "another name"})
    before, after = fields(extra), fields(requantize(extra, "Q6_K", folder.parent))
    assert {key: value for key, value in after.items() if key not in MADE_NEW} == {
        key: value for key, value in before.items() if key not in MADE_NEW
    }
    found = {key: after[key][1] for key in MADE_NEW}
    assert found["general.file_type"] == policy.file_type("Q6_K")
    assert found["granite4v.quantization_policy"] == "Q6_K"
    assert (found["granite4v.requantized_from"], found["granite4v.requantized_from_type"]) == ("extra.gguf", "F16")
    assert (before["clip.vision.feed_forward_length"][1], found["clip.vision.feed_forward_length"]) == (224, 256)


def test_files_of_llama_cpps_older_converter(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """These files have swapped feed-forward names, and positions in half precision."""
    spec = replace(PRESETS["tiny-granite-3.3"], vision_ffn=200)
    source = older_layout(make_model(spec) / "mmproj-F32.gguf", tmp_path / "mmproj-model-f16.gguf", spec)
    for kind, nearness in (("Q8_0", 0.03), ("Q6_K", 0.08)):
        assert 0 < relative_l2(streams(requantize(source, kind)), streams(source)) < nearness


def test_q8_0_files_may_be_quantized_further(folder: Path, tmp_path: Path) -> None:
    eight = requantize(folder, "Q8_0")
    four = requantize(eight, "Q4_K", tmp_path / "four.gguf")
    expected = {}
    for tensor in gguf.GGUFReader(eight).tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0:
            expected[tensor.name] = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    for tensor in gguf.GGUFReader(four).tensors:
        if tensor.name in expected:
            values, rows = gguf.quants.dequantize(tensor.data, tensor.tensor_type), expected[tensor.name]
            assert relative_l2(values[: rows.shape[0], : rows.shape[1]], rows) < 0.1
            assert not values[rows.shape[0] :].any() and not values[:, rows.shape[1] :].any()


def test_the_runtime_takes_the_requantized_file(folder: Path, tmp_path: Path) -> None:
    new = requantize(folder, "Q8_0")
    for path in (folder, folder / "text-F32.gguf"):
        with ModelFiles.open(path) as files:
            assert files.vision is not None and files.vision.path == new
    with ModelFiles.open(folder, mmproj=folder / "mmproj-F16.gguf") as files:
        assert files.vision is not None and files.vision.path.name == "mmproj-F16.gguf"
    requantize(folder, "Q6_K", tmp_path).rename(folder / "mmproj-Q6_K.gguf")
    several = r"more than one .*: 'mmproj-Q6_K.gguf', 'mmproj-Q8_0.gguf'; .* '--mmproj' \(mmproj= in Python\)"
    with pytest.raises(ModelFileError, match=several):
        ModelFiles.open(folder)


def test_a_model_keeps_one_vision_file_that_fits(folder: Path, tmp_path: Path) -> None:
    """A second file of one source, and one of another model, are not written; one made from the other is."""
    eight = requantize(folder, "Q8_0")
    four = requantize(eight, "Q4_K")  # drops both of its sources
    with ModelFiles.open(folder) as files:
        assert files.vision is not None and files.vision.path == four
    before = sorted(folder.iterdir())
    source = requantize(folder, "BF16", tmp_path)
    for arguments in ((folder, "Q6_K"), (source, "Q6_K", folder), (source, "Q6_K", folder / "other.gguf")):
        with pytest.raises(OutputError, match="'.*model' contains 'mmproj-Q4_K.gguf' already; with '.*' beside it"):
            requantize(*arguments)
    assert sorted(folder.iterdir()) == before
    requantize(source, "Q6_K"), requantize(source, "Q8_0")  # no model there
    requantize(eight, "Q4_K", force=True)
    four.unlink(), eight.unlink(), copy_gguf(folder / "mmproj-F16.gguf", folder / "a.gguf")
    copy_gguf(folder / "mmproj-F16.gguf", folder / "b.gguf")
    requantize(folder / "a.gguf", "Q8_0")  # such a folder needs `mmproj` anyway


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    source, text = folder / "mmproj-F16.gguf", folder / "text-F32.gguf"
    six = requantize(folder, "Q6_K")
    cases: list[tuple[type[Exception], str, tuple[Any, ...]]] = [
        (ModelFileError, "were rounded to Q6_K before; in Q4_K they would keep that error", (six, "Q4_K")),
        (ModelFileError, "all matrices of '.*' are F16 already", (source, "F16")),
        (ModelFileError, "is a text model; give a vision file", (text, "Q8_0")),
        (ModelFileError, "contains no vision file", (tmp_path, "Q8_0")),
        (ModelFileError, "cannot read '.*absent'", (tmp_path / "absent", "Q8_0")),
        (OutputError, "mmproj-Q6_K.gguf' exists; give another file with --out, or --force", (folder, "Q6_K")),
        (OutputError, "mmproj-F16.gguf' is the file to read", (source, "Q8_0", source)),
        (OutputError, "cannot write", (source, "Q8_0", tmp_path / "no" / "such.gguf")),
        (Granite4vError, "unknown quantization type 'Q3_K' for --vision-type", (source, "Q3_K")),
    ]
    before = sorted(folder.iterdir())
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            requantize(*arguments)
    assert sorted(folder.iterdir()) == before
    old = six.read_bytes()
    requantize(folder, "Q6_K", force=True)
    assert six.read_bytes() == old
    copy_gguf(source, folder / "mmproj-other.gguf")
    with pytest.raises(ModelFileError, match="more than one vision file: 'mmproj-F16.gguf', 'mmproj-other.gguf'"):
        requantize(folder, "Q8_0")


def test_an_interrupt_leaves_nothing_and_keeps_what_was_there(folder: Path) -> None:
    target = requantize(folder, "Q8_0")
    before, names = target.read_bytes(), sorted(folder.iterdir())

    def interrupt(progress: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        requantize(folder, "Q8_0", force=True, progress=interrupt)
    assert target.read_bytes() == before and sorted(folder.iterdir()) == names
