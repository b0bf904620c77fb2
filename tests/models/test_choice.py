"""Which files are chosen, from listings with publishers' file names."""

from __future__ import annotations

import pytest

from granite4v.errors import HubError
from granite4v.models.choice import choose
from granite4v.models.names import HubName
from granite4v.models.repository import HubFile, Repository

IBM = [
    ".gitattributes",
    "README.md",
    "config.json",
    "granite-vision-4.1-4b-Q4_K_M.gguf",
    "granite-vision-4.1-4b-Q8_0.gguf",
    "granite-vision-4.1-4b-f16.gguf",
    "mmproj-model-f16.gguf",
]
WITH_ADAPTER = [
    "granite-4.0-3b-vision-LoRA-F16.gguf",
    "granite-4.0-3b-vision-Q4_K_M.gguf",
    "mmproj-model-f16.gguf",
]
OTHERS = [
    "imatrix.gguf",
    "mmproj-BF16.gguf",
    "mmproj-F16.gguf",
    "mmproj-F32.gguf",
    "mtp-model-Q4_K_M.gguf",
    "Model.Q5_K_M.gguf",
    "model-UD-Q4_K_XL.gguf",
    "model-IQ4_NL.gguf",
]
SPLIT = [
    "BF16/model-BF16-00001-of-00002.gguf",
    "BF16/model-BF16-00002-of-00002.gguf",
    "F32/model-F32-00001-of-00003.gguf",
    "mmproj-F16.gguf",
]
OURS = ["lora-F16.gguf", "mmproj-F16.gguf", "mmproj-Q8_0.gguf", "text-IQ4_NL.gguf", "text-Q6_K.gguf"]
CHECKPOINT = [
    "README.md",
    "chat_template.jinja",
    "config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "onnx/config.json",
    "tokenizer.json",
]


def repository(paths: list[str]) -> Repository:
    files = tuple(HubFile(path, 1000 + i, f"{i:064x}", None) for i, path in enumerate(paths))
    return Repository("owner/name", "c" * 40, files)


def chosen(paths: list[str], variant: str | None = None) -> tuple[str, list[str]]:
    choice = choose(repository(paths), HubName("owner/name", variant), "Q4_K_M")
    assert not choice.is_checkpoint
    return choice.variant, [file.path for file in choice.files]


@pytest.mark.parametrize(
    ("paths", "variant", "found", "files"),
    [
        (IBM, None, "Q4_K_M", ["granite-vision-4.1-4b-Q4_K_M.gguf", "mmproj-model-f16.gguf"]),
        (IBM, "q8_0", "Q8_0", ["granite-vision-4.1-4b-Q8_0.gguf", "mmproj-model-f16.gguf"]),
        (IBM, "F16", "F16", ["granite-vision-4.1-4b-f16.gguf", "mmproj-model-f16.gguf"]),
        (
            IBM,
            "granite-vision-4.1-4b-Q8_0.gguf",
            "granite-vision-4.1-4b-Q8_0.gguf",
            ["granite-vision-4.1-4b-Q8_0.gguf", "mmproj-model-f16.gguf"],
        ),
        (
            WITH_ADAPTER,
            None,
            "Q4_K_M",
            [
                "granite-4.0-3b-vision-Q4_K_M.gguf",
                "mmproj-model-f16.gguf",
                "granite-4.0-3b-vision-LoRA-F16.gguf",
            ],
        ),
        (OTHERS, None, "Q5_K_M", ["Model.Q5_K_M.gguf", "mmproj-F16.gguf"]),
        (OTHERS, "UD-Q4_K_XL", "UD-Q4_K_XL", ["model-UD-Q4_K_XL.gguf", "mmproj-F16.gguf"]),
        (
            SPLIT,
            None,
            "BF16",
            ["BF16/model-BF16-00001-of-00002.gguf", "BF16/model-BF16-00002-of-00002.gguf", "mmproj-F16.gguf"],
        ),
        (OURS, None, "Q6_K", ["text-Q6_K.gguf", "mmproj-F16.gguf", "lora-F16.gguf"]),
        (
            ["a/m-Q8_0.gguf", "a/mmproj-Q8_0.gguf", "mmproj-F16.gguf"],
            None,
            "Q8_0",
            ["a/m-Q8_0.gguf", "a/mmproj-Q8_0.gguf"],
        ),
        (["m-Q8_0.gguf"], None, "Q8_0", ["m-Q8_0.gguf"]),
        (["model.gguf", "mmproj.gguf"], None, "model", ["model.gguf", "mmproj.gguf"]),
        (["m-Q3_K_S.gguf", "m-IQ1_S.gguf"], None, "Q3_K_S", ["m-Q3_K_S.gguf"]),  # the smallest, if none is preferred
    ],
)
def test_what_is_chosen(paths: list[str], variant: str | None, found: str, files: list[str]) -> None:
    assert chosen(paths, variant) == (found, files)


def test_a_checkpoint_is_its_small_files_and_weights_at_the_top() -> None:
    choice = choose(repository(CHECKPOINT), HubName("owner/name"), "Q4_K_M")
    assert (choice.variant, choice.is_checkpoint) == ("Q4_K_M", True)
    assert [file.path for file in choice.files] == [path for path in CHECKPOINT[1:] if path != "onnx/config.json"]
    assert choose(repository(CHECKPOINT), HubName("owner/name", "q8_0"), "Q4_K_M").variant == "Q8_0"


@pytest.mark.parametrize(
    ("paths", "variant", "message"),
    [
        (IBM, "Q5_K_M", "'owner/name' has no 'Q5_K_M'; it has: F16, Q4_K_M, Q8_0."),
        (SPLIT, "F32", "'owner/name' has no 'F32'; it has: BF16."),  # parts are missing
        (
            IBM,
            "other.gguf",
            "'owner/name' has no text model 'other.gguf'; it has: 'granite-vision-4.1-4b-Q4_K_M.gguf', ",
        ),
        (
            ["a-Q8_0.gguf", "b-Q8_0.gguf"],
            None,
            "several text models of type Q8_0; name one: 'a-Q8_0.gguf', 'b-Q8_0.gguf'.",
        ),
        (["README.md", "mmproj-F16.gguf"], None, "has neither GGUF files of a text model nor safetensors"),
        (["pytorch_model.bin", "config.json"], None, "has neither GGUF files of a text model nor safetensors"),
        (CHECKPOINT, "text-F16.gguf", "has neither GGUF files of a text model nor safetensors"),
    ],
)
def test_what_cannot_be_chosen(paths: list[str], variant: str | None, message: str) -> None:
    with pytest.raises(HubError) as caught:
        choose(repository(paths), HubName("owner/name", variant), "Q4_K_M")
    assert message in str(caught.value)
