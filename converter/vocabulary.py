"""Builds llama.cpp's tokenizer metadata from tokenizer.json, and finds the chat template.

Two kinds of vocabulary are supported: byte-level BPE, and BPE over characters as converted from SentencePiece.

granite4v itself tokenizes with the tokenizer.json, which is stored in the GGUF file; llama.cpp reads the other keys.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from granite4v import gguf_keys as keys
from granite4v.converter.files import exists, parse_object, read_json, read_text
from granite4v.converter.tokenizer_check import check_loads
from granite4v.errors import CheckpointError
from granite4v.families.hf_fields import MAX_VOCABULARY, Fields, is_integer, shown

Json = Mapping[str, Any]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # enum llama_token_type

# The split patterns of tokenizer.json files, and llama.cpp's name for a pre-tokenizer with the same pattern
# (src/llama-vocab.cpp). It has several for the first pattern; 'llama-bpe' is not used, because it would also put a BOS
# token before the text. The checkpoint's pattern decides, not the name in published GGUF files: some of those keep
# digits together that the model was trained to read in groups of three.
CL100K_BY_THREE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
CL100K_BY_ONE = CL100K_BY_THREE.replace(r"\p{N}{1,3}", r"\p{N}")
# Words split by case, with contractions attached: [upper]*[lower]+ or [upper]+[lower]*.
_UPPER, _LOWER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CONTRACTED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K = (
    rf"{_UPPER}*{_LOWER}+{_CONTRACTED}|{_UPPER}+{_LOWER}*{_CONTRACTED}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGITS_BY_THREE = r"\\p{N}{1,3}"  # as JSON escapes it
SPLITS = {
    CL100K_BY_THREE: "dbrx",
    CL100K_BY_THREE.replace("(?i:", "(?:").replace(  # the same, with upper and lower case spelled out
        "'s|'t|'re|'ve|'m|'ll|'d", "'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
    ): "dbrx",
    CL100K_BY_ONE: "qwen2",
    O200K: "gpt-4o",
}
BYTE_LEVEL_SPLIT = "gpt-2"  # the pattern built into ByteLevel of the tokenizers package
DIGITS_THEN_BYTE_LEVEL = "refact"
SPACE = "▁"  # how SentencePiece writes a space
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
SPECIAL_TOKENS = {  # by their names in tokenizer_config.json and config.json
    "bos": keys.BOS_TOKEN_ID,
    "eos": keys.EOS_TOKEN_ID,
    "unk": keys.UNKNOWN_TOKEN_ID,
    "sep": keys.SEPARATOR_TOKEN_ID,
    "pad": keys.PADDING_TOKEN_ID,
    "mask": keys.MASK_TOKEN_ID,
}
FURTHER_ENDS = (keys.EOT_TOKEN_ID, keys.EOM_TOKEN_ID)


def vocabulary_metadata(
    folder: Path, config: Json, text_config: Json, n_vocab: int, image_token: int | None = None, n_more: int = 0
) -> tuple[dict[str, Any], list[str]]:
    """Builds the `tokenizer.*` metadata of a text file, and warnings; raises CheckpointError.

    `image_token`: the id of the image token in prompts. `n_more`: number of ids after the `n_vocab` of the output head
    that prompts may contain; they are only in the tokenizer.json, and llama.cpp does not know them.
    """
    path = folder / "tokenizer.json"
    try:
        text = read_text(path)
    except FileNotFoundError:
        raise CheckpointError(f"'{folder}' has no 'tokenizer.json'; copy it from the original checkpoint.") from None
    tokenizer = parse_object(text, f"'{path}'")
    settings = _optional(folder / "tokenizer_config.json")
    check_tokenizer(tokenizer, path)
    added = _add_tokens(tokenizer, _tokens_elsewhere(folder, settings), n_vocab + n_more)
    model = tokenizer["model"]
    tokens, types = _tokens(path, tokenizer, n_vocab + n_more)
    if model.get("byte_fallback"):
        kind: dict[str, Any] = _sentencepiece(tokenizer, tokens, types)
        warnings: list[str] = []
    else:
        kind, warnings = _byte_level(tokenizer)
    if image_token is not None and types[image_token] not in (CONTROL, USER_DEFINED):
        warnings.append(
            f"config.json says that token {image_token} stands for an image, but neither 'tokenizer.json' nor "
            "'tokenizer_config.json' has such an added token; prompts with images will fail"
        )
    tokens, types = tokens[:n_vocab], types[:n_vocab]
    if added:
        text = json.dumps(tokenizer, ensure_ascii=False)
    check_loads(text, path)
    special = _special_ids(tokenizer, settings, (text_config, config), n_vocab)
    ends = _further_ends(special.get(keys.EOS_TOKEN_ID), (_generation(folder), text_config, config), n_vocab)
    for key, end in zip(FURTHER_ENDS, ends, strict=False):
        special[key] = end
    if len(ends) > len(FURTHER_ENDS):
        left_out = ", ".join(map(str, ends[len(FURTHER_ENDS) :]))
        warnings.append(f"answers do not end at the tokens {left_out}: a GGUF file has room for three that end one")
    metadata: dict[str, Any] = {
        **kind,
        keys.TOKENS: tokens,
        keys.TOKEN_TYPES: types,
        **special,
        keys.ADD_BOS_TOKEN: _adds_bos(tokenizer, settings),
        keys.TOKENIZER_HF_JSON: text,
    }
    template, named = chat_template(folder, settings)
    if template is not None:
        metadata[keys.CHAT_TEMPLATE] = template
    else:
        found = f" named 'default', only {', '.join(map(repr, named))}" if named else ""
        warnings.append(f"'{folder}' has no chat template{found}; prompts must be given in the model's raw format")
    return metadata, warnings


def _optional(path: Path) -> dict[str, Any]:
    """Reads the object in a JSON file; empty if the file does not exist."""
    return read_json(path) if exists(path) else {}


def _optional_text(path: Path) -> str | None:
    return read_text(path) if exists(path) else None


def chat_template(folder: Path, settings: Json) -> tuple[str | None, list[str]]:
    """Finds the default chat template; without one, returns None and the names of the other templates.

    Searches where transformers 5.24 looks for a processor's template (`processing_utils.py`): processor_config.json,
    then chat_template.json, then chat_template.jinja and additional_chat_templates/. The tokenizer's template comes
    last: published checkpoints have one there that does not handle images.
    """
    named: list[str] = []
    for source in (_of_processor, _of_json, _of_jinja_files, lambda _: _templates(settings.get("chat_template"))):
        templates = source(folder)
        if "default" in templates:
            return templates["default"], []
        named += templates
    return None, sorted(set(named))


def _of_processor(folder: Path) -> dict[str, str]:
    return _templates(_optional(folder / "processor_config.json").get("chat_template"))


def _of_json(folder: Path) -> dict[str, str]:
    return _templates(_optional(folder / "chat_template.json").get("chat_template"))


def _of_jinja_files(folder: Path) -> dict[str, str]:
    others = folder / "additional_chat_templates"
    try:
        paths = sorted(others.glob("*.jinja")) if others.is_dir() else []
    except OSError as error:
        raise CheckpointError(f"cannot read '{others}': {error.strerror or error}.") from None
    templates = {path.stem: read_text(path) for path in paths}
    default = _optional_text(folder / "chat_template.jinja")
    return templates if default is None else templates | {"default": default}


def _templates(value: Any) -> dict[str, str]:
    """Templates by name, from a field that holds one text, an object of texts, or a list of named ones."""
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list):
        entries = [entry for entry in value if isinstance(entry, dict)]
        value = {str(entry.get("name")): entry.get("template") for entry in entries}
    pairs = value.items() if isinstance(value, dict) else ()
    return {name: template for name, template in pairs if isinstance(template, str)}


def check_tokenizer(tokenizer: Json, path: Path) -> None:
    """Raises CheckpointError unless a tokenizer.json holds BPE, and each part that is read has the expected type."""
    model = tokenizer.get("model")
    model = model if isinstance(model, dict) else {}
    if model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise CheckpointError(
            f"'{path}' holds a {model.get('type')!r} tokenizer; only byte-level BPE, and BPE converted from "
            "SentencePiece, convert."
        )
    fields = Fields(tokenizer, str(path))
    for text, i in model["vocab"].items():
        if not is_integer(i) or not 0 <= i < MAX_VOCABULARY:
            raise CheckpointError(f"'{path}': token {text!r} has the id {shown(i)}; expected an integer from 0.")
    merges = model.get("merges") or []
    if not isinstance(merges, list) or not all(_is_merge(merge) for merge in merges):
        raise Fields(model, str(path), "model").error("merges", "a list of pairs of texts")
    entries = tokenizer.get("added_tokens") or []
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict)
        and isinstance(entry.get("content"), str)
        and is_integer(entry.get("id"))
        and 0 <= entry["id"] < MAX_VOCABULARY
        for entry in entries
    ):
        raise fields.error("added_tokens", "a list of objects with 'id' and 'content'")
    for key, plural in (
        ("normalizer", "normalizers"),
        ("pre_tokenizer", "pretokenizers"),
        ("post_processor", "processors"),
    ):
        part = fields.section(key, {})
        steps = part.get(plural, [])
        if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
            raise part.error(plural, "a list of objects")


def _is_merge(merge: Any) -> bool:
    if isinstance(merge, str):
        return " " in merge
    return isinstance(merge, list) and len(merge) == 2 and all(isinstance(part, str) for part in merge)


def _tokens_elsewhere(folder: Path, settings: Json) -> dict[int, dict[str, Any]]:
    """Added tokens by id from the files next to tokenizer.json, as transformers adds them when it reads those files."""
    found: dict[int, dict[str, Any]] = {}
    for text, i in _optional(folder / "added_tokens.json").items():
        if is_integer(i):
            found[i] = {"content": text, "special": False}
    decoder = Fields(settings, "tokenizer_config.json").section("added_tokens_decoder", {}).values
    for key, entry in decoder.items():
        if key.isdecimal() and len(key) < 10 and isinstance(entry, dict) and isinstance(entry.get("content"), str):
            found[int(key)] = dict(entry)
    return found


def _add_tokens(tokenizer: dict[str, Any], others: Mapping[int, Json], n_vocab: int) -> bool:
    """Adds to `tokenizer` those of the tokens `others` that it lacks and has room for; returns whether there were any.

    A token that is already in its vocabulary, with the same id, becomes an added token as well. Otherwise text would
    not be split at it.
    """
    entries = tokenizer.get("added_tokens") or []
    taken = {entry["id"] for entry in entries}
    known = {entry["content"] for entry in entries}
    vocabulary = tokenizer["model"]["vocab"]
    texts = {i: text for text, i in vocabulary.items()}
    new = []
    for i, entry in sorted(others.items()):
        text = entry["content"]
        free = i not in taken and text not in known and texts.get(i, text) == text and vocabulary.get(text, i) == i
        if free and i < n_vocab:
            flags = {name: entry.get(name) is True for name in TOKEN_FLAGS}
            new.append({"id": i, "content": text, **flags})
            known.add(text)
    if new:
        tokenizer["added_tokens"] = sorted([*entries, *new], key=lambda entry: entry["id"])
    return bool(new)


def _byte_level(tokenizer: Json) -> tuple[dict[str, Any], list[str]]:
    pre, warnings = _pre_tokenizer(tokenizer)
    merges = [_merge(merge) for merge in tokenizer["model"].get("merges") or []]
    return {keys.TOKENIZER_MODEL: "gpt2", keys.TOKENIZER_PRE: pre, keys.TOKEN_MERGES: merges}, warnings


def _sentencepiece(tokenizer: Json, tokens: list[str], types: list[int]) -> dict[str, Any]:
    """Builds llama.cpp's 'llama' vocabulary, which merges the pair whose joined piece has the highest score.

    tokenizer.json has an order of merges instead of scores. The score of a piece is minus the index of the first merge
    that produces it: with the merges 'a b' and 'ab c', 'ab' gets 0 and 'abc' gets -1. Pieces without a merge get 0.
    Marks bytes and the unknown token in `types`.
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
        keys.TOKENIZER_MODEL: "llama",
        keys.TOKENIZER_PRE: "default",
        keys.TOKEN_SCORES: [float(-rank.get(text, 0)) for text in tokens],
        keys.ADD_SPACE_PREFIX: _adds_space(tokenizer),
    }


def _adds_space(tokenizer: Json) -> bool:
    """Whether the normalizer or the pre-tokenizer puts a space before a text."""
    normalizer, pre = tokenizer.get("normalizer") or {}, tokenizer.get("pre_tokenizer") or {}
    steps = [*(normalizer.get("normalizers") or [normalizer]), *(pre.get("pretokenizers") or [pre])]
    for step in steps:
        if step.get("type") == "Prepend":
            return step.get("prepend") == SPACE
        if step.get("type") == "Metaspace":
            return step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never") != "never"
    return False


def _tokens(path: Path, tokenizer: Json, n_vocab: int) -> tuple[list[str], list[int]]:
    """Texts and types by id. Ids that the tokenizer leaves out get names such as '[PAD7]', as in llama.cpp."""
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
    """Formats a merge as 'left right'. Newer files allow a space inside a part; it is written as its byte-level letter
    'Ġ'."""
    if isinstance(merge, str):
        return merge
    return " ".join(part.replace(" ", "Ġ") for part in merge)


def _pre_tokenizer(tokenizer: Json) -> tuple[str, list[str]]:
    pre = tokenizer.get("pre_tokenizer") or {}
    steps: list[Json] = (pre.get("pretokenizers") or []) if pre.get("type") == "Sequence" else [pre]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return BYTE_LEVEL_SPLIT, []
    if kinds == ["Digits", "ByteLevel"]:
        return DIGITS_THEN_BYTE_LEVEL, []
    if kinds == ["Split", "ByteLevel"]:
        given = steps[0].get("pattern")
        pattern = given.get("Regex") if isinstance(given, dict) else None
        if isinstance(pattern, str) and pattern in SPLITS:
            return SPLITS[pattern], []
    nearest = SPLITS[CL100K_BY_THREE] if DIGITS_BY_THREE in json.dumps(pre) else BYTE_LEVEL_SPLIT
    return nearest, [
        f"llama.cpp has no pre-tokenizer for {json.dumps(pre)[:200]}; granite4v tokenizes with the stored "
        "tokenizer.json, but other programs will split text differently"
    ]


def _special_ids(tokenizer: Json, settings: Json, configs: tuple[Json, ...], n_vocab: int) -> dict[str, int]:
    ids = {entry["content"]: int(entry["id"]) for entry in tokenizer.get("added_tokens") or []}
    found: dict[str, int] = {}
    for kind, key in SPECIAL_TOKENS.items():
        named = settings.get(f"{kind}_token")
        text = named.get("content") if isinstance(named, dict) else named
        candidates: list[Any] = [ids.get(text)] if isinstance(text, str) else []
        for config in configs:
            value = config.get(f"{kind}_token_id")
            candidates.append(value[0] if isinstance(value, list) and value else value)
        for value in candidates:
            if is_integer(value) and 0 <= value < n_vocab:
                found[key] = value
                break
    return found


def _generation(folder: Path) -> Json:
    return _optional(folder / "generation_config.json")


def _further_ends(end: int | None, configs: tuple[Json, ...], n_vocab: int) -> list[int]:
    """The tokens other than `end` that end an answer, from the first configuration that has any: transformers'
    `generate` uses those of generation_config.json."""
    for config in configs:
        value: Any = config.get("eos_token_id")
        found: list[int] = [token for token in (value if isinstance(value, list) else [value]) if is_integer(token)]
        if found:
            return [token for token in dict.fromkeys(found) if token != end and 0 <= token < n_vocab]
    return []


def _adds_bos(tokenizer: Json, settings: Json) -> bool:
    """Whether text starts with the BOS token. The post-processor decides; without one, 'add_bos_token' does."""
    processor = tokenizer.get("post_processor") or {}
    for step in processor.get("processors") or [processor]:
        single = step.get("single")
        if step.get("type") == "TemplateProcessing":
            first = single[0] if isinstance(single, list) and single else {}
            return isinstance(first, dict) and "SpecialToken" in first
    if not processor:
        return bool(settings.get("add_bos_token", False))
    return False
