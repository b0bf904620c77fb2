"""Computes how much memory a model takes and the longest context that fits."""

from __future__ import annotations

from pathlib import Path

from granite4v import gguf_keys as keys
from granite4v.doctor.machine import available_memory
from granite4v.doctor.section import Problem, Section
from granite4v.errors import Granite4vError
from granite4v.runtime.engine.parallel import kv_bytes_per_token
from granite4v.runtime.engine.text_model import DEFAULT_CONTEXT
from granite4v.runtime.llama.files import MAX_COUNT, ModelFiles

WORKING_BYTES = 500_000_000  # for the vision and text graphs, in addition to weights and KV cache


def check_model(path: str | Path) -> Section:
    """Compares the memory needs of a model with the available memory. Weights count in full, although their files are
    memory-mapped and their pages shared with other processes."""
    try:
        with ModelFiles.open(path) as files:
            return _describe(files)
    except (Granite4vError, OSError) as error:
        return Section("model", [str(error)], {"path": str(path), "error": str(error)}, [Problem(str(error))])


def _describe(files: ModelFiles) -> Section:
    paths = [*files.text_paths, *(file.path for file in (files.vision, files.adapter) if file is not None)]
    weights = sum(path.stat().st_size for path in paths)
    per_token = kv_bytes_per_token(files)
    trained = files.text.integer(files.text_key(keys.CONTEXT_LENGTH), 1, MAX_COUNT)
    default = min(DEFAULT_CONTEXT, trained)
    room = available_memory()
    data = {
        "files": [str(path) for path in paths],
        "weights_bytes": weights,
        "kv_bytes_per_token": per_token,
        "trained_context": trained,
        "default_context": default,
    }
    lines = [
        f"{', '.join(path.name for path in paths)}: {_size(weights)}",
        f"context: {default:,} tokens by default, which take {_size(default * per_token)}; {trained:,} at most",
    ]
    if room is None:
        return Section("model", lines, data)
    fits = max(0, min(trained, (room - weights - WORKING_BYTES) // per_token)) if per_token else trained
    data["context_that_fits"] = fits
    lines.append(f"about {fits:,} tokens fit into the memory that is available" if fits else "does not fit into memory")
    problems = []
    if fits < default:
        text = (
            f"The model and a context of {default:,} tokens take about "
            f"{_size(weights + WORKING_BYTES + default * per_token)}, but {_size(room)} are available; use smaller "
            "weight types ('--text-type Q4_K_M'), a smaller '--ctx-size', or a machine with more memory."
        )
        problems.append(Problem(text))
    return Section("model", lines, data, problems)


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"
