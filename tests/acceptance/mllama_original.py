"""Compares Llama 3.2 Vision numerically with transformers 4.45, whose tower follows the published weights' rule.

    pip install --no-deps --target OLD transformers==4.45.2 tokenizers==0.20.3 huggingface-hub==0.36.0
    python -m tests.acceptance.mllama_original --site OLD

All other packages come from this environment. The random checkpoints have cross-attention layers first, in a row and
last. Prints the differences in an image's projected states and in the logits before each token of an answer. The exit
status is 1 if states differ by more than 2e-5 (relative L2), logits by more than 1e-4, or a token. Prompts that begin
with an image, and texts, are compared with unmodified transformers; for others, rows before the first image pass the
cross-attention layers unchanged, for which transformers 4.45 is patched. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from granite4v.clip_projector import VisionEncoder, load_image
from granite4v.clip_projector.cross_features import CrossFeatures
from granite4v.converter import Options, convert
from granite4v.runtime.model import Model
from granite4v.runtime.prompt.spans import ImageSpan, Prompt
from tests.helpers.mllama_cases import CASES, PICTURES, ids_of, pictures_of
from tests.toy.checkpoint import PRESETS, CheckpointSpec, write_checkpoint

SPECS = {name: replace(PRESETS[name], naming="old") for name in ("tiny-mllama", "tiny-mllama-first")}
N, N_LONG = 32, 4
STATES, LOGITS = 2e-5, 1e-4
LONG = 200  # tokens


def prompts(model: Model) -> Iterable[tuple[str, Prompt, bool]]:
    """Yields each case's name and prompt, and whether transformers has to be patched to pass rows before the first
    image unchanged."""
    for name, messages in CASES.items():
        prompt = model.prepare(messages, pictures_of(messages))
        is_text = not prompt.images
        yield name, prompt, not is_text
        while not is_text and not isinstance(prompt.spans[0], ImageSpan):
            prompt = replace(prompt, spans=prompt.spans[1:])
        if not is_text:
            yield f"{name}, image first", prompt, False


def compare(spec: CheckpointSpec, site: Path, folder: Path) -> dict[str, Any]:
    checkpoint = write_checkpoint(folder / "checkpoint", spec)
    convert(checkpoint, folder / "model", Options("F32", "F32"))
    paths = [folder / f"{i}.png" for i in range(len(PICTURES))]
    for path, picture in zip(paths, PICTURES, strict=True):
        picture.save(path)
    image_token = json.loads((checkpoint / "config.json").read_text())["image_token_index"]
    with Model.load(folder / "model", n_threads=1, exact=True) as model:
        todo = list(prompts(model))
        cases = [
            {
                "name": name,
                "ids": ids_of(prompt, image_token),
                "pictures": list(range(len(prompt.images))),
                "n": N if prompt.n_tokens < LONG else N_LONG,
                "early_rows_pass": early,
            }
            for name, prompt, early in todo
        ]
        (folder / "job.json").write_text(json.dumps({"pictures": [str(path) for path in paths], "cases": cases}))
        command = [sys.executable, "-m", "tests.peers.mllama_4_45", checkpoint, folder / "job.json", folder / "out.npz"]
        subprocess.run(list(map(str, command)), check=True, env={**os.environ, "PYTHONPATH": str(site)})
        theirs = np.load(folder / "out.npz")
        logits, same = {}, {}
        for name, prompt, _ in todo:
            answer, expected = theirs[f"answer {name}"].tolist(), theirs[f"logits {name}"]
            found = model.score(prompt, tokens=answer)[: len(answer)]
            logits[name] = float(np.abs(found - expected).max())
            same[name] = found.argmax(-1).tolist() == answer
    with VisionEncoder(folder / "model" / "mmproj-F32.gguf", n_threads=1) as encoder:
        encoded = [encoder.encode([load_image(path)])[0] for path in paths]
    states = []
    for i, features in enumerate(encoded):
        assert isinstance(features, CrossFeatures)
        expected = theirs[f"states {i}"]
        states.append(float(np.linalg.norm(features.states - expected) / np.linalg.norm(expected)))
    return {"states": states, "logits": logits, "same_tokens": all(same.values())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", type=Path, required=True, help="a folder of packages, with transformers 4.45")
    options = parser.parse_args()
    result: dict[str, Any] = {}
    for name, spec in SPECS.items():
        with tempfile.TemporaryDirectory() as folder:
            result[name] = compare(spec, options.site.resolve(), Path(folder))
    print(json.dumps(result))
    return int(
        any(
            max(found["states"]) > STATES or max(found["logits"].values()) > LOGITS or not found["same_tokens"]
            for found in result.values()
        )
    )


if __name__ == "__main__":
    sys.exit(main())
