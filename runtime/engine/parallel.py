"""How many answers a batch of questions generates at once, and what memory that takes."""

from __future__ import annotations

from dataclasses import dataclass

from granite4v import gguf_keys as keys
from granite4v.families.hf_fields import MAX_WIDTH
from granite4v.memory import available_bytes
from granite4v.runtime.llama.files import MAX_COUNT, ModelFiles

# Two cores of an AVX-512 CPU decode a 4B model in Q4_K_M at 2.4 times the tokens a second with 16 sequences and at 2.7
# with 32, which take twice the memory.
MAX_PARALLEL = 16
PROMPT_TOKENS = 1536  # a page of ten tiles, its question, and the template
ANSWER_TOKENS = 1024  # of an answer that is longer than most; sequences become larger for those that are longer still
# The KV cache may take a quarter of what is available, and a little more than the weights, but for small models. Twice
# that for longer answers than were expected.
WEIGHTS_SHARE, LEAST_BUDGET, MOST_FACTOR = 1.2, 256 << 20, 2
_VALUE_BYTES = 2  # the KV cache is kept in half precision


@dataclass(frozen=True)
class Workload:
    """What a model is loaded for: many questions, asked side by side. `n_questions`: None where that is not known;
    `max_tokens` of an answer: None for as many as fit."""

    n_questions: int | None = None
    max_tokens: int | None = None


def choose_parallel(files: ModelFiles, workload: Workload, n_ctx: int, available: int | None = None) -> int:
    """The number of sequences, at least 1: as many as there are questions, and as memory and `MAX_PARALLEL` allow.

    `available`: bytes; by default what the system tells.
    """
    most = MAX_PARALLEL if workload.n_questions is None else min(MAX_PARALLEL, max(1, workload.n_questions))
    n_tokens = min(n_ctx, PROMPT_TOKENS + min(ANSWER_TOKENS, workload.max_tokens or ANSWER_TOKENS))
    return max(1, min(most, _budget_tokens(files, available) // n_tokens))


def most_cells(files: ModelFiles, available: int | None = None) -> int:
    """Tokens that several sequences together may have room for."""
    return MOST_FACTOR * _budget_tokens(files, available)


def _budget_tokens(files: ModelFiles, available: int | None) -> int:
    budget = max(WEIGHTS_SHARE * sum(path.stat().st_size for path in files.text_paths), LEAST_BUDGET)
    available = available_bytes() if available is None else available
    if available is not None:
        budget = min(budget, available / 4)
    return int(budget // max(1, kv_bytes_per_token(files)))


def kv_bytes_per_token(files: ModelFiles) -> int:
    """Bytes of the KV cache that one token of one sequence takes."""
    text, key = files.text, files.text_key
    width = text.integer(key(keys.EMBEDDING_LENGTH), 1, MAX_WIDTH)
    n_layers = text.integer(key(keys.BLOCK_COUNT), 1, MAX_COUNT)
    heads = _per_layer(files, keys.HEAD_COUNT, n_layers, [0])
    kv_heads = _per_layer(files, keys.HEAD_COUNT_KV, n_layers, heads)
    head_dim = width // max(1, *heads)
    length = text.integer(key(keys.KEY_LENGTH), 0, MAX_WIDTH, head_dim)
    length += text.integer(key(keys.VALUE_LENGTH), 0, MAX_WIDTH, head_dim)
    return sum(kv_heads) * length * _VALUE_BYTES


def _per_layer(files: ModelFiles, key: str, n_layers: int, default: list[int]) -> list[int]:
    """A count for each layer; files give one for all, or a list."""
    value = files.text.get(files.text_key(key), default)
    if isinstance(value, list):
        return files.text.integers(files.text_key(key), 0, MAX_WIDTH, default)
    return [files.text.integer(files.text_key(key), 0, MAX_WIDTH)] * n_layers
