"""Chooses how many answers a batch of questions generates at once, by the speed gained and the memory available."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from granite4v import clip_projector
from granite4v import gguf_keys as keys
from granite4v.choices import CacheType, whole_number
from granite4v.families.hf_fields import MAX_WIDTH
from granite4v.ggml.backend import find_device, is_cpu
from granite4v.ggml.compiled.nodes import NO_KERNELS, NodeKernels
from granite4v.memory import available_bytes
from granite4v.runtime.engine.kv_cache import MIN_ANSWER, SEQUENCE_STEP
from granite4v.runtime.engine.step_trial import step_seconds
from granite4v.runtime.llama.files import MAX_COUNT, ModelFiles

DEFAULT_PARALLEL = 4  # sequences without a workload
ONE_AT_A_TIME = "its decoder attends to images, which is computed for one sequence at a time"
# Used where nothing is measured. Two cores of an AVX-512 CPU decode a 4B model in Q4_K_M at 2.4 times the tokens per
# second of one sequence with 16 sequences and at 2.7 times with 32, which take twice the memory.
USUAL_PARALLEL = 16
# A number of sequences counts as good as a larger one with up to this many times its tokens per second, because it
# takes less memory.
WORTH = 1.07
MEASURED_FROM = 32  # questions; a shorter batch gains less time than measuring takes
PAGE_PX = (2550, 3300)  # a US Letter page, larger than any model takes it
TEXT_TOKENS = 256  # question and chat template
# The KV cache may take up to a quarter of the available memory and up to this share of the weights' bytes (but at least
# LEAST_BUDGET, for small models); and MOST_FACTOR times that where prompts or answers are longer than expected. That is
# room for 16 sequences of a 4B model in Q4_K_M, 2.35 GB; on Linux only occupied cells are in memory.
WEIGHTS_SHARE, LEAST_BUDGET, MOST_FACTOR = 1.15, 256 << 20, 1.3
# Without flash attention the attention scores of a batch take rows x cells x heads x 4 bytes: 0.15 GB for a 4B model
# with a page of 1,800 cells, 0.67 GB with 8,192 cells.
MOST_SCORES = 1 << 30  # bytes
# bytes per KV value; Q8_0 has blocks of 32
_VALUE_BYTES: dict[CacheType, float] = {"f16": 2, "q8_0": 34 / 32}


@dataclass(frozen=True)
class Workload:
    """What a model is loaded for: many questions asked concurrently. `n_questions`: None if unknown; `max_tokens` of an
    answer: None for as many as fit. `announce`: called before something is measured."""

    n_questions: int | None = None
    max_tokens: int | None = None
    announce: Callable[[], None] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Width:
    """How many answers are generated concurrently, and the reason in a few words."""

    n: int
    reason: str


def n_sequences(
    files: ModelFiles,
    asked: int | None,
    workload: Workload | None,
    n_ctx: int,
    device: str,
    n_threads: int,
    cache_type: CacheType,
    *,
    exact: bool,
) -> tuple[int, Width | None]:
    """Returns how many sequences an engine may have, and the reason if the number was chosen here. `asked`: None to
    choose the number that is worthwhile for the workload, or the default."""
    n = DEFAULT_PARALLEL if asked is None else whole_number("n_parallel", asked, 1)
    if files.is_cross_attending:
        return 1, Width(1, ONE_AT_A_TIME)
    width = None
    if asked is None and workload is not None and not exact:
        on_cpu = is_cpu(find_device(device))  # a GPU multiplies a few rows in the time of reading its weights

        def seconds(most: int) -> dict[int, float]:
            kernels = node_kernels(files, device, cache_type)
            return step_seconds(files, n_threads, most, workload.announce, kernels) if on_cpu else {}

        width = choose_width(files, workload, n_ctx, seconds, cache_type)
        n = width.n
    if workload is not None and workload.n_questions:
        n = min(n, workload.n_questions)
    return (1 if exact else n), width


def needs_flash(files: ModelFiles, n_cells: int, n_ubatch: int, device: str, cache_type: CacheType) -> bool:
    """Whether to use flash attention even for one conversation or a few.

    On a CPU it takes up to half as long again, because it goes through the keys row by row where two matrix products
    handle many rows together. So a CPU uses it only for a quantized cache, which has no alternative, and for a large
    context, whose scores would take more than `MOST_SCORES` bytes. Other devices always use it.
    """
    if not is_cpu(find_device(device)) or cache_type != "f16":
        return True
    n_layers = files.text.integer(files.text_key(keys.BLOCK_COUNT), 1, MAX_COUNT)
    return 4 * n_ubatch * n_cells * max(_per_layer(files, keys.HEAD_COUNT, n_layers, [0])) > MOST_SCORES


def node_kernels(files: ModelFiles, device: str, cache_type: CacheType) -> NodeKernels:
    """Returns a decoder's compiled kernels: attention (f16 cache and uniform heads only), and products of its weight
    types."""
    if not is_cpu(find_device(device)):
        return NO_KERNELS
    heads, kv_heads, lengths = _attention_sizes(files)
    is_uniform = len({*heads}) == 1 and len({*kv_heads}) == 1 and lengths[0] == lengths[1]
    fits = cache_type == "f16" and is_uniform and kv_heads[0] > 0 and heads[0] % kv_heads[0] == 0
    kinds = {info.type_name for info in files.text.tensors.values() if len(info.shape) == 2}
    return NodeKernels.available((lengths[0], heads[0] // kv_heads[0]) if fits else None, kinds)


def exact_kernels(device: str) -> NodeKernels:
    """Returns the compiled kernels for comparing values with transformers': only rotary, which brings them closer."""
    return NodeKernels.available(rotary=True) if is_cpu(find_device(device)) else NO_KERNELS


def choose_width(
    files: ModelFiles,
    workload: Workload,
    n_ctx: int,
    step_seconds: Callable[[int], Mapping[int, float]],
    cache_type: CacheType = "f16",
    available: int | None = None,
) -> Width:
    """Chooses the number of answers: as many as there are questions, as fit into memory, and as are worthwhile; at
    least one.

    `step_seconds(most)`: seconds of a decode step by its number of sequences, ascending, up to `most` or slightly more;
    empty if unknown. It is called only for a long batch. `available`: bytes; by default what the system reports.
    """
    n_tokens = _expected_tokens(files, workload, n_ctx)
    fitting = max(1, _budget_tokens(files, available, cache_type) // n_tokens)
    asked = fitting if workload.n_questions is None else max(1, workload.n_questions)
    is_long = workload.n_questions is None or workload.n_questions >= MEASURED_FROM
    seconds = step_seconds(min(fitting, asked)) if is_long and fitting > 1 else {}
    best = fastest(seconds) if seconds else USUAL_PARALLEL
    n = min(best, fitting, asked)
    parts = []
    if n == asked < min(best, fitting):
        parts.append("one for each question")
    elif fitting < best:
        parts.append("as many as memory has room for")
    if n > 1 and 1 in seconds and max(seconds) >= n:
        taken = float(np.interp(n, list(seconds), list(seconds.values())))
        parts.append(f"{n * seconds[1] / taken:.1f} times the tokens a second of one")
    parts.append(f"up to {_size(n * n_tokens * kv_bytes_per_token(files, cache_type))} of KV cache")
    return Width(n, ", ".join(parts))


def fastest(seconds: Mapping[int, float]) -> int:
    """Returns the smallest number of sequences that is about as good as the best (see `WORTH`). `seconds`: of a step by
    number of sequences."""
    best = max(n / taken for n, taken in seconds.items())
    return min(n for n, taken in seconds.items() if n / taken * WORTH >= best)


def most_cells(files: ModelFiles, available: int | None = None, cache_type: CacheType = "f16") -> int:
    """Maximum number of cells of several sequences together."""
    return int(MOST_FACTOR * _budget_tokens(files, available, cache_type))


def _expected_tokens(files: ModelFiles, workload: Workload, n_ctx: int) -> int:
    """Size, in tokens, of a sequence with room for a page at this model's largest size and an answer."""
    config = files.vision_config
    sizes = (PAGE_PX, PAGE_PX[::-1])
    n_page = 0 if config is None else max(clip_projector.count_tokens(size, config) for size in sizes)
    n_tokens = n_page + TEXT_TOKENS + min(MIN_ANSWER, workload.max_tokens or MIN_ANSWER)
    return min(n_ctx, -(-n_tokens // SEQUENCE_STEP) * SEQUENCE_STEP)


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"


def _budget_tokens(files: ModelFiles, available: int | None, cache_type: CacheType) -> int:
    budget = max(WEIGHTS_SHARE * sum(path.stat().st_size for path in files.text_paths), LEAST_BUDGET)
    available = available_bytes() if available is None else available
    if available is not None:
        budget = min(budget, available / 4)
    return int(budget // max(1, kv_bytes_per_token(files, cache_type)))


def kv_bytes_per_token(files: ModelFiles, cache_type: CacheType = "f16") -> int:
    """Bytes of the KV cache per token of one sequence."""
    _, kv_heads, lengths = _attention_sizes(files)
    return int(sum(kv_heads) * sum(lengths) * _VALUE_BYTES[cache_type])


def _attention_sizes(files: ModelFiles) -> tuple[list[int], list[int], tuple[int, int]]:
    """Returns the number of heads and of key/value heads by layer, and the lengths of a key and a value."""
    text, key = files.text, files.text_key
    width = text.integer(key(keys.EMBEDDING_LENGTH), 1, MAX_WIDTH)
    n_layers = text.integer(key(keys.BLOCK_COUNT), 1, MAX_COUNT)
    heads = _per_layer(files, keys.HEAD_COUNT, n_layers, [0])
    kv_heads = _per_layer(files, keys.HEAD_COUNT_KV, n_layers, heads)
    head_dim = width // max(1, *heads)
    lengths = (text.integer(key(name), 0, MAX_WIDTH, head_dim) for name in (keys.KEY_LENGTH, keys.VALUE_LENGTH))
    return heads, kv_heads, (next(lengths), next(lengths))


def _per_layer(files: ModelFiles, key: str, n_layers: int, default: list[int]) -> list[int]:
    """Returns a count for each layer; files give one for all layers, or a list."""
    value = files.text.get(files.text_key(key), default)
    if isinstance(value, list):
        return files.text.integers(files.text_key(key), 0, MAX_WIDTH, default)
    return [files.text.integer(files.text_key(key), 0, MAX_WIDTH)] * n_layers
