"""llama.cpp's view of a tokenizer, built from tokenizer.json; and the chat template.

Two kinds of vocabulary are known: byte-level BPE, and BPE over characters as it is converted from SentencePiece.

granite4v itself tokenizes with the tokenizer.json that is stored whole; these keys are for llama.cpp.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from granite4v import gguf_keys as keys
from granite4v.converter.checkpoint import read_json
from granite4v.errors import CheckpointError

Json = Mapping[str, Any]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # enum llama_token_type

# The split patterns of tokenizer.json files, and llama.cpp's name for a pre-tokenizer that splits so
# (src/llama-vocab.cpp). Of its names for this pattern, 'llama-bpe' would also put a first token before the
# text. The checkpoint's pattern decides, not the name that published GGUF files carry: some of those keep
# digits together that the model was trained to read by three.
CL100K_BY_THREE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
CL100K_BY_ONE = CL100K_BY_THREE.replace(r"\p{N}{1,3}", r"\p{N}")
DIGITS_BY_THREE = r"\\p{N}{1,3}"  # as it stands in JSON
SPLITS = {
    CL100K_BY_THREE: "dbrx",
    CL100K_BY_THREE.replace("(?i:", "(?:").replace(  # the same, its cases written out
        "'s|'t|'re|'ve|'m|'ll|'d", "'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
    ): "dbrx",
    CL100K_BY_ONE: "qwen2",
}
BYTE_LEVEL_SPLIT = "gpt-2"  # the pattern built into tokenizers' ByteLevel
DIGITS_THEN_BYTE_LEVEL = "refact"
SPACE = "▁"  # how SentencePiece writes a space
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
SPECIAL_TOKENS = ("bos", "eos", "unk", "sep", "pad", "mask")


def vocabulary_metadata(
    folder: Path, config: Json, text_config: Json, n_vocab: int
) -> tuple[dict[str, Any], list[str]]:
    """The `tokenizer.*` metadata of a text file, and warnings; raises CheckpointError."""
    path = folder / "tokenizer.json"
    if not path.exists():
        raise CheckpointError(f"'{folder}' has no 'tokenizer.json'; copy it from the original checkpoint.")
    tokenizer = read_json(path)
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    model = tokenizer.get("model") or {}
    if model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise CheckpointError(
            f"'{path}' holds a {model.get('type')!r} tokenizer; only byte-level BPE, and BPE converted from "
            "SentencePiece, convert."
        )
    tokens, types = _tokens(path, tokenizer, n_vocab)
    if model.get("byte_fallback"):
        kind: dict[str, Any] = _sentencepiece(tokenizer, tokens, types)
        warnings: list[str] = []
    else:
        kind, warnings = _byte_level(tokenizer)
    metadata: dict[str, Any] = {
        **kind,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        **_special_ids(tokenizer, settings, (text_config, config), n_vocab),
        "tokenizer.ggml.add_bos_token": _adds_bos(tokenizer, settings),
        keys.TOKENIZER_HF_JSON: path.read_text(encoding="utf-8"),
    }
    template = chat_template(folder, settings)
    if template is None:
        warnings.append(f"'{folder}' has no chat template; prompts will have to be written out")
    else:
        metadata[keys.CHAT_TEMPLATE] = template
    return metadata, warnings


def chat_template(folder: Path, settings: Json) -> str | None:
    """The template's text: from a file of its own, or from tokenizer_config.json."""
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if template is None and (folder / "chat_template.json").exists():
        template = read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template if isinstance(template, str) else None


def _byte_level(tokenizer: Json) -> tuple[dict[str, Any], list[str]]:
    pre, warnings = _pre_tokenizer(tokenizer)
    merges = [_merge(merge) for merge in tokenizer["model"].get("merges") or []]
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.merges": merges}, warnings


def _sentencepiece(tokenizer: Json, tokens: list[str], types: list[int]) -> dict[str, Any]:
    """llama.cpp's 'llama' vocabulary, which merges the pair whose joined piece has the highest score.

    tokenizer.json has no scores but an order of merges: a piece gets minus the place of the first merge that makes
    it. Marks bytes and the unknown token in `types`.
    """
    rank: dict[str, int] = {}
    for place, merge in enumerate(tokenizer["model"].get("merges") or []):
        rank.setdefault("".join(merge.split(" ", 1) if isinstance(merge, str) else merge), place)
    unknown = tokenizer["model"].get("unk_token")
    for i, text in enumerate(tokens):
        if text == unknown:
            types[i] = UNKNOWN
        elif BYTE_TOKEN.fullmatch(text):
            types[i] = BYTE
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [float(-rank.get(text, 0)) for text in tokens],
        "tokenizer.ggml.add_space_prefix": _adds_space(tokenizer),
    }


def _adds_space(tokenizer: Json) -> bool:
    """Whether a space is put before a text, by the normalizer or by the pre-tokenizer."""
    normalizer, pre = tokenizer.get("normalizer") or {}, tokenizer.get("pre_tokenizer") or {}
    steps = [*normalizer.get("normalizers", [normalizer]), *pre.get("pretokenizers", [pre])]
    for step in steps:
        if step.get("type") == "Prepend":
            return step.get("prepend") == SPACE
        if step.get("type") == "Metaspace":
            return step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never") != "never"
    return False


def _tokens(path: Path, tokenizer: Json, n_vocab: int) -> tuple[list[str], list[int]]:
    """Texts and types by id. Ids that the tokenizer leaves out get a name of their own, as llama.cpp gives."""
    texts: dict[int, str] = {i: text for text, i in tokenizer["model"]["vocab"].items()}
    types = dict.fromkeys(texts, NORMAL)
    for entry in tokenizer.get("added_tokens") or []:
        i, text = int(entry["id"]), str(entry["content"])
        texts[i] = text
        types[i] = CONTROL if entry.get("special") or (text.startswith("<|") and text.endswith("|>")) else USER_DEFINED
    if texts and max(texts) >= n_vocab:
        raise CheckpointError(
            f"'{path}' has token {max(texts)} ({texts[max(texts)]!r}), but text_config has a vocab_size of {n_vocab}."
        )
    tokens = [texts.get(i, f"[PAD{i}]") for i in range(n_vocab)]
    if len(set(tokens)) != n_vocab:  # llama.cpp aborts on this
        twice = [text for text, n in Counter(tokens).most_common(5) if n > 1]
        raise CheckpointError(f"'{path}' gives more than one id to {', '.join(map(repr, twice))}.")
    return tokens, [types.get(i, UNUSED) for i in range(n_vocab)]


def _merge(merge: str | list[str]) -> str:
    """'left right'; a space inside a part, which newer files allow, is written as its byte-level letter."""
    if isinstance(merge, str):
        return merge
    return " ".join(part.replace(" ", "Ġ") for part in merge)


def _pre_tokenizer(tokenizer: Json) -> tuple[str, list[str]]:
    pre = tokenizer.get("pre_tokenizer") or {}
    steps: list[Json] = pre.get("pretokenizers", []) if pre.get("type") == "Sequence" else [pre]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return BYTE_LEVEL_SPLIT, []
    if kinds == ["Digits", "ByteLevel"]:
        return DIGITS_THEN_BYTE_LEVEL, []
    if kinds == ["Split", "ByteLevel"]:
        pattern = (steps[0].get("pattern") or {}).get("Regex", "")
        if pattern in SPLITS:
            return SPLITS[pattern], []
    nearest = SPLITS[CL100K_BY_THREE] if DIGITS_BY_THREE in json.dumps(pre) else BYTE_LEVEL_SPLIT
    return nearest, [
        f"llama.cpp has no pre-tokenizer for {json.dumps(pre)[:200]}; granite4v tokenizes with the stored "
        "tokenizer.json, but other programs will split text differently"
    ]


def _special_ids(tokenizer: Json, settings: Json, configs: tuple[Json, ...], n_vocab: int) -> dict[str, int]:
    ids = {entry["content"]: int(entry["id"]) for entry in tokenizer.get("added_tokens") or []}
    found: dict[str, int] = {}
    for kind in SPECIAL_TOKENS:
        named = settings.get(f"{kind}_token")
        text = named.get("content") if isinstance(named, dict) else named
        candidates: list[Any] = [ids.get(text)] if isinstance(text, str) else []
        for config in configs:
            value = config.get(f"{kind}_token_id")
            candidates.append(value[0] if isinstance(value, list) and value else value)
        for value in candidates:
            if isinstance(value, int) and 0 <= value < n_vocab:
                key = {"unk": "unknown", "sep": "seperator", "pad": "padding"}.get(kind, kind)  # llama.cpp's spelling
                found[f"tokenizer.ggml.{key}_token_id"] = value
                break
    return found


def _adds_bos(tokenizer: Json, settings: Json) -> bool:
    """Whether text is to be preceded by the begin-of-text token: what the post-processor does decides."""
    processor = tokenizer.get("post_processor") or {}
    steps = processor.get("processors", [processor])
    for step in steps:
        if step.get("type") == "TemplateProcessing":
            return "SpecialToken" in (step.get("single") or [{}])[0]
    if not processor:
        return bool(settings.get("add_bos_token", False))
    return False
