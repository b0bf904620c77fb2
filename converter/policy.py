"""Chooses the quantization type of every tensor, from tables with a reason in each row.

Text: the types that llama.cpp's quantizer chooses under the same name without an importance matrix
(`src/llama-quant.cpp`, llama-cpp-python 0.3.36). Vision: what its converter writes, and K-quants. A test quantizes the
same model with llama.cpp and compares the types tensor by tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import gguf

from granite4v import gguf_keys as keys
from granite4v.errors import Granite4vError
from granite4v.families.vision_layout import ffn_block, row_padded, tensor_kind
from granite4v.ggml.quantize import block_size

TEXT_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_NL")
VISION_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0", "IQ4_NL")

# The tensor type that a policy gives to most matrices.
BASE = {name: name for name in (*TEXT_TYPES, *VISION_TYPES)} | {"Q5_K_M": "Q5_K", "Q4_K_M": "Q4_K"}
FLOATS = ("F32", "F16", "BF16")
PLAIN = (*FLOATS, "Q8_0")
QUANTIZED = ("Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_NL")
K_MIXES = ("Q5_K_M", "Q4_K_M")

# For row lengths that are not a multiple of 256; if they are not a multiple of 32 either, the tensor becomes F16.
FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}

# Names in gguf.LlamaFileType; the other types are MOSTLY_<name>.
ENUM_NAMES = {"F32": "ALL_F32", "Q5_K": "MOSTLY_Q5_K_S", "Q4_K": "MOSTLY_Q4_K_S"}


@dataclass(frozen=True)
class TextShape:
    """What the text policy needs to know about a decoder. `tied`: the token embedding is also the output head."""

    n_layers: int
    n_gqa: int
    tied: bool


@dataclass(frozen=True)
class Choice:
    """A tensor's type and the reason for it. `forced`: its row length ruled out the preferred type."""

    type_name: str
    reason: str
    forced: bool = False


@dataclass(frozen=True)
class Row:
    """One row of a table; the first that matches decides. `type_name`: None is the policy's base type."""

    policies: tuple[str, ...]
    kind: str
    layers: str
    type_name: str | None
    reason: str
    min_gqa: int = 1


# fmt: off
TEXT_TABLE = (
    # policies           tensor      layers          type    reason
    Row(TEXT_TYPES,      "vector",   "all",          "F32",  "a vector or norm: small, and no matrix product"),
    Row(TEXT_TYPES,      "router",   "all",          "F32",  "small, and it decides which experts a token gets"),
    Row(PLAIN,           "any",      "all",          None,   "every matrix in the type asked for"),
    Row(QUANTIZED,       "output",   "all",          "Q6_K", "output head, or tied to it: it decides every token"),
    Row(K_MIXES,         "attn_v",   "more_bits",    "Q6_K", "values of outer and every third layer: sensitive"),
    Row(("IQ4_NL",),     "attn_v",   "all",          "Q5_K", "few value heads for many queries: cheap to keep", 4),
    Row(K_MIXES,         "ffn_down", "more_bits",    "Q6_K", "down of outer and every third layer: sensitive"),
    Row(("IQ4_NL",),     "ffn_down", "first_eighth", "Q5_K", "errors of the first layers travel furthest"),
    Row(QUANTIZED,       "any",      "all",          None,   "every other matrix in the type asked for"),
)
VISION_TABLE = (
    Row(VISION_TYPES,    "vector",   "all",          "F32",  "a vector, norm, position or query: only added"),
    Row(("F16",),        "patch",    "all",          "F16",  "patches: libmtmd's convolution takes F16 or F32"),
    Row(VISION_TYPES,    "patch",    "all",          "F32",  "patches: libmtmd's convolution takes F16 or F32"),
    Row(VISION_TYPES,    "any",      "all",          None,   "every matrix in the type asked for"),
)
# fmt: on

TEXT_KINDS = {
    keys.OUTPUT: "output",
    "attn_v.weight": "attn_v",
    "ffn_down.weight": "ffn_down",
    keys.EXPERTS.format(part="down"): "ffn_down",
    keys.SHARED_EXPERT.format(part="down"): "ffn_down",
    keys.ROUTER: "router",
}
LAYER = keys.pattern_of(keys.TEXT_BLOCK, i=r"\d+", part=r".*")


def text_type(name: str, shape: tuple[int, ...], policy: str, model: TextShape) -> Choice:
    """Chooses the type of a text tensor with this GGUF name and NumPy-order shape."""
    match = LAYER.fullmatch(name)
    layer, part = (int(match.group(1)), match.group(2)) if match else (0, name)
    if len(shape) < 2 or part.endswith("_norm.weight"):
        kind = "vector"
    elif name == keys.TOKEN_EMBD and model.tied:
        kind = "output"
    else:
        kind = TEXT_KINDS.get(part, "any")
    for row in TEXT_TABLE:
        fits = policy in row.policies and row.kind in (kind, "any") and model.n_gqa >= row.min_gqa
        if fits and _in_layers(row.layers, layer, model.n_layers):
            return _whole_blocks(Choice(row.type_name or BASE[policy], row.reason), shape)
    raise AssertionError(f"no row of the text table fits '{name}' in {policy}")


def vision_type(name: str, shape: tuple[int, ...], policy: str) -> Choice:
    """Chooses the type of an mmproj tensor with this GGUF name and NumPy-order shape."""
    kind = tensor_kind(name, shape)
    for row in VISION_TABLE:
        if policy in row.policies and row.kind in (kind, "any"):
            choice = Choice(row.type_name or BASE[policy], row.reason)
            return _whole_blocks(choice, row_padded(shape, choice.type_name))
    raise AssertionError(f"no row of the vision table fits '{name}' in {policy}")


def vision_block(policy: str) -> int:
    """The block size to whose multiple the feed-forward widths of a vision file are padded."""
    return ffn_block(BASE[policy])


def adapter_type(text_policy: str) -> str:
    """The type of a separate adapter's matrices: never quantized, since rows as short as the rank hold no block."""
    return text_policy if text_policy in FLOATS else "F16"


def check_policies(text: str, vision: str) -> tuple[str, str]:
    """Returns both names in upper case; raises Granite4vError for an unknown one, with a list of the known ones."""
    return _check_type(text, TEXT_TYPES, "--text-type"), check_vision_type(vision)


def check_vision_type(given: str) -> str:
    """Returns the name in upper case; raises Granite4vError for an unknown one, with a list of the known ones."""
    return _check_type(given, VISION_TYPES, "--vision-type")


def _check_type(given: str, known: tuple[str, ...], option: str) -> str:
    if given.upper() not in known:
        raise Granite4vError(f"unknown quantization type '{given}' for {option}; known: {', '.join(known)}.")
    return given.upper()


def file_type(policy: str) -> int:
    """llama.cpp's value of `general.file_type` for a type policy."""
    return int(gguf.LlamaFileType[ENUM_NAMES.get(policy, f"MOSTLY_{policy}")])


def _in_layers(which: str, layer: int, n_layers: int) -> bool:
    """Whether a table's `layers` entry covers a layer. 'more_bits' of 40 layers: 0-4, 7, 10, ..., 34 and 35-39."""
    eighth = n_layers // 8
    if which == "more_bits":
        return layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2
    if which == "first_eighth":
        return layer < eighth
    return True


def _whole_blocks(choice: Choice, shape: tuple[int, ...]) -> Choice:
    """Returns the same choice, or one with a fallback type whose blocks divide the row."""
    width = shape[-1]
    if width % block_size(choice.type_name) == 0:
        return choice
    other = FALLBACK.get(choice.type_name, choice.type_name)
    if width % block_size(other):
        other = "F16"
    return Choice(other, f"rows of {width} are not whole blocks of {choice.type_name}", forced=True)
