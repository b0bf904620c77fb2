"""Writes a training run as a checkpoint in the layout of Granite Vision 4.0: base, adapter, tokenizer, curve.

Also restores a run from such a checkpoint, so that training can continue from it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from scripts.nano.language import build_tokenizer, write_language_files
from scripts.nano.spec import LORA_TARGETS, NANO, NANO_ADAPTER, TEXT
from scripts.nano.trainer import STAGES
from tests.toy.spec import adapter_config, model_config, preprocessor_config, processor_config

N_CURVE_POINTS = 60


def export(run: Path, out: Path, others: Sequence[Path] = ()) -> None:
    """Writes the checkpoint of `run` into `out`, in float16. Raises FileNotFoundError when a stage was not trained.

    The weights that the last stage trained are averaged with those in `others`, saves of the same stage.
    """
    weights: dict[str, torch.Tensor] = {}
    for stage in STAGES:
        weights |= torch.load(run / f"{stage}.pt", weights_only=True)["weights"]
    if others:
        saves = [torch.load(path, weights_only=True)["weights"] for path in (run / "read.pt", *others)]
        weights |= {name: sum(save[name] for save in saves) / len(saves) for name in saves[0]}
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    write_language_files(out, tokenizer)
    ids = {"n_vocab": tokenizer.n_vocab, "pad_id": tokenizer.pad_id, "image_id": tokenizer.image_id}
    _write_json(out / "config.json", model_config(NANO, tokenizer))
    _write_json(out / "preprocessor_config.json", preprocessor_config(NANO))
    _write_json(out / "processor_config.json", processor_config(NANO))
    _write_json(out / "generation_config.json", {"do_sample": False, "eos_token_id": tokenizer.end_of_text_id})
    _write_json(
        out / "adapter_config.json",
        adapter_config(NANO_ADAPTER, sorted(target.split(".")[1] for target in LORA_TARGETS)),
    )
    model = {name: value for name, value in weights.items() if name.startswith("model.") and "lora_" not in name}
    adapter = {f"base_model.model.{name}": value for name, value in weights.items() if "lora_" in name}
    for name, tensors in (("model", model), ("adapter_model", adapter)):
        halves = {key: value.half().contiguous() for key, value in tensors.items()}
        save_file(halves, out / f"{name}.safetensors", metadata={"format": "pt"})
    _write_json(out / "training.json", {"tokenizer": ids, "stages": {stage: curve(run, stage) for stage in STAGES}})


def restore(checkpoint: Path, run: Path) -> None:
    """Writes the stages of `run` as if they had ended with the weights of `checkpoint`. Classifiers start anew.

    Later training appends to the curves, with minutes counted from 0 again.
    """
    model = {name: value.float() for name, value in load_file(checkpoint / "model.safetensors").items()}
    adapter = {
        name.removeprefix("base_model.model."): value.float()
        for name, value in load_file(checkpoint / "adapter_model.safetensors").items()
    }
    base = {name: value for name, value in model.items() if name.startswith(TEXT)}
    tower = {name: value for name, value in model.items() if name not in base}
    for stage, weights in (("base", base), ("tower", tower), ("way", adapter)):
        content = {"weights": weights, "optimizers": None, "minutes": 0.0, "step": 0, "level": 1.0}
        torch.save(content, run / f"{stage}.pt")
    known = json.loads((checkpoint / "training.json").read_text())["stages"]
    for stage in STAGES:
        records = sorted(known[stage]["curve"] + known[stage]["held out"], key=lambda record: record["minutes"])
        (run / f"{stage}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def curve(run: Path, stage: str) -> dict[str, Any]:
    """Returns a stage's training curve, thinned, and its figures on held-out samples."""
    lines = (run / f"{stage}.jsonl").read_text().splitlines()
    records = [{name: value for name, value in json.loads(line).items() if not math.isnan(value)} for line in lines]
    trained = [record for record in records if "step" in record]
    step = max(1, len(trained) // N_CURVE_POINTS)
    return {"curve": trained[::step], "held out": [record for record in records if "held out" in record]}


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
