"""Measures how batching several sequences affects values on the CPU: whether bits are identical, else the difference.

    python -m scripts.batch_exactness
    python -m scripts.batch_exactness --types F16 Q4_K_M --threads 2 --lengths 40 700

A small text model with random weights is converted to each weight type. For each type, each kernel (weights in plain
buffers, plain buffers with the engine's compiled kernels for a few rows, or weights in each special buffer type of this
CPU that multiplies the type), number of threads, flash attention on and off, and unified and separate KV buffers, one
sequence is decoded alone in a context of one sequence, which gives the reference, and again in the ways below. A figure
is the largest difference of its logits from the reference; 0 means identical bits. Cache figures compare the sequence's
saved state byte by byte and count the differing bytes.

`--model` names a text GGUF (or 'nano' for the embedded model) to measure instead of the random one. stderr gets one
line for each setting; the last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import itertools
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from granite4v.converter import Options, convert
from granite4v.converter.policy import TEXT_TYPES
from granite4v.default_model import embedded_model
from granite4v.ggml.backend import Backend, buffer_type_name
from granite4v.ggml.gguf_file import GgufFile
from granite4v.ggml.kernels import COMPILED, PLAIN
from granite4v.runtime.engine.parallel import node_kernels
from granite4v.runtime.llama.context import node_callback
from granite4v.runtime.llama.files import ModelFiles
from granite4v.runtime.llama.library import capture_log, llama, log
from granite4v.runtime.llama.model import LlamaModel
from granite4v.runtime.llama.placement import Copy, Placement
from granite4v.runtime.llama.weight_copies import open_model
from tests.toy.checkpoint import PRESETS, write_checkpoint

N_STEPS = 6  # forced tokens after the prompt
N_SEQUENCES = 9  # the one that is measured and eight others
N_UBATCH = 512
N_CHUNK = 200  # tokens at the end of a prompt that share a call with other sequences
# Wide enough for K-quants and for heads of 64.
SPEC = replace(
    PRESETS["tiny-granite-3.3"],
    text_hidden=512,
    text_ffn=1024,
    text_heads=8,
    text_kv_heads=2,
    attention_multiplier=0.125,
)

Row = tuple[int, int, int]  # token, position, sequence


@dataclass(frozen=True)
class Setting:
    """One combination of settings. `length`: tokens of the measured sequence's prompt."""

    weights: str
    kernel: str
    threads: int
    flash: bool
    unified: bool
    length: int


class Context:
    """A llama.cpp context of several sequences, without the engine's bookkeeping."""

    def __init__(
        self,
        model: LlamaModel,
        setting: Setting,
        *,
        n_seq_max: int,
        n_ctx: int,
        n_ubatch: int = N_UBATCH,
        n_outputs_max: int = 64,
        callback: Any = None,
    ) -> None:
        lib = llama()
        self.model, self.n_seq_max, self.unified = model, n_seq_max, setting.unified
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = (
            n_ctx,
            max(N_UBATCH, n_ubatch),
            n_ubatch,
            n_seq_max,
        )
        params.n_outputs_max = n_outputs_max
        params.n_threads = params.n_threads_batch = setting.threads
        params.type_k = params.type_v = 1  # GGML_TYPE_F16
        params.flash_attn_type = 1 if setting.flash else 0
        params.offload_kqv = params.op_offload = False
        params.kv_unified = setting.unified
        if callback is not None:
            params.cb_eval = callback
        capture_log()
        self.handle = lib.llama_init_from_model(model.handle, params)
        if not self.handle:
            raise SystemExit(f"llama.cpp cannot make a context of {n_ctx} tokens: {log().reason()}")
        self.memory = lib.llama_get_memory(self.handle)

    def decode(self, rows: Sequence[Row], wanted: Sequence[bool]) -> dict[int, np.ndarray]:
        """Decodes tokens of any sequences in one call. Returns {row index: logits} for the wanted rows."""
        lib, n = llama(), len(rows)
        ids = [(ctypes.c_int32 * 1)(sequence) for _, _, sequence in rows]
        batch = lib.llama_batch(
            n_tokens=n,
            token=(ctypes.c_int32 * n)(*(token for token, _, _ in rows)),
            pos=(ctypes.c_int32 * n)(*(position for _, position, _ in rows)),
            n_seq_id=(ctypes.c_int32 * n)(*[1] * n),
            seq_id=(ctypes.POINTER(ctypes.c_int32) * n)(
                *(ctypes.cast(one, ctypes.POINTER(ctypes.c_int32)) for one in ids)
            ),
            logits=(ctypes.c_int8 * n)(*map(int, wanted)),
        )
        capture_log()
        status = lib.llama_decode(self.handle, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode failed with status {status}: {log().reason()}")
        return {i: self.logits(i) for i in range(n) if wanted[i]}

    def logits(self, row: int) -> np.ndarray:
        pointer = llama().llama_get_logits_ith(self.handle, row)
        return np.ctypeslib.as_array(pointer, shape=(self.model.n_vocab,)).copy()

    def extend(self, tokens: Sequence[int], position: int, sequence: int) -> np.ndarray:
        """Appends tokens to one sequence in calls of `N_UBATCH`, as a prefill does. Returns the last token's logits."""
        found: dict[int, np.ndarray] = {}
        for start in range(0, len(tokens), N_UBATCH):
            part = tokens[start : start + N_UBATCH]
            rows = [(token, position + start + i, sequence) for i, token in enumerate(part)]
            found = self.decode(rows, [i == len(part) - 1 for i in range(len(part))])
        return found[max(found)]

    def copy(self, source: int, target: int, n_tokens: int) -> None:
        """Makes `target` a copy of the first `n_tokens` of `source`. Between separate buffers llama.cpp can only copy a
        complete sequence (anything else ends the process), so the rest is cut off afterwards."""
        llama().llama_memory_seq_cp(self.memory, source, target, -1, -1)
        self.cut(target, n_tokens)

    def cut(self, sequence: int, n_tokens: int) -> None:
        if not llama().llama_memory_seq_rm(self.memory, sequence, n_tokens, -1):
            raise RuntimeError(f"llama_memory_seq_rm cannot cut sequence {sequence} at {n_tokens}")

    def state(self, sequence: int, n_tokens: int) -> np.ndarray:
        """Returns the keys and values of a sequence of `n_tokens` as bytes, without the table of cells at the front,
        which names the sequence (12 bytes a token; a few bytes of the first keys are cut off with it)."""
        data = self.full_state(sequence)
        n_behind = 0 if self.unified else self.n_seq_max - 1 - sequence  # streams after it: four bytes each
        return data[16 * (n_tokens + 8) : len(data) - 4 * n_behind]

    def full_state(self, sequence: int) -> np.ndarray:
        lib = llama()
        data = np.empty(lib.llama_state_seq_get_size(self.handle, sequence), dtype=np.uint8)
        n = lib.llama_state_seq_get_data(
            self.handle, data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)), len(data), sequence
        )
        return data[:n]

    def restore(self, sequence: int, state: np.ndarray) -> None:
        data = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if llama().llama_state_seq_set_data(self.handle, data, len(state), sequence) == 0:
            raise RuntimeError(f"llama.cpp cannot take over the cached sequence: {log().reason()}")

    def close(self) -> None:
        llama().llama_free(self.handle)


class Case:
    """The prompts and the reference of one setting, and the ways to decode the first sequence again."""

    def __init__(self, model: LlamaModel, setting: Setting, callback: Any = None) -> None:
        rng = np.random.default_rng(7)
        self.model, self.setting, self.callback = model, setting, callback
        n_vocab = min(model.n_vocab, 380)  # without the special tokens of the toy vocabularies
        lengths = [setting.length, *(setting.length // 4 + 11 * i for i in range(1, N_SEQUENCES))]
        self.prompts = [rng.integers(0, n_vocab, n).tolist() for n in lengths]
        self.forced = [rng.integers(0, n_vocab, N_STEPS).tolist() for _ in lengths]
        self.n_ctx = 256 * (-(-(max(lengths) + 64) // 256))
        self.reference, self.reference_state = self.alone(n_seq_max=1, sequence=0)
        with self.context(1) as context:
            context.extend(self.prompts[0], 0, 0)
            rows = [(token, setting.length + i, 0) for i, token in enumerate(self.forced[0])]
            found = context.decode(rows, [True] * N_STEPS)
            self.together = np.stack([found[i] for i in range(N_STEPS)])

    @contextlib.contextmanager
    def context(self, n_seq_max: int, n_ubatch: int = N_UBATCH) -> Iterator[Context]:
        context = Context(
            self.model,
            self.setting,
            n_seq_max=n_seq_max,
            n_ctx=self.n_ctx * n_seq_max,
            n_ubatch=n_ubatch,
            callback=self.callback,
        )
        try:
            yield context
        finally:
            context.close()

    def alone(self, *, n_seq_max: int, sequence: int, others_first: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Decodes the first prompt and its forced tokens alone, with `others_first` other prompts in the cache. Returns
        the logits at the prompt's end and at each forced token (1 + N_STEPS rows), and the state after the prompt."""
        with self.context(n_seq_max) as context:
            for other in range(1, others_first + 1):
                context.extend(self.prompts[other], 0, (sequence + other) % n_seq_max)
            rows = [context.extend(self.prompts[0], 0, sequence)]
            state = context.state(sequence, self.setting.length)
            rows += [self.step(context, [0], {0: sequence}, i)[0] for i in range(N_STEPS)]
            return np.stack(rows), state

    def step(self, context: Context, members: Sequence[int], ids: dict[int, int], i: int) -> dict[int, np.ndarray]:
        """Decodes the i-th forced token of each member in one call. Returns {member: logits}."""
        rows = [(self.forced[m][i], len(self.prompts[m]) + i, ids[m]) for m in members]
        found = context.decode(rows, [True] * len(rows))
        return {member: found[row] for row, member in enumerate(members)}

    @contextlib.contextmanager
    def full_context(self) -> Iterator[Context]:
        """A context in which all prompts are prefilled one by one, the measured sequence's second."""
        with self.context(N_SEQUENCES) as context:
            for member in (1, 0, *range(2, N_SEQUENCES)):
                context.extend(self.prompts[member], 0, member)
            yield context

    def among(self, context: Context, members: Sequence[int]) -> np.ndarray:
        """Returns the first sequence's logits when it is decoded as one row of a batch. Undoes the steps afterwards."""
        ids = {member: member for member in members}
        rows = [self.step(context, members, ids, i)[0] for i in range(N_STEPS)]
        self.rewind(context)
        return np.stack(rows)

    def last(self, n_rows: int) -> np.ndarray:
        """Returns the first sequence's logits when it is the last row of a batch, with the highest id."""
        ids = {member: (member - 1) % n_rows for member in range(n_rows)}
        members = [*range(1, n_rows), 0]
        with self.context(N_SEQUENCES) as context:
            for member in members:
                context.extend(self.prompts[member], 0, ids[member])
            return np.stack([self.step(context, members, ids, i)[0] for i in range(N_STEPS)])

    def several(self, context: Context, n_others: int) -> np.ndarray:
        """Decodes all forced tokens of the first sequence in one batch with one row of each of `n_others` sequences."""
        rows = [(token, self.setting.length + i, 0) for i, token in enumerate(self.forced[0])]
        rows += [(self.forced[m][0], len(self.prompts[m]), m) for m in range(1, n_others + 1)]
        found = context.decode(rows, [True] * len(rows))
        self.rewind(context)
        return np.stack([found[i] for i in range(N_STEPS)])

    def rewind(self, context: Context) -> None:
        for member, prompt in enumerate(self.prompts):
            context.cut(member, len(prompt))

    def copied(self, n_others: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the logits at the prompt's end and at each step, in two ways: with the prefix and the rest prefilled
        as two parts in a context of one sequence, and with the prefix copied from another sequence."""
        cut = self.setting.length * 2 // 3
        with self.context(1) as context:
            context.extend(self.prompts[0][:cut], 0, 0)
            expected = self.rest(context, cut)
        with self.context(N_SEQUENCES) as context:
            context.extend(self.prompts[0][: cut + 5], 0, N_SEQUENCES - 1)
            for member in range(1, n_others + 1):
                context.extend(self.prompts[member], 0, member)
            context.copy(N_SEQUENCES - 1, 0, cut)
            return expected, self.rest(context, cut)

    def rest(self, context: Context, cut: int) -> np.ndarray:
        rows = [context.extend(self.prompts[0][cut:], cut, 0)]
        rows += [self.step(context, [0], {0: 0}, i)[0] for i in range(N_STEPS)]
        return np.stack(rows)

    def prefilled_together(self, n_ubatch: int, *, decoding: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Returns logits and state of the first prompt when its last chunk shares a call with another prompt, or with
        single rows of `decoding` sequences that decode already. Sequence ids rise, as a shared ubatch requires."""
        start = max(0, self.setting.length - N_CHUNK)
        rows = [(token, start + i, 0) for i, token in enumerate(self.prompts[0][start:])]
        n = len(rows)
        with self.context(N_SEQUENCES, n_ubatch) as context:
            if start:
                context.extend(self.prompts[0][:start], 0, 0)
            for member in range(1, 1 + decoding):
                context.extend(self.prompts[member], 0, member)
                rows.append((self.forced[member][0], len(self.prompts[member]), member))
            if not decoding:
                rows += [(token, i, 1) for i, token in enumerate(self.prompts[1][:N_CHUNK])]
            found = context.decode(rows, [i >= n - 1 for i in range(n)] + [decoding > 0] * (len(rows) - n))
            return found[n - 1], context.state(0, self.setting.length)

    def prefilled_apart(self, n_ubatch: int) -> tuple[np.ndarray, np.ndarray]:
        """Prefills the same chunks without other sequences, in a context of one sequence."""
        start = max(0, self.setting.length - N_CHUNK)
        with self.context(1, n_ubatch) as context:
            if start:
                context.extend(self.prompts[0][:start], 0, 0)
            logits = context.extend(self.prompts[0][start:], start, 0)
            return logits, context.state(0, self.setting.length)


def figures(case: Case) -> dict[str, float]:
    """Returns {way: largest difference from the reference, or number of differing state bytes}; 0: identical bits."""
    out: dict[str, float] = {}
    logits, state = case.alone(n_seq_max=8, sequence=5)
    out["alone in a context of 8"] = difference(case.reference, logits)
    out["alone in a context of 8: cache bytes"] = differing(case.reference_state, state)
    logits, state = case.alone(n_seq_max=8, sequence=0, others_first=3)
    out["alone, 3 others in the cache"] = difference(case.reference, logits)
    out["alone, 3 others in the cache: cache bytes"] = differing(case.reference_state, state)
    with case.full_context() as context:
        in_all = {n: case.among(context, range(n)) for n in range(1, N_SEQUENCES + 1)}
        for n, rows in in_all.items():
            out[f"first of {n} rows"] = difference(case.reference[1:], rows)
        out["first of 2 rows against first of 7"] = difference(in_all[2], in_all[7])
        out["3 rows with a gap between their ids"] = difference(in_all[3], case.among(context, (0, 2, 5)))
        out["3 rows in falling order of ids"] = difference(in_all[3], case.among(context, (2, 1, 0)))
        for n_others in (0, 2, 8):
            together = case.several(context, n_others)
            out[f"6 tokens at once beside {n_others}, against alone"] = difference(case.together, together)
    out["6 tokens at once, against one by one"] = difference(case.reference[1:], case.together)
    for n in (3, 5, 7):
        out[f"last of {n} rows against first"] = difference(in_all[n], case.last(n))
    for n_others in (0, 2):
        out[f"prefix copied from a sequence, {n_others} others in the cache"] = difference(*case.copied(n_others))
    for n_ubatch in (N_UBATCH, 128):
        expected, expected_state = case.prefilled_apart(n_ubatch)
        logits, state = case.prefilled_together(n_ubatch)
        out[f"prompts together, ubatch {n_ubatch}"] = difference(expected, logits)
        out[f"prompts together, ubatch {n_ubatch}: cache bytes"] = differing(expected_state, state)
        logits, state = case.prefilled_together(n_ubatch, decoding=3)
        out[f"prompt beside 3 decoding rows, ubatch {n_ubatch}"] = difference(expected, logits)
        out[f"prompt beside 3 decoding rows, ubatch {n_ubatch}: cache bytes"] = differing(expected_state, state)
    return out


def difference(expected: np.ndarray, found: np.ndarray) -> float:
    return float(np.abs(expected.astype(np.float64) - found).max())


def differing(expected: np.ndarray, found: np.ndarray) -> int:
    """Counts differing bytes. Contexts of several streams write a few more bytes at the front, which are ignored."""
    n = min(len(expected), len(found))
    return int((expected[-n:] != found[-n:]).sum())


def kernels(path: Path) -> Iterator[tuple[str, Placement]]:
    """Yields plain weights twice (`PLAIN`, `COMPILED`), and each special buffer type with the weights it multiplies."""
    yield PLAIN, Placement()
    yield COMPILED, Placement()
    backend = Backend("cpu", 1)
    try:
        with GgufFile.open(path) as file:
            weights = [i for i in file.tensors.values() if i.name.startswith("blk.") and len(i.shape) == 2]
            for buffer_type in backend.extra_buffer_types():
                name = buffer_type_name(buffer_type)
                fits = [i.name for i in weights if backend.multiplies(buffer_type, i.type_name, i.shape[1], i.shape[0])]
                if fits:
                    yield name, Placement(tuple(Copy(weight, name, buffer_type) for weight in fits))
    finally:
        backend.close()


def measure(path: Path, weights: str, options: argparse.Namespace) -> Iterator[tuple[Setting, dict[str, float]]]:
    with ModelFiles.open(path) as files:
        compiled = node_callback(node_kernels(files, "cpu", "f16"))
    for kernel, placement in kernels(path):
        if kernel == COMPILED and compiled is None:
            continue
        callback = compiled if kernel == COMPILED else None
        with open_model(path, placement) as model:
            for length, threads, flash, unified in itertools.product(
                options.lengths, options.threads, (True, False), (True, False)
            ):
                setting = Setting(weights, kernel, threads, flash, unified, length)
                yield setting, figures(Case(model, setting, callback))


def text_files(options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Path]]:
    """Yields (name of the weight type, text GGUF) for each model to measure."""
    if options.model:
        yield options.model, text_path(options.model)
        return
    checkpoint = write_checkpoint(folder / "checkpoint", SPEC)
    for kind in options.types:
        convert(checkpoint, folder / kind, Options(kind, "F16"))
        yield kind, folder / kind / f"text-{kind}.gguf"


def text_path(model: str) -> Path:
    """Returns the text GGUF of a model directory or of 'nano', the embedded model."""
    path = embedded_model(lambda _: None) if model == "nano" else Path(model)
    return next(path.glob("text-*.gguf")) if path.is_dir() else path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a text GGUF, a model directory, or 'nano'; by default a random model")
    parser.add_argument("--types", nargs="+", default=list(TEXT_TYPES), choices=TEXT_TYPES)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--lengths", nargs="+", type=int, default=[40, 700], help="tokens of the measured prompt")
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    worst: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with tempfile.TemporaryDirectory() as directory:
        for weights, path in text_files(options, Path(directory)):
            for setting, found in measure(path, weights, options):
                results.append({**vars(setting), "figures": found})
                unequal = {name: value for name, value in found.items() if value}
                short = ", ".join(f"{name} {value:.2g}" for name, value in unequal.items())
                print(f"{setting}: {short or 'all the same bits'}", file=sys.stderr, flush=True)
                mode = f"flash {'on' if setting.flash else 'off'}, {'unified' if setting.unified else 'separate'}"
                for name, value in found.items():
                    worst[mode][name].append(value)
    summary = {
        mode: {
            name: {"same": values.count(0), "of": len(values), "worst": max(values)} for name, values in ways.items()
        }
        for mode, ways in worst.items()
    }
    print(json.dumps({"summary": summary, "results": results}))


if __name__ == "__main__":
    main()
