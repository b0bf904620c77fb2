"""What is accepted as a name on the hub."""

from __future__ import annotations

import pytest

from granite4v.models import HubName, parse
from granite4v.models.names import preferred


@pytest.mark.parametrize(
    ("text", "repository", "variant"),
    [
        ("ibm-granite/granite-vision-4.1-4b-GGUF", "ibm-granite/granite-vision-4.1-4b-GGUF", None),
        ("ibm-granite/granite-vision-4.1-4b-GGUF:Q4_K_M", "ibm-granite/granite-vision-4.1-4b-GGUF", "Q4_K_M"),
        ("owner/name:q8_0", "owner/name", "q8_0"),
        ("owner/name:UD-Q4_K_XL", "owner/name", "UD-Q4_K_XL"),
        ("o/n:model-Q4_K_M.gguf", "o/n", "model-Q4_K_M.gguf"),
    ],
)
def test_names(text: str, repository: str, variant: str | None) -> None:
    name = parse(text)
    assert name == HubName(repository, variant)
    assert str(name) == text


@pytest.mark.parametrize(
    "text",
    [
        "name",
        "./owner/name",
        "../name",
        "/owner/name",
        "~/name",
        "owner/name/more",
        "owner/name.gguf",
        "owner/name:",
        "owner/name:..",
        "owner/name:a/b",
        "owner/../name",
        "owner/a..b",
        "owner/a--b",
        "-owner/name",
        "owner/.name",
        "owner/name\n",
        "öwner/name",
        f"owner/{'n' * 97}",
        "",
    ],
)
def test_what_is_no_name(text: str) -> None:
    assert parse(text) is None


def test_folders_of_different_models_differ() -> None:
    names = [HubName("a/b-c"), HubName("a-b/c"), HubName("a/b")]
    folders = {name.folder_name(variant) for name in names for variant in ("Q4_K_M", "Q8_0", "c--Q8_0")}
    assert len(folders) == 9
    assert HubName("ibm/nano-GGUF").folder_name("Q8_0") == "ibm--nano-GGUF--Q8_0"


def test_which_variant_is_preferred() -> None:
    assert preferred(["F16", "Q8_0", "Q5_K_M", "Q4_K_M"]) == "Q4_K_M"
    assert preferred(["F16", "Q8_0"]) == "Q8_0"
    assert preferred(["IQ1_S"]) is None
