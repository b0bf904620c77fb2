"""The nano model's tokenizer and chat template.

Text of a page is spelled byte by byte, so letters and digits are never merged. The fixed parts of output formats and
prompts (tags, JSON between two values, complete sentences) are one token each. These pieces are cut out of what
`formats` writes, so the two always agree.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from granite4v.runtime.prompt.tokenizer import byte_of_letter
from scripts.nano import formats
from scripts.nano.truth import Cell, Chart, Form, Table
from tests.toy.language import ToyTokenizer
from tests.toy.llava_next import added_token

PAD, END_OF_TEXT = "<|pad|>", "<|end_of_text|>"
START_OF_ROLE, END_OF_ROLE = "<|start_of_role|>", "<|end_of_role|>"
ROLES = tuple(f"{START_OF_ROLE}{role}{END_OF_ROLE}" for role in ("system", "user", "assistant"))
IMAGE = "<image>"
OTSL_TAGS = tuple(
    f"<{name}>" for name in ("otsl", "/otsl", "fcel", "ecel", "lcel", "ucel", "xcel", "ched", "rhed", "srow", "nl")
)
HTML_NAMES = ("table", "thead", "tbody", "tr", "th", "td")
HTML_TAGS = (
    *(f"<{close}{name}>" for name in HTML_NAMES for close in ("", "/")),
    *("<th", "<td", ' colspan="', ' rowspan="', '" rowspan="', '">'),
)
N_VOCAB_MULTIPLE = 32
MODEL_MAX_LENGTH = 2048
SPACE = "Ġ"  # a space as byte-level BPE spells it
MERGES = tuple((SPACE * n, SPACE * n) for n in (1, 2, 4, 8))  # runs of up to 16 spaces


def build_tokenizer() -> ToyTokenizer:
    """Builds the tokenizer: 256 bytes, runs of spaces, the pieces, special tokens, unused tokens up to a multiple of
    `N_VOCAB_MULTIPLE`, and the image token last."""
    vocab = {letter: i for i, letter in enumerate(_byte_letters())}
    for left, right in MERGES:
        vocab[left + right] = len(vocab)
    plain = pieces()
    special = [PAD, END_OF_TEXT, START_OF_ROLE, END_OF_ROLE, *ROLES]
    n_used = len(vocab) + len(plain) + len(special) + 1
    special += [f"<|unused_{i}|>" for i in range(-n_used % N_VOCAB_MULTIPLE)] + [IMAGE]
    ids = {text: len(vocab) + i for i, text in enumerate([*plain, *special])}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(i, text, special=text in special) for text, i in ids.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [list(merge) for merge in MERGES],
        },
    }
    return ToyTokenizer(content, max(ids.values()) + 1, ids[PAD], ids[END_OF_TEXT], ids[IMAGE])


def _byte_letters() -> list[str]:
    """Returns the letter for each of the 256 bytes in byte-level BPE."""
    letters = {byte: letter for letter, byte in byte_of_letter().items()}
    return [letters[byte] for byte in range(256)]


# --- the pieces ---


def pieces() -> tuple[str, ...]:
    """Returns every text that is one token, in a fixed order. None of them can be part of a page's own text."""
    found = [*OTSL_TAGS, *HTML_TAGS]
    for table in _tables():
        found += _between(formats.html(table))
        cells = formats.tables_json(table)
        found += _between(cells.replace(', "content": "', "X"), numbers=r"\d+")  # 'content' may be a form's field
        found += re.findall(r', "colspan": 1, "rowspan": 1, .*?"content": "', cells)
        found += re.findall(r', "type": .*?"content": "', cells)
    for kind in ("bar", "line", "pie"):
        found += _between(formats.chart_code(_chart(kind, 2)))
        found += _between(formats.chart_summary(_chart(kind, 1)))
    for form in (Form("", (("X", None), ("XX", "X"), ("XXX", "X"), ("XXXX", None))), Form("", (("X", "X"),))):
        found += _between(formats.form_json(form))
        found += _between(json.dumps(formats.form_schema(form), indent=2))
        found += _between(json.dumps(formats.form_schema(form, nullable=False), indent=2))
    found = [piece for piece in found if not LIKE_TEXT.fullmatch(piece)]
    return tuple(dict.fromkeys([*found, *_sentences()]))


# In these examples 'X' is any text and '7' any number; everything between them is fixed.
LIKE_TEXT = re.compile(r"[ ,.():\[\]]*|[ a-z]+|.")


def _between(text: str, numbers: str = "7") -> list[str]:
    return re.split(rf"X+|{numbers}", text)


def _tables() -> Iterator[Table]:
    for n_header_rows, n_rows in ((1, 3), (0, 2), (2, 3), (1, 1)):
        cells = tuple(Cell(i, j, "X") for i in range(n_rows) for j in range(2))
        yield Table(n_rows, 2, n_header_rows, cells)


def _chart(kind: str, n: int) -> Chart:
    series = ("X",) * (1 if kind == "pie" else n)
    return Chart(kind, "X", "X", ("X",) * n, series, (("7",) * len(series),) * n)


def _sentences() -> list[str]:
    """Returns prompts without their variable parts, line by line."""
    asked = [formats.TABLE_AS_CSV, formats.TABLE_AS_TEXT, formats.COPY_TEXT, formats.LIST_COLUMN, formats.QUESTION]
    prompts = [formats.DEFAULT_SYSTEM, *formats.TASK_PROMPTS.values(), formats.KVP_PROMPT, *asked]
    lines = [line.split("{")[0] for prompt in prompts for line in prompt.splitlines()]
    return [*filter(None, lines), formats.NOT_FOUND]


# --- the chat template ---

# Like Granite's: a system message is always present, and a task tag replaces all other text of its message. Unlike
# Granite's, a tag keeps every image of its message, and a plain string is left unchanged.
CHAT_TEMPLATE = """\
{%- set tasks = __TASKS__ -%}
{%- macro flat(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}
{%- for part in content -%}
{%- if part.type == 'image' -%}{{ '<image>\\n' }}{%- elif part.type == 'text' -%}{{ part.text }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- macro expanded(text) -%}
{%- set first = namespace(at=-1, tag='') -%}
{%- for tag in tasks -%}
{%- if tag in text and (first.at < 0 or text.index(tag) < first.at) -%}
{%- set first.at = text.index(tag) -%}{%- set first.tag = tag -%}
{%- endif -%}
{%- endfor -%}
{%- if first.at < 0 -%}{{ text }}{%- else -%}{{ '<image>\\n' * text.count('<image>') + tasks[first.tag] }}{%- endif -%}
{%- endmacro -%}
{%- macro turn(role, text) -%}
{{ '<|start_of_role|>' + role + '<|end_of_role|>' + text + '<|end_of_text|>\\n' }}
{%- endmacro -%}
{%- if messages[0].role != 'system' -%}{{ turn('system', __SYSTEM__) }}{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{{ turn('user', expanded(flat(message.content))) }}
{%- else -%}{{ turn(message.role, flat(message.content)) }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif -%}
""".replace("__TASKS__", json.dumps(formats.TASK_PROMPTS)).replace("__SYSTEM__", json.dumps(formats.DEFAULT_SYSTEM))


def write_language_files(directory: Path, tokenizer: ToyTokenizer | None = None) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    tokenizer = tokenizer or build_tokenizer()
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": PAD,
        "unk_token": END_OF_TEXT,
        "image_token": IMAGE,
        "extra_special_tokens": {"image_token": IMAGE},
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MODEL_MAX_LENGTH,
        "processor_class": "Granite4VisionProcessor",
    }
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    (directory / "tokenizer.json").write_text(
        json.dumps(tokenizer.tokenizer_json, ensure_ascii=False), encoding="utf-8"
    )
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
