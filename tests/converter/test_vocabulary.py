"""The tokenizer as written for llama.cpp: pre-tokenizer names, token types, special ids, merges, template."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from granite4v.converter import Options, convert
from granite4v.converter.vocabulary import vocabulary_metadata
from granite4v.errors import CheckpointError
from tests.peers.llama import LlamaPeer
from tests.toy.checkpoint import PRESETS, CheckpointSpec
from tests.toy.language import SPLIT_PATTERN, build_tokenizer, write_language_files

NUMBERS = "1234567890 12345 12 2024-00317 1,284.50 0xff 3.14159"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with language files only, which a test may change."""
    write_language_files(tmp_path, build_tokenizer())
    return tmp_path


def metadata(folder: Path, n_vocab: int = 406, **config: Any) -> tuple[dict[str, Any], list[str]]:
    return vocabulary_metadata(folder, {}, config, n_vocab)


def change_tokenizer(folder: Path, **changes: Any) -> dict[str, Any]:
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(tokenizer))
    return tokenizer


def split(pattern: str) -> dict[str, Any]:
    steps = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]
    return {"type": "Sequence", "pretokenizers": steps}


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SEQUENCE = {"Sequence": {"id": "A", "type_id": 0}}


def template_processing(*single: dict[str, Any]) -> dict[str, Any]:
    special = {"<|pad|>": {"id": "<|pad|>", "ids": [0], "tokens": ["<|pad|>"]}}
    return {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special}


DIGITS = {"type": "Digits", "individual_digits": True}


@pytest.mark.parametrize(
    ("pre_tokenizer", "name"),
    [
        (split(SPLIT_PATTERN), "dbrx"),
        (split(SPLIT_PATTERN.replace("{1,3}", "")), "qwen2"),
        (BYTE_LEVEL, "gpt-2"),
        ({"type": "Sequence", "pretokenizers": [DIGITS, BYTE_LEVEL]}, "refact"),
    ],
)
def test_llama_cpp_splits_as_the_tokenizer_does(
    pre_tokenizer: dict[str, Any], name: str, make_checkpoint: Callable[[CheckpointSpec], Path], tmp_path: Path
) -> None:
    import shutil

    from tokenizers import Tokenizer

    source = shutil.copytree(make_checkpoint(PRESETS["tiny"]), tmp_path / "source")
    change_tokenizer(source, pre_tokenizer=pre_tokenizer)
    summary = convert(source, tmp_path / "out", Options("F32", "F16"))
    assert summary.plan.files[0].metadata["tokenizer.ggml.pre"] == name
    assert summary.plan.warnings == ()
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    with LlamaPeer(summary.paths[0]) as peer:
        for text in (NUMBERS, "a  b\n\n c's DON'T", "übermäßig   東京\t\n"):
            assert peer.tokenize(text) == tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(("pattern", "nearest"), [(r"\p{N}{1,3}|\p{L}+|.", "dbrx"), (r"\p{L}+|.", "gpt-2")])
def test_a_split_that_llama_cpp_does_not_know_is_named_and_warned_of(pattern: str, nearest: str, folder: Path) -> None:
    change_tokenizer(folder, pre_tokenizer=split(pattern))
    found, warnings = metadata(folder)
    assert found["tokenizer.ggml.pre"] == nearest
    assert "llama.cpp has no pre-tokenizer for" in warnings[0]


def test_ids_that_the_tokenizer_leaves_out_are_unused(folder: Path) -> None:
    found, _ = metadata(folder, n_vocab=410)
    assert found["tokenizer.ggml.tokens"][405:] == ["<image>", "[PAD406]", "[PAD407]", "[PAD408]", "[PAD409]"]
    assert found["tokenizer.ggml.token_type"][405:] == [3, 5, 5, 5, 5]


def test_merges_may_be_pairs_or_strings(folder: Path) -> None:
    pairs, _ = metadata(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    assert isinstance(tokenizer["model"]["merges"][0], list)
    tokenizer["model"]["merges"] = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    change_tokenizer(folder, model=tokenizer["model"])
    strings, _ = metadata(folder)
    assert pairs["tokenizer.ggml.merges"] == strings["tokenizer.ggml.merges"]
    assert all(merge.count(" ") == 1 for merge in pairs["tokenizer.ggml.merges"])


def test_special_ids_come_from_tokenizer_config_then_from_config(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["eos_token"] = {"content": "<|end_of_role|>"}
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    found, _ = metadata(folder, eos_token_id=[1, 2], pad_token_id=[7, 8], mask_token_id=9999)
    assert found["tokenizer.ggml.eos_token_id"] == found["tokenizer.ggml.tokens"].index("<|end_of_role|>")
    assert found["tokenizer.ggml.padding_token_id"] == 7
    assert "tokenizer.ggml.mask_token_id" not in found


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (["end", 1, 3], None, {"eot": 1, "eom": 3}),
        ([1, "end"], [4, 5], {"eot": 1}),  # generation_config.json has precedence
        (None, ["end", 5], {"eot": 5}),
        ("end", [4, 5], {}),
        (["end", 9999, True], None, {}),
    ],
)
def test_all_tokens_that_end_an_answer_are_written(
    generation: Any, config: Any, expected: dict[str, int], folder: Path
) -> None:
    end = metadata(folder)[0]["tokenizer.ggml.eos_token_id"]

    def ids(value: Any) -> Any:
        return json.loads(json.dumps(value).replace('"end"', str(end)))

    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids(generation)}))
    found, warnings = metadata(folder, eos_token_id=ids(config))
    ends = {name: found.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom")}
    assert {name: token for name, token in ends.items() if token is not None} == expected
    assert warnings == [] and found["tokenizer.ggml.eos_token_id"] == end


def test_more_ends_than_a_file_has_room_for_are_named(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2, 3, 4, 5]}))
    _, warnings = metadata(folder)
    assert "answers do not end at the tokens" in warnings[0] and "room for three" in warnings[0]


@pytest.mark.parametrize(
    ("post_processor", "setting", "expected"),
    [
        (None, False, False),
        (None, True, True),
        (BYTE_LEVEL, True, False),
        (template_processing({"SpecialToken": {"id": "<|pad|>", "type_id": 0}}, SEQUENCE), False, True),
        ({"type": "Sequence", "processors": [BYTE_LEVEL, template_processing(SEQUENCE)]}, True, False),
    ],
)
def test_whether_text_begins_with_a_special_token(
    post_processor: dict[str, Any] | None, setting: bool, expected: bool, folder: Path
) -> None:
    change_tokenizer(folder, post_processor=post_processor)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"add_bos_token": setting}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert metadata(folder)[0]["tokenizer.ggml.add_bos_token"] is expected


def put_templates(folder: Path, **templates: Any) -> None:
    """Writes templates to the places that the keywords name, the tokenizer's in tokenizer_config.json; removes all
    others."""
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    if "tokenizer" in templates:
        settings["chat_template"] = templates["tokenizer"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    processor = {"processor_class": "LlavaNextProcessor", "image_token": "<image>", "patch_size": 14}
    if "processor" in templates:
        processor["chat_template"] = templates["processor"]
    (folder / "processor_config.json").write_text(json.dumps(processor))
    if "json" in templates:
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": templates["json"]}))
    if "jinja" in templates:
        (folder / "chat_template.jinja").write_text(templates["jinja"])
    for name, text in templates.get("additional", {}).items():
        (folder / "additional_chat_templates").mkdir(exist_ok=True)
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(text)


OF_PROCESSORS: dict[str, tuple[dict[str, Any], str]] = {
    "processor_config.json first": (
        {"processor": "P", "json": "J", "jinja": "F", "additional": {}, "tokenizer": "T"},
        "P",
    ),
    "then chat_template.json": ({"json": "J", "jinja": "F", "tokenizer": "T"}, "J"),
    "then chat_template.jinja": ({"jinja": "F", "tokenizer": "T"}, "F"),
    "beside others by name": ({"jinja": "F", "additional": {"rag": "R"}, "tokenizer": "T"}, "F"),
    "several by name": ({"processor": {"default": "D", "rag": "R"}, "tokenizer": "T"}, "D"),
    "the default among the others": ({"additional": {"default": "D", "rag": "R"}, "tokenizer": "T"}, "D"),
}


@pytest.mark.parametrize("case", OF_PROCESSORS)
def test_the_chat_template_is_the_one_of_transformers_processor(case: str, folder: Path) -> None:
    from transformers import LlavaNextProcessor

    templates, expected = OF_PROCESSORS[case]
    put_templates(folder, **templates)
    values, _ = LlavaNextProcessor.get_processor_dict(folder)
    theirs = values["chat_template"]
    assert (theirs["default"] if isinstance(theirs, dict) else theirs) == expected
    found, warnings = metadata(folder)
    assert found["tokenizer.chat_template"] == expected
    assert warnings == []


@pytest.mark.parametrize(
    ("template", "expected"),
    [("plain", "plain"), ([{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}], "d"), (None, None)],
)
def test_the_tokenizers_chat_template_comes_last(template: Any, expected: str | None, folder: Path) -> None:
    put_templates(folder, tokenizer=template)
    found, warnings = metadata(folder)
    assert found.get("tokenizer.chat_template") == expected
    assert bool(warnings) == (expected is None)


def test_a_template_with_the_line_ends_of_another_system(folder: Path) -> None:
    from transformers import LlavaNextProcessor

    put_templates(folder)
    (folder / "chat_template.jinja").write_bytes(b"{{ 'a' }}\r\nb\rc\n")
    expected = LlavaNextProcessor.get_processor_dict(folder)[0]["chat_template"]
    assert metadata(folder)[0]["tokenizer.chat_template"] == expected


def test_templates_without_a_default_are_named(folder: Path) -> None:
    put_templates(folder, tokenizer=[{"name": "rag", "template": "r"}, {"name": "tool_use", "template": "t"}])
    found, warnings = metadata(folder)
    assert "tokenizer.chat_template" not in found
    assert "no chat template named 'default', only 'rag', 'tool_use'" in warnings[0]


def without_image_token(folder: Path) -> int:
    """Removes the image token from tokenizer.json; returns its id."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (image,) = [entry["id"] for entry in tokenizer["added_tokens"] if entry["content"] == "<image>"]
    others = [entry for entry in tokenizer["added_tokens"] if entry["id"] != image]
    tokenizer["model"]["vocab"].pop("<image>", None)
    change_tokenizer(folder, added_tokens=others, model=tokenizer["model"])
    return int(image)


@pytest.mark.parametrize("place", ["tokenizer_config.json", "added_tokens.json"])
def test_a_token_that_only_another_file_has(place: str, folder: Path) -> None:
    """The same as transformers does with the folder: the token is split off in text."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    image = without_image_token(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    entry = {"content": "<image>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}
    if place == "added_tokens.json":
        (folder / place).write_text(json.dumps({"<image>": image}))
    settings["added_tokens_decoder"] = {str(image): entry}  # transformers 5 reads only this
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = AutoTokenizer.from_pretrained(folder)
    if place == "added_tokens.json":
        del settings["added_tokens_decoder"]
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    found, warnings = vocabulary_metadata(folder, {}, {}, image + 1, image)
    assert warnings == []
    assert found["tokenizer.ggml.tokens"][image] == "<image>"
    assert found["tokenizer.ggml.token_type"][image] in (3, 4)
    ours = Tokenizer.from_str(found["tokenizer.huggingface.json"])
    text = "a <image> b<image>"
    assert ours.encode(text, add_special_tokens=False).ids == theirs(text, add_special_tokens=False).input_ids
    assert ours.encode("<image>", add_special_tokens=False).ids == [image]


def test_an_image_token_that_no_file_has_is_warned_of(folder: Path) -> None:
    image = without_image_token(folder)
    _, warnings = vocabulary_metadata(folder, {}, {}, image + 1, image)
    assert f"token {image} stands for an image, but neither" in warnings[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["model"]["vocab"].update({"aa": -1}), "token 'aa' has the id -1; expected an integer from 0"),
        (lambda t: t["model"]["vocab"].update({"aa": "4"}), "token 'aa' has the id '4'"),
        (lambda t: t["model"].update(merges=[["a"]]), "'model.merges' is "),
        (lambda t: t["model"].update(merges=7), "'model.merges' is 7; expected a list of pairs of texts"),
        (lambda t: t.update(added_tokens=[{"id": 1}]), "'added_tokens' is "),
        (lambda t: t.update(pre_tokenizer=[1]), "'pre_tokenizer' is [1]; expected a section"),
        (lambda t: t.update(normalizer={"type": "Sequence", "normalizers": 3}), "'normalizer.normalizers' is 3"),
        (lambda t: t["model"]["merges"].append(["qq", "zz"]), "cannot be read by the tokenizers package: "),
    ],
)
def test_a_tokenizer_with_parts_of_other_types(
    change: Callable[[dict[str, Any]], Any], message: str, folder: Path
) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    change(tokenizer)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError) as caught:
        metadata(folder)
    assert message in str(caught.value)
    assert "tokenizer.json'" in str(caught.value)


def test_a_tokenizer_of_another_kind_is_refused(folder: Path) -> None:
    change_tokenizer(folder, model={"type": "Unigram", "vocab": [["a", 0.0]]})
    with pytest.raises(CheckpointError, match="holds a 'Unigram' tokenizer; only byte-level BPE"):
        metadata(folder)


def test_two_ids_for_one_text_are_refused(folder: Path) -> None:
    """llama.cpp would abort the process on a file with them."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"][-1]["content"] = "<|pad|>"
    change_tokenizer(folder, added_tokens=tokenizer["added_tokens"])
    with pytest.raises(CheckpointError, match=r"gives more than one id to '<\|pad\|>'"):
        metadata(folder)
