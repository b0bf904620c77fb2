"""Llama 4's decoder compared numerically with transformers': dense layers and experts, one or two experts per token,
beyond one chunk of attention; its adapters and its quantized files.

Two float32 computations with random weights differ by the order of sums: observed 4e-5 for logits up to 19.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DynamicCache, Llama4ForConditionalGeneration

from granite4v.converter import Options, convert, policy
from granite4v.ggml.compiled.nodes import NodeKernels
from granite4v.runtime.model import Model
from granite4v.runtime.prompt.spans import TextSpan
from tests.helpers.damaged import edit, refusal
from tests.toy.checkpoint import PRESETS, AdapterSpec, write_adapter

SPECS = {name: PRESETS[f"tiny-llama4{name and '-'}{name}"] for name in ("", "scout", "maverick")}
WIDE = PRESETS["tiny-llama4-wide"]
TOLERANCE = 1e-4
PROMPTS = ("What is this?", "Read the table and say what its rows add up to. " * 6)


class Decoder:
    """transformers' decoder alone, because its whole model cannot be called in 5.23."""

    def __init__(self, directory: Path, attention: str = "eager", adapter: Path | None = None) -> None:
        model, info = Llama4ForConditionalGeneration.from_pretrained(
            directory, dtype=torch.float32, attn_implementation=attention, output_loading_info=True
        )
        assert not any(info.values()), info
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
        self.model = model.language_model.eval()

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Returns the logits of every position, float32 (n, n_vocab)."""
        with torch.inference_mode():
            found: np.ndarray = self.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].numpy()
        return found

    def greedy(self, ids: Sequence[int], n: int) -> tuple[list[int], np.ndarray]:
        """Returns the `n` likeliest next tokens (greedy), and the logits before each."""
        answer: list[int] = []
        rows, cache, new = [], DynamicCache(), list(ids)
        with torch.inference_mode():
            for _ in range(n):
                rows.append(
                    self.model(torch.tensor([new]), past_key_values=cache, use_cache=True).logits[0, -1].numpy()
                )
                new = [int(rows[-1].argmax())]
                answer += new
        return answer, np.stack(rows)


def ids_of(model: Model, prompt: str) -> list[int]:
    spans = model.prepare(prompt).spans
    return [token for span in spans if isinstance(span, TextSpan) for token in span.tokens]


@pytest.mark.parametrize("name", SPECS)
def test_answers_are_transformers(
    name: str, make_checkpoint: Callable[..., Path], make_model: Callable[..., Path]
) -> None:
    """Experts in every second layer, one per token; in every layer, two per token; 128 of them, without the norm."""
    reference = Decoder(make_checkpoint(SPECS[name]))
    with Model.load(make_model(SPECS[name]), n_threads=1, exact=True) as model:
        for prompt in PROMPTS:
            answer, expected = reference.greedy(ids_of(model, prompt), 32)
            assert len(set(answer)) > 8
            found = model.score(prompt, tokens=answer)[:32]
            assert np.abs(found - expected).max() <= TOLERANCE
            assert found.argmax(-1).tolist() == answer


def test_what_came_before_changes_nothing(make_model: Callable[..., Path]) -> None:
    """Rows of other prompts in a batch, and reused prefixes, do not change the bits of an answer."""
    folder = make_model(SPECS["scout"])
    fresh = []
    for prompt in PROMPTS:
        with Model.load(folder, n_threads=1) as model:
            fresh.append(model.logits(prompt))
    with Model.load(folder, n_threads=1) as model:
        for i in (0, 1, 1, 0):
            assert np.array_equal(model.logits(PROMPTS[i]), fresh[i])


@pytest.mark.slow
@pytest.mark.skipif(not NodeKernels.available(rotary=True), reason="needs llvmlite")
def test_beyond_one_chunk_of_attention(make_checkpoint: Callable[..., Path], make_model: Callable[..., Path]) -> None:
    """Tokens of the second chunk attend to the first only in every fourth layer, whose queries are scaled there.

    The first tokens of a chunk attend to few others, so that float32 errors of angles of thousands of radians do not
    cancel out: transformers is 3e-4 from float64 there, for logits up to 18. Ours uses the same angles and is 3e-5 from
    transformers; llama.cpp rounds its angles in other places, and its logits are 6e-4 away.
    """
    spec = replace(SPECS[""], text_layers=4)
    reference = Decoder(make_checkpoint(spec), attention="sdpa")
    with Model.load(make_model(spec), n_threads=1, exact=True, n_ctx=8448) as model:
        prompt = "Read the table. "
        per_turn = len(ids_of(model, prompt * 11)) - len(ids_of(model, prompt * 10))
        prompt = prompt * ((8180 - len(ids_of(model, ""))) // per_turn)
        ids = ids_of(model, prompt)
        assert 8100 < len(ids) < 8192
        answer = [int(token) for token in np.random.default_rng(0).integers(0, 256, 8288 - len(ids))]
        found = model.score(prompt, tokens=answer)[: len(answer)]
        expected = reference.logits([*ids, *answer])[len(ids) - 1 : -1]
        assert np.abs(found - expected).max() <= TOLERANCE
        n_first = 8192 - (len(ids) - 1)  # rows of the first chunk
        again = model.score(prompt, tokens=answer[:n_first])[:n_first]  # back across the border
        assert np.abs(again - expected[:n_first]).max() <= TOLERANCE


@pytest.mark.parametrize("text_type", policy.TEXT_TYPES)
def test_quantized_files_answer(text_type: str, make_model: Callable[..., Path]) -> None:
    """The fewer bits, the larger the difference to float32: 0.12 with Q6_K, 0.52 with Q4_0, because random routers
    easily choose other experts. For unrelated logits it would be 1.4. The bytes are compared in `test_quant.py`."""
    with Model.load(make_model(WIDE), n_threads=1, exact=True) as exact:
        expected = exact.logits(PROMPTS[0])
    with Model.load(make_model(WIDE, text_type), n_threads=1) as model:
        found = model.logits(PROMPTS[0])
        assert model.generate(PROMPTS[0], max_tokens=8).tokens[0] == found.argmax()
    difference = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert difference < {"F32": 1e-2, "F16": 1e-2, "BF16": 5e-2, "Q8_0": 0.1, "Q6_K": 0.3}.get(text_type, 0.8)


def test_adapters_merged_and_apart(
    make_checkpoint: Callable[..., Path], make_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Attention, dense layers and shared experts; PEFT supports routed experts only on bare parameters."""
    spec = SPECS["scout"]
    adapter = write_adapter(tmp_path / "adapter", spec, AdapterSpec())
    reference = Decoder(make_checkpoint(spec), adapter=adapter)
    logits: dict[str, np.ndarray] = {}
    for mode in ("merge", "separate"):
        folder = tmp_path / mode
        convert(make_checkpoint(spec), folder, Options("F32", "F32", mode, str(adapter)))
        with Model.load(folder, n_threads=1, exact=True) as model:
            logits[mode] = model.logits(PROMPTS[0], lora=mode == "separate" or None)
            ids = ids_of(model, PROMPTS[0])
            if mode == "separate":
                logits["without"] = model.logits(PROMPTS[0], lora=False)
    expected = reference.logits(ids)[-1]
    for mode in ("merge", "separate"):
        assert np.abs(logits[mode] - expected).max() <= TOLERANCE, mode
    with Model.load(make_model(spec), n_threads=1, exact=True) as model:
        assert np.array_equal(model.logits(PROMPTS[0]), logits["without"])
    assert np.abs(logits["without"] - expected).max() > 0.1


def test_an_adapter_on_bare_parameters_is_refused(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", SPECS[""], AdapterSpec())
    edit(adapter / "adapter_config.json", lambda config: config.update(target_parameters=["experts.down_proj"]))
    assert "LoRA on bare parameters ('target_parameters')" in refusal(make_checkpoint(SPECS[""]), adapter=str(adapter))
