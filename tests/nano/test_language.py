"""Nano's tokenizer and template, and its text corpus."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import gguf
import pytest

from granite4v.converter.vocabulary import vocabulary_metadata
from granite4v.errors import PromptError
from granite4v.runtime.prompt.template import ChatTemplate
from granite4v.runtime.prompt.tokenizer import HfTokenizer, LlamaTokenizer
from scripts.nano import corpus, formats, language
from scripts.nano.language import END_OF_TEXT, IMAGE
from scripts.nano.truth import Cell, Table
from tests.helpers.nano_truths import FORM, N_SAMPLES, TABLE, tables

# --- the tokenizer ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nano")
    language.write_language_files(path)
    return path


@pytest.fixture(scope="module")
def ours(folder: Path) -> HfTokenizer:
    return HfTokenizer((folder / "tokenizer.json").read_text(encoding="utf-8"), folder, END_OF_TEXT)


@pytest.fixture(scope="module")
def llama(folder: Path) -> Iterator[LlamaTokenizer]:
    """llama.cpp's tokenizer on a GGUF file with only the vocabulary."""
    found, warnings = vocabulary_metadata(folder, {}, {}, language.build_tokenizer().n_vocab)
    assert warnings == []
    writer = gguf.GGUFWriter(folder / "vocabulary.gguf", "granite")
    add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
    for key, value in found.items():
        add[type(value)](key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokenizer = LlamaTokenizer(folder / "vocabulary.gguf")
    yield tokenizer
    tokenizer.close()


def samples() -> Iterator[str]:
    rng = Random(3)
    yield from (formats.otsl(TABLE), formats.html(TABLE), formats.tables_json(TABLE), formats.form_json(FORM))
    for _ in range(N_SAMPLES):
        yield from corpus.text_example(rng)
        yield corpus.plain_text(rng)


def noise() -> Iterator[str]:
    rng = Random(4)
    for characters in ("".join(map(chr, range(1, 127))), "aé東🧾 \n\t1Ж\u00a0"):
        for _ in range(N_SAMPLES):
            yield "".join(rng.choice(characters) for _ in range(40))


def test_decoding_undoes_encoding(ours: HfTokenizer) -> None:
    for text in (*samples(), *noise()):
        assert ours.decode(ours.encode(text)) == text


def test_llama_cpp_and_transformers_see_the_same_tokens(ours: HfTokenizer, llama: LlamaTokenizer, folder: Path) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(folder)
    template = ChatTemplate(language.CHAT_TEMPLATE)
    prompt = template.render(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "<tables_otsl>"}]}]
    )
    for text in (prompt, *samples(), *noise()):
        ids = ours.encode(text)
        assert llama.encode(text) == ids == reference(text).input_ids
        assert llama.decode(ids) == ours.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def test_letters_and_digits_are_never_joined(ours: HfTokenizer) -> None:
    rng = Random(5)
    for _ in range(N_SAMPLES):
        text = corpus.sentences(rng)
        tokens = [ours.decode([i]) for i in ours.encode(text)]
        assert [token for token in tokens if len(token) > 1 and not token.isspace()] == []
    assert len(ours.encode("12345 abc")) == 9


def test_the_vocabulary_is_small_and_its_special_tokens_are_last(folder: Path) -> None:
    built = language.build_tokenizer()
    tokens = built.tokenizer_json["added_tokens"]
    assert built.n_vocab % 32 == 0 and built.n_vocab <= 512
    assert [token["id"] for token in tokens] == list(range(260, built.n_vocab))
    assert len(built.tokenizer_json["model"]["vocab"]) == 260
    special = {token["content"]: token["id"] for token in tokens if token["special"]}
    assert (special["<|pad|>"], special[END_OF_TEXT], special[IMAGE]) == (
        built.pad_id,
        built.end_of_text_id,
        built.image_id,
    )
    assert built.image_id == built.n_vocab - 1 and min(special.values()) == built.pad_id
    assert json.loads((folder / "tokenizer_config.json").read_text())["eos_token"] == END_OF_TEXT


def test_the_vocabulary_is_the_one_that_weights_were_trained_with() -> None:
    """The pieces come from `formats`: a changed prompt or format renumbers them and requires new weights."""
    texts = [token["content"] for token in language.build_tokenizer().tokenizer_json["added_tokens"]]
    assert hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16] == "046715226daff838"


def test_what_the_formats_repeat_costs_few_tokens(ours: HfTokenizer) -> None:
    cells = tuple(Cell(i, j, "ab", header=i == 0) for i in range(3) for j in range(3))
    table = Table(3, 3, 1, cells)
    assert len(ours.encode(formats.otsl(table))) == 2 + 3 + 9 * (1 + 2)
    assert len(ours.encode(formats.html(table))) == 1 + 9 * (1 + 2)
    assert len(ours.encode(formats.tables_json(table))) <= 9 + 9 * (5 + 2)
    names = [name for name, _ in FORM.fields]
    fixed = len(ours.encode(formats.kvp_prompt(formats.form_schema(FORM)))) - sum(map(len, names))
    assert fixed <= 20


def test_length_is_estimated_without_the_tokenizer(ours: HfTokenizer) -> None:
    for text in samples():
        n_spaces = sum(len(spaces) for spaces in re.findall("  +", text))
        assert len(ours.encode(text)) <= corpus.n_tokens(text) <= len(ours.encode(text)) + n_spaces


# --- the template ---


def turn(role: str, *parts: str | dict[str, str]) -> dict[str, Any]:
    return {"role": role, "content": [p if isinstance(p, dict) else {"type": "text", "text": p} for p in parts]}


PICTURE = {"type": "image"}
SYSTEM = f"<|start_of_role|>system<|end_of_role|>{formats.DEFAULT_SYSTEM}{END_OF_TEXT}\n"
OTSL = formats.TASK_PROMPTS["<tables_otsl>"]
RENDERED = {
    "text": ([turn("user", "Hello")], "Hello"),
    "picture": ([turn("user", PICTURE, "What?")], f"{IMAGE}\nWhat?"),
    "tag": ([turn("user", PICTURE, "<tables_otsl>")], f"{IMAGE}\n{OTSL}"),
    "tag and text": ([turn("user", PICTURE, "only the first: <tables_otsl>")], f"{IMAGE}\n{OTSL}"),
    "tag before picture": ([turn("user", "<tables_otsl>", PICTURE)], f"{IMAGE}\n{OTSL}"),
    "first of two tags": ([turn("user", "<tables_otsl> <chart2csv>")], OTSL),
    "tag and two pictures": ([turn("user", PICTURE, PICTURE, "<tables_otsl>")], f"{IMAGE}\n{IMAGE}\n{OTSL}"),
    "string": ([{"role": "user", "content": "Hello"}], "Hello"),
}


@pytest.mark.parametrize("name", RENDERED)
def test_template_as_transformers_renders_it(folder: Path, name: str) -> None:
    from transformers import AutoTokenizer

    messages, user = RENDERED[name]
    rendered = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert rendered == (
        f"{SYSTEM}<|start_of_role|>user<|end_of_role|>{user}{END_OF_TEXT}\n<|start_of_role|>assistant<|end_of_role|>"
    )
    template = ChatTemplate(language.CHAT_TEMPLATE)
    if name == "tag and text":
        with pytest.raises(PromptError, match="beside other text"):
            template.render(messages)
    elif name != "string":
        assert template.render(messages) == rendered


def test_a_prompt_is_few_tokens(ours: HfTokenizer) -> None:
    rendered = ChatTemplate(language.CHAT_TEMPLATE).render([turn("user", PICTURE, "<tables_otsl>")])
    assert len(ours.encode(rendered)) == 11


# --- the corpus ---


def test_the_same_seed_gives_the_same_corpus() -> None:
    assert [corpus.text_example(Random(9)) for _ in range(2)] == [corpus.text_example(Random(9))] * 2
    assert corpus.plain_text(Random(9)) == corpus.plain_text(Random(9))


def test_random_tables_cover_their_grid_once() -> None:
    seen = set()
    for table in tables():
        slots = [
            (i, j)
            for cell in table.cells
            for i in range(cell.row, cell.row + cell.rowspan)
            for j in range(cell.col, cell.col + cell.colspan)
        ]
        assert sorted(slots) == [(i, j) for i in range(table.n_rows) for j in range(table.n_cols)]
        assert [*table.cells] == sorted(table.cells, key=lambda cell: (cell.row, cell.col))
        seen |= {(cell.rowspan > 1, cell.colspan > 1, cell.text == "") for cell in table.cells}
    assert {(True, False, False), (False, True, False), (False, False, True)} <= seen


def test_answers_can_be_copied_from_their_page() -> None:
    """What a reader needs is there: every value of a table or form is on the page of text."""
    rng = Random(11)
    for _ in range(N_SAMPLES):
        table = corpus.random_table(rng)
        page = corpus.table_page(rng, table)
        assert all(cell.text in page for cell in table.cells)
        assert (corpus.RULE in page.splitlines()) == (table.n_header_rows > 0)
        form = corpus.random_form(rng)
        page = corpus.form_page(rng, form)
        assert all(value in page for _, value in form.fields if value is not None)


def test_an_example_by_hand() -> None:
    rng = Random(0)
    page = corpus.table_page(rng, TABLE)
    assert page == "| |Price & tax||\n|^|Net| |\n---\n|A <b>|12.00||\n| |^||"
    assert corpus.table_csv(TABLE) == ",Price & tax,\n,Net,\nA <b>,12.00,\n,,"


def test_most_examples_read_a_page_into_an_output_format() -> None:
    weights = {draw.__name__: weight for weight, draw in corpus.EXAMPLES}
    read = sum(weights[name] for name in ("table_example", "form_example", "question_example", "chart_example"))
    assert read >= 0.6 * sum(weights.values())


def test_examples_stay_short(ours: HfTokenizer) -> None:
    rng = Random(13)
    for _ in range(N_SAMPLES):
        message, answer = corpus.text_example(rng)
        assert len(ours.encode(message)) + len(ours.encode(answer)) <= corpus.MAX_TOKENS
        assert len(ours.encode(corpus.plain_text(rng))) <= corpus.MAX_TOKENS
