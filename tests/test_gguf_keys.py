"""GGUF keys and tensor names are defined in one module; every other module uses its constants."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import gguf

from granite4v import gguf_keys as keys
from tests.helpers.source_tree import parse, product_files, relative

KEYS = {name: value for name, value in vars(keys).items() if name.isupper() and isinstance(value, str) and "." in value}
# Spellings that no other module may contain, whether or not they are among the constants. A key of the text file may
# have lost the architecture that an f-string puts in front of it.
SPELLED = re.compile(
    r"\{arch\}|tokenizer\.(ggml|huggingface|chat_template)|general\.[a-z_]+|clip\.(vision|projector|has_|use_)|"
    r"^split\.|^adapter\.|granite4v\.(vision|version|source|revision|pair|adapter|image_token|quantization)|"
    r"(^|[^a-z_])(v|blk|mm)\.(blk|proj_blk|patch_embd|position_embd|class_embd|image_newline|[0-9]+)\b|"
    r"\bblk\\?\.|\blora_[ab]$|"
    r"^\.?(attention\.(head|key|value|scale|layer)|rope\.(freq|dim|scal))|"
    r"^(token_embd|output|output_norm|rope_freqs)\.weight$"
)


def literals(path: Path) -> Iterator[tuple[int, str]]:
    """Yields every string of a module except docstrings; the literal parts of f-strings come one by one."""
    tree = parse(path)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


def spelled(text: str) -> bool:
    tails = {value.removeprefix("{arch}") for value in KEYS.values() if value.startswith("{arch}")}
    return SPELLED.search(text) is not None or text in KEYS.values() or text in tails


def test_only_one_module_spells_keys_and_tensor_names() -> None:
    found = {
        f"{relative(path)}:{line}: {text[:80]}"
        for path in product_files()
        if relative(path) != "granite4v/gguf_keys.py"
        for line, text in literals(path)
        if spelled(text)
    }
    assert found == set()


def test_spelled_keys_are_noticed() -> None:
    noticed = (
        "tokenizer.ggml.tokens",
        "'{arch}.block_count'",
        ".rope.dimension_count",
        ".block_count",
        "v.blk.0.attn_q.weight",
        r"^blk\.(\d+)",
        "mm.2.bias",
        "general.name",
        "it has no clip.vision.image_size",
    )
    assert [text for text in noticed if not spelled(text)] == []
    passed = ("granite4v.runtime.model", "tokenizer.json", "attn_q", "clip_projector", "a general rule. block_count")
    assert [text for text in passed if spelled(text)] == []


def test_keys_are_those_of_the_gguf_package() -> None:
    """The package lists llama.cpp's keys, except one that is newer than the package."""
    known = {
        value
        for group in vars(gguf.Keys).values()
        if isinstance(group, type)
        for value in vars(group).values()
        if isinstance(value, str)
    }
    checked = [value for value in KEYS.values() if value.startswith(("general.", "{arch}.", "tokenizer.ggml."))]
    assert len(checked) > 40
    assert [value for value in checked if value not in known] == [keys.DEEPSTACK_MAPPING]


def test_text_keys_and_patterns() -> None:
    assert keys.text_key(keys.HEAD_COUNT, "granite") == "granite.attention.head_count"
    assert keys.text_key(keys.GENERAL_NAME, "granite") == keys.GENERAL_NAME
    pattern = keys.pattern_of(keys.TEXT_BLOCK, i=r"\d+", part="attn_q|ffn_up")
    assert pattern.fullmatch("blk.12.ffn_up").groups() == ("12", "ffn_up")  # type: ignore[union-attr]
    assert pattern.fullmatch("blk.x.ffn_up") is None
    assert pattern.fullmatch("blkx12.ffn_up") is None
