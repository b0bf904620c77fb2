"""Copies a text file of random weights with the vocabulary of cl100k_base, on which Granite 4's is built.

    python -m scripts.with_vocabulary build/full/text-Q4_K_M.gguf cl100k_base.tiktoken build/cl100k/text-Q4_K_M.gguf

The tokenizer of toy checkpoints is trained on a few lines and splits words like 'assistant' into five tokens. Prompts
therefore have more text tokens than with a published model, which distorts the measured time of a short question. This
script copies the file, replaces its merges and its tokens before the special ones, and drops its tokenizer.json.

The ranks file has a line for each token: its bytes in base64, and its rank, as tiktoken 0.12 reads it. tiktoken
downloads it; the PyPI package litellm has a copy in its `litellm_core_utils/tokenizers`.
"""

from __future__ import annotations

import argparse
import base64
import itertools
from pathlib import Path

import gguf

from granite4v import gguf_keys as keys
from granite4v.runtime.prompt.tokenizer import byte_of_letter

MERGES = gguf.Keys.Tokenizer.MERGES
Ranks = dict[bytes, int]
_LETTERS = {byte: letter for letter, byte in byte_of_letter().items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("ranks", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    copy(options.text, read_ranks(options.ranks.read_bytes()), options.out)
    return 0


def read_ranks(content: bytes) -> Ranks:
    """Parses a ranks file into {token: rank}."""
    pairs = (line.split() for line in content.splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def merges(ranks: Ranks) -> list[tuple[bytes, bytes]]:
    """Returns the pairs that are merged, in order.

    Each token of two or more bytes is made of two tokens of lower rank: the two that remain after merging its bytes by
    lower ranks only. Raises ValueError when a token is not made of two others.
    """
    pairs = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            found = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            i = found.index(min(found))
            if found[i] >= rank:
                raise ValueError(f"token {token!r} is not made of two others")
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            pairs.append((parts[0], parts[1]))
    return pairs


def spelled(token: bytes) -> str:
    """Spells a token in the letters that byte-level vocabularies use for bytes."""
    return "".join(map(_LETTERS.__getitem__, token))


def copy(text: Path, ranks: Ranks, out: Path) -> None:
    reader = gguf.GGUFReader(text)
    own = reader.fields[keys.TOKENS].contents()
    tokens = [spelled(token) for token, _ in sorted(ranks.items(), key=lambda item: item[1])]
    if len(tokens) > len(own):
        raise ValueError(f"'{text}' has {len(own)} tokens, the vocabulary {len(tokens)}")
    replaced = {
        keys.TOKENS: [*tokens, *own[len(tokens) :]],
        MERGES: [f"{spelled(first)} {spelled(second)}" for first, second in merges(ranks)],
    }
    writer = gguf.GGUFWriter(out, reader.fields[keys.GENERAL_ARCHITECTURE].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in (keys.GENERAL_ARCHITECTURE, keys.TOKENIZER_HF_JSON):
            continue
        kind, item = field.types[0], field.types[-1]
        value = replaced.get(name, field.contents())
        writer.add_key_value(name, value, kind, item if kind == gguf.GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    raise SystemExit(main())
