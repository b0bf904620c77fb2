"""What the nano model is taught to write: its formats, read back; its tokenizer and template; its text corpus."""

from __future__ import annotations

import ast
import csv
import hashlib
import io
import json
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
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
from scripts.nano.truth import Cell, Chart, Form, Table

N_SAMPLES = 300

TABLE = Table(
    n_rows=4,
    n_cols=3,
    n_header_rows=2,
    cells=(
        Cell(0, 0, "", 2, 1, header=True),
        Cell(0, 1, "Price & tax", 1, 2, header=True),
        Cell(1, 1, "Net", header=True),
        Cell(1, 2, "", header=True),
        Cell(2, 0, "A <b>", header=True),
        Cell(2, 1, "12.00", 2, 2),
        Cell(3, 0, ""),
    ),
)
BARS = Chart("bar", "Sales", "Year", ("2019", "2020"), ("Net", "Tax"), (("1,200", "3"), ("-4.50", "30%")))
PIE = Chart("pie", "Votes", "City", ("Oslo", "Lima"), ("Share",), (("40%",), ("60%",)))
FORM = Form("Invoice", (("invoice_number", 'A-1 "b"'), ("due_date", None), ("total", "é 3")))


def tables() -> Iterator[Table]:
    rng = Random(7)
    yield TABLE  # the only one with a cell that spans both ways
    for _ in range(N_SAMPLES):
        yield corpus.random_table(rng)


# --- formats ---


def read_otsl(text: str) -> set[tuple[int, int, int, int, str]]:
    """(row, col, rowspan, colspan, text) of every cell, by the grammar's own rules."""
    assert text.startswith("<otsl>") and text.endswith("<nl></otsl>")
    rows = [re.findall(r"<(\w+)>([^<]*(?:<b>)?)", row) for row in text[len("<otsl>") : -len("</otsl>")].split("<nl>")]
    grid = [[tag for tag, _ in row] for row in rows[:-1]]
    assert len({len(row) for row in grid}) == 1
    found = set()
    for i, row in enumerate(grid):
        for j, tag in enumerate(row):
            if tag in ("lcel", "ucel", "xcel"):
                assert rows[i][j][1] == ""
                assert tag != "lcel" or (j and row[j - 1] not in ("ucel", "xcel"))
                assert tag != "ucel" or (i and grid[i - 1][j] not in ("lcel", "xcel"))
                assert tag != "xcel" or (row[j - 1] in ("ucel", "xcel") and grid[i - 1][j] in ("lcel", "xcel"))
                continue
            assert tag in ("ched", "rhed", "fcel", "ecel") and (tag == "ecel") == (rows[i][j][1] == "")
            colspan = 1 + run([row[k] for k in range(j + 1, len(row))], "lcel")
            rowspan = 1 + run([grid[k][j] for k in range(i + 1, len(grid))], "ucel")
            found.add((i, j, rowspan, colspan, rows[i][j][1]))
    return found


def run(tags: list[str], wanted: str) -> int:
    """How many of the first tags are the wanted one."""
    return next((n for n, tag in enumerate(tags) if tag != wanted), len(tags))


class HtmlCells(HTMLParser):
    """The cells of a table by the HTML rules: a cell takes the first free slot of its row."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.cells: list[tuple[int, int, int, int, str]] = []
        self.tags: list[tuple[str, str]] = []
        self.row = -1
        self.taken: set[tuple[int, int]] = set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        if tag == "tr":
            self.row += 1
        if tag in ("td", "th"):
            spans = {name: int(value or 0) for name, value in attrs}
            assert all(value > 1 for value in spans.values())
            rowspan, colspan = spans.get("rowspan", 1), spans.get("colspan", 1)
            col = next(j for j in range(99) if (self.row, j) not in self.taken)
            self.taken |= {(self.row + i, col + j) for i in range(rowspan) for j in range(colspan)}
            self.cells.append((self.row, col, rowspan, colspan, ""))
            self.tags.append((self.open[1], tag))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        assert self.open[-1] in ("td", "th")
        self.cells[-1] = (*self.cells[-1][:4], self.cells[-1][4] + data)


def as_set(table: Table) -> set[tuple[int, int, int, int, str]]:
    return {(cell.row, cell.col, cell.rowspan, cell.colspan, cell.text) for cell in table.cells}


def test_otsl_of_a_table_with_every_kind_of_slot() -> None:
    assert formats.otsl(TABLE) == (
        "<otsl><ecel><ched>Price & tax<lcel><nl><ucel><ched>Net<ecel><nl>"
        "<rhed>A <b><fcel>12.00<lcel><nl><ecel><ucel><xcel><nl></otsl>"
    )


def test_html_of_a_table_with_every_kind_of_cell() -> None:
    assert formats.html(TABLE) == (
        '<table><thead><tr><th rowspan="2"></th><th colspan="2">Price &amp; tax</th></tr>'
        "<tr><th>Net</th><th></th></tr></thead>"
        '<tbody><tr><th>A &lt;b&gt;</th><td colspan="2" rowspan="2">12.00</td></tr><tr><td></td></tr></tbody></table>'
    )
    assert formats.html(Table(1, 1, 0, (Cell(0, 0, "x"),))) == "<table><tbody><tr><td>x</td></tr></tbody></table>"


def test_json_of_a_table() -> None:
    text = formats.tables_json(TABLE)
    assert text.startswith('{"dimensions": {"rows": 2, "columns": 3, "header_rows": 2, "total_rows": 4}, "cells": [{')
    cells = json.loads(text)["cells"]
    assert list(cells[1].items()) == [
        ("row", 1),
        ("col", 2),
        ("colspan", 2),
        ("rowspan", 1),
        ("type", "header"),
        ("header_level", 1),
        ("content", "Price & tax"),
    ]
    assert [cell["header_level"] for cell in cells] == [1, 1, 2, 2, 0, 0, 0]
    assert [cell["type"] for cell in cells] == ["header"] * 5 + ["data"] * 2


def test_all_three_formats_tell_the_whole_table() -> None:
    for table in tables():
        assert read_otsl(formats.otsl(table)) == as_set(table)
        parsed = HtmlCells(formats.html(table))
        assert set(parsed.cells) == as_set(table) and parsed.open == []
        in_head = [cell.row < table.n_header_rows for cell in table.cells]
        is_header = [head or cell.header for head, cell in zip(in_head, table.cells, strict=True)]
        sections = [
            ("thead" if head else "tbody", "th" if th else "td") for head, th in zip(in_head, is_header, strict=True)
        ]
        assert parsed.tags == sections
        content = json.loads(formats.tables_json(table))
        cells = {(c["row"] - 1, c["col"] - 1, c["rowspan"], c["colspan"], c["content"]) for c in content["cells"]}
        assert cells == as_set(table)


def test_csv_has_quotes_only_where_it_must() -> None:
    assert formats.chart_csv(BARS) == 'Year,Net,Tax\n2019,"1,200",3\n2020,-4.50,30%'
    rng = Random(1)
    for chart in (corpus.random_chart(rng) for _ in range(N_SAMPLES)):
        rows = list(csv.reader(io.StringIO(formats.chart_csv(chart))))
        assert rows[0] == [chart.axis, *chart.series]
        assert rows[1:] == [[label, *row] for label, row in zip(chart.labels, chart.values, strict=True)]


@pytest.mark.parametrize("kind", ["bar", "line", "pie"])
def test_code_holds_the_charts_data(kind: str) -> None:
    chart = PIE if kind == "pie" else Chart(kind, *list(vars(BARS).values())[1:])
    text = formats.chart_code(chart)
    assert 4 <= len(text.splitlines()) <= 7
    found = [ast.unparse(node) for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.List, ast.Dict))]
    assert str(list(chart.labels)) in found
    assert ("[40, 60]" if kind == "pie" else "{'Net': [1200, -4.5], 'Tax': [3, 30]}") in found
    assert f"plt.{'plot' if kind == 'line' else kind}(" in text and f'title="{chart.title}"' in text


def test_code_draws_what_the_chart_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run against a stand-in for matplotlib that notes the calls."""
    calls: list[tuple[str, Any, Any]] = []

    class Noted:
        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, name: str) -> Any:
            return Noted(name)

        def __call__(self, *args: Any, **named: Any) -> Noted:
            calls.append((self._name, args, named))
            return Noted(self._name)

    noted = Noted("matplotlib")
    monkeypatch.setitem(sys.modules, "matplotlib", noted)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", noted)
    exec(formats.chart_code(BARS), {})
    assert [name for name, *_ in calls] == ["bar", "bar", "gca", "set", "legend", "show"]
    assert [args[1] for _, args, _ in calls[:2]] == [[1200, -4.5], [3, 30]]
    assert calls[1][1][0] == [0.2, 1.2] and calls[1][2]["tick_label"] == ["2019", "2020"]
    assert calls[3][2] == {"title": "Sales", "xlabel": "Year"}


def test_summary_compares_the_drawn_values() -> None:
    assert formats.chart_summary(BARS) == (
        'The bar chart "Sales" shows Net and Tax by Year. '
        "The highest value is 1,200 (2019, Net) and the lowest value is -4.50 (2020, Net)."
    )
    assert formats.chart_summary(PIE).endswith("is 60% (Lima) and the lowest value is 40% (Oslo).")


@pytest.mark.parametrize(
    ("text", "literal"), [("$1,234.50", "1234.50"), ("-3", "-3"), ("007", "7"), ("12.5 kg", "12.5")]
)
def test_numbers_as_python_writes_them(text: str, literal: str) -> None:
    assert formats.number(text) == literal
    with pytest.raises(ValueError, match="no number"):
        formats.number("n/a")


def test_forms() -> None:
    assert formats.form_json(FORM) == '{"invoice_number": "A-1 \\"b\\"", "due_date": null, "total": "é 3"}'
    prompt = formats.kvp_prompt(formats.form_schema(FORM))
    schema = json.loads(prompt.split("schema:\n\n")[1].split("\n\nReturn null")[0])
    assert schema["properties"]["due_date"] == {"type": ["string", "null"]}
    assert prompt.startswith(
        "Extract structured data from this document.\nReturn a JSON object matching this schema:\n\n{\n"
    )
    assert prompt.endswith(
        "}\n\nReturn null for fields you cannot find.\nReturn ONLY valid JSON.\n"
        "Return an instance of the JSON with extracted values, not the schema itself."
    )
    assert formats.field_question("invoice_number") == "What is the invoice number?"
    assert formats.field_answer(FORM, "total") == "é 3" and formats.field_answer(FORM, "due_date") == "not found"


def test_an_answer_belongs_to_its_kind_of_truth() -> None:
    assert formats.answer_for("<tables_otsl>", TABLE) == formats.otsl(TABLE)
    assert formats.answer_for("<chart2csv>", PIE) == formats.chart_csv(PIE)
    assert formats.answer_for(formats.KVP, FORM) == formats.form_json(FORM)
    with pytest.raises(TypeError, match="no task of a Table"):
        formats.answer_for("<chart2csv>", TABLE)


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
    """llama.cpp's tokenizer on a GGUF file of the vocabulary alone."""
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
    """The pieces come from `formats`: a changed prompt or format renumbers them, and needs new weights."""
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
    """What a reader needs is there: every value of a table or form stands on the page of text."""
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
