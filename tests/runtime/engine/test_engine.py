"""Tests of many requests at once on a real model: no answer depends on the others, nothing is computed twice, and no
sequence stays in use."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import granite4v
from granite4v.ggml.compiled.nodes import NodeKernels
from granite4v.runtime import GenerationOptions, Stream
from granite4v.runtime.engine.parallel import Workload
from granite4v.runtime.grammar.grammar import Grammar
from tests.helpers.pictures import noise_picture
from tests.toy.spec import PRESETS

PICTURES = [noise_picture((150, 100), seed) for seed in range(4)]
LONG: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True, "repetition": False}


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path]) -> Iterator[granite4v.Model]:
    """One thread and float32 weights: rows computed with others then have the same bits, whichever others these are."""
    with granite4v.load(make_model(PRESETS["tiny"]), device="cpu", exact=False, n_threads=1) as model:
        yield model


def n_prompt_tokens(model: granite4v.Model, prompt: str, images: list[Any]) -> int:
    return model.prepare(prompt, images).n_tokens


def test_four_streams_at_once_share_their_steps(model: granite4v.Model) -> None:
    alone = [model.generate("What?", [picture], **LONG).text for picture in PICTURES]
    model.clear_cache()
    before = model.counters
    # submitted between two steps, so that no answer is far ahead of another
    streams = model.engine.call(lambda _: [model.stream("What?", [picture], **LONG) for picture in PICTURES])
    assert [stream.result().text for stream in streams] == alone
    assert model.counters.n_steps - before.n_steps < 2 * 39  # one by one it would be 156


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("granite4v.ggml.compiled.nodes.llvm", lambda: None)


@pytest.mark.usefixtures("no_kernels")
def test_attention_is_chosen_by_what_a_model_is_loaded_for(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """Logits equal those of float32 attention up to float16 rounding: 0.01 without flash attention, 0.05 with it."""
    path = make_model(PRESETS["tiny"])
    store = granite4v.PageStore(tmp_path / "pages")
    ways: list[tuple[dict[str, Any], bool]] = [
        ({}, False),
        ({"exact": True, "workload": Workload(9)}, False),
        ({"workload": Workload(9)}, True),
        ({"workload": Workload(9), "page_store": store}, False),
        ({"n_ctx": 512, "cache_type": "q8_0"}, True),
    ]
    logits = []
    for options, expected in ways:
        with granite4v.load(path, **{"device": "cpu", "exact": False, "n_threads": 1, **options}) as model:
            assert model.settings["flash_attention"] is expected, options
            if "cache_type" not in options:  # q8_0 blocks are wider than the heads of this model
                logits.append(model.logits("What?", PICTURES[:1]))
    for found in logits:
        np.testing.assert_allclose(found, logits[1], rtol=0, atol=0.1)
    assert not np.array_equal(logits[0], logits[2])


@pytest.mark.skipif(not NodeKernels.available((64, 2)).attention, reason="needs llvmlite and AVX-512")
@pytest.mark.parametrize("workload", [Workload(4), None])
def test_answers_are_decoded_with_compiled_attention(
    make_model: Callable[..., Path], request: pytest.FixtureRequest, workload: Workload | None
) -> None:
    """They differ from float32 answers only by the rounding of keys and values."""
    path, found = make_model(PRESETS["tiny-wide"]), {}
    for name in ("exact", "compiled", "ggml"):
        if name == "ggml":
            request.getfixturevalue("no_kernels")
        options: dict[str, Any] = {"exact": True} if name == "exact" else {"exact": False, "workload": workload}
        with granite4v.load(path, device="cpu", n_threads=2, **options) as model:
            expected = {"exact": NodeKernels.available(rotary=True), "compiled": NodeKernels.available((64, 2))}
            assert model.settings.get("compiled") == (expected[name].description if name in expected else None)
            streams = [model.stream("What?", [picture], logprobs=0, **LONG) for picture in PICTURES]
            entries = [stream.result().logprobs for stream in streams]
        found[name] = np.array([[entry.logprob for entry in each or ()] for each in entries])
    assert 0 < np.abs(found["compiled"] - found["exact"]).max() < 0.02
    assert not np.array_equal(found["compiled"], found["ggml"])


@pytest.mark.skipif(not NodeKernels.available((64, 2), ["F16"]).products, reason="needs llvmlite and AVX-512 VNNI")
@pytest.mark.parametrize("is_forced", [False, True])
@pytest.mark.parametrize("text_type", ["F16", "Q8_0", "Q4_K_M"])
def test_compiled_answers_have_the_same_bits_beside_others(
    make_model: Callable[..., Path], text_type: str, is_forced: bool
) -> None:
    """Forced tokens add as many rows to a step as all answers together may have."""
    fields = {"a": {"const": "0123456789" * 12}, "b": {"type": "string"}}
    schema = json.dumps({"type": "object", "properties": fields, "required": ["a", "b"]})
    options: dict[str, Any] = {**LONG, "max_tokens": 160} if is_forced else LONG
    constraint = Grammar("kvp", schema=schema) if is_forced else None

    def logprobs(streams: Sequence[Stream]) -> list[list[float]]:
        return [[entry.logprob for entry in stream.result().logprobs or ()] for stream in streams]

    path = make_model(PRESETS["tiny-wide"], text_type)
    with granite4v.load(path, device="cpu", n_threads=2, exact=False, workload=Workload(4)) as model:

        def ask(picture: Any) -> Stream:
            return model.stream("What?", [picture], logprobs=0, constraint=constraint, **options)

        alone = [logprobs([ask(picture)])[0] for picture in PICTURES]
        model.clear_cache()
        before = model.counters
        streams = model.engine.call(lambda _: [ask(picture) for picture in PICTURES])
        assert logprobs(streams) == alone
        assert model.counters.n_steps - before.n_steps < 2 * options["max_tokens"]


def test_answers_outgrow_their_sequences_together(
    make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their cells move to larger sequences through a file, and no row is computed twice."""
    long: dict[str, Any] = {**LONG, "max_tokens": 400}
    monkeypatch.setattr("granite4v.runtime.engine.kv_cache.MIN_ANSWER", 16)
    monkeypatch.setattr("granite4v.runtime.engine.moved_states.IN_MEMORY_BYTES", 0)
    with granite4v.load(make_model(PRESETS["tiny"]), device="cpu", exact=False, n_threads=1) as model:
        alone = [model.generate("What?", [picture], **long).tokens for picture in PICTURES[:3]]
        model.clear_cache()
        before = model.counters
        streams = [model.stream("What?", [picture], **long) for picture in PICTURES[:3]]
        assert [stream.result().tokens for stream in streams] == alone
        assert model.settings["n_ctx"] % 256 == 0 and model.settings["n_ctx"] > 512
        n_prompts = sum(n_prompt_tokens(model, "What?", [picture]) for picture in PICTURES[:3])
        assert model.counters.n_prefilled - before.n_prefilled <= n_prompts


def test_two_interleaved_streams_prefill_once_each(model: granite4v.Model) -> None:
    model.clear_cache()
    before = model.counters
    streams = [model.stream("What?", [picture], **LONG) for picture in PICTURES[:2]]
    pieces: list[list[str]] = [[], []]
    while not all(stream.is_done for stream in streams):
        for i, stream in enumerate(streams):
            pieces[i] += [piece for piece in [next(stream, "")] if piece]
    n_prompts = sum(n_prompt_tokens(model, "What?", [picture]) for picture in PICTURES[:2])
    after = model.counters
    assert after.n_prefilled - before.n_prefilled <= n_prompts and after.n_preempted == before.n_preempted


def test_questions_about_one_image_prefill_it_once(model: granite4v.Model) -> None:
    model.clear_cache()
    before = model.counters
    questions = ("What?", "How many?", "Where?")
    streams = [model.stream(question, PICTURES[:1], **LONG) for question in questions]
    answers = [stream.result() for stream in streams]
    n_alone = sum(n_prompt_tokens(model, question, PICTURES[:1]) for question in questions)
    assert model.counters.n_prefilled - before.n_prefilled <= n_alone - 2 * answers[0].timings.n_image
    assert sum(answer.timings.n_encoded for answer in answers) == 1


@pytest.mark.parametrize("workload", [None, Workload()])
def test_a_batch_keeps_no_embeddings_of_pages_that_it_has_read(
    make_model: Callable[..., Path], workload: Workload | None
) -> None:
    """Without a workload they are kept: pages may be asked about again, perhaps after the KV cache has lost them."""
    half = make_model(PRESETS["tiny"], "F16", "F16")
    with granite4v.load(half, device="cpu", n_threads=1, n_parallel=2, workload=workload) as model:
        n_encoded = [
            model.generate("What?", [picture], max_tokens=1).timings.n_encoded for picture in (*PICTURES, PICTURES[0])
        ]
    assert n_encoded == [1] * len(PICTURES) + [0 if workload is None else 1]


def test_cancelling_one_leaves_the_others_tokens(model: granite4v.Model) -> None:
    alone = [model.generate("What?", [picture], **LONG).tokens for picture in PICTURES[:3]]
    streams = [model.stream("What?", [picture], **LONG) for picture in PICTURES[:3]]
    next(streams[1])
    streams[1].cancel()
    assert [streams[i].result().tokens for i in (0, 2)] == [alone[0], alone[2]]
    assert streams[1].result().finish_reason in ("cancelled", "length")


def test_a_stream_that_nobody_reads_slows_nobody(
    make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("granite4v.runtime.engine.stream.QUEUE_SIZE", 4)
    with granite4v.load(make_model(PRESETS["tiny"]), device="cpu", exact=False, n_parallel=2) as model:
        unread = model.stream("What?", PICTURES[:1], **LONG)
        for i in range(3):
            assert len(model.generate(f"And {i}?", **LONG).tokens) == 40
        assert not unread.is_done and len(unread.answer.tokens) < 40
        text = "".join(unread)
        assert unread.answer.finish_reason == "length" and text == unread.answer.text


def test_a_computation_is_aborted_only_if_nobody_else_wants_it(model: granite4v.Model) -> None:
    prompts = ["word " * 400, "word " * 401]
    expected = model.generate(prompts[0], max_tokens=3, ignore_eos=True).tokens
    model.clear_cache()
    streams = [model.stream(prompt, max_tokens=3, ignore_eos=True) for prompt in prompts]
    streams[1].close()
    assert streams[0].result().tokens == expected
    assert streams[1].answer.finish_reason == "cancelled"


def test_threads_may_ask_as_they_like(model: granite4v.Model) -> None:
    prompts = [f"Question {i}?" for i in range(8)]
    expected = {prompt: model.generate(prompt, max_tokens=10).tokens for prompt in prompts}
    found: dict[str, list[int]] = {}

    def ask(prompt: str) -> None:
        found[prompt] = model.generate(prompt, max_tokens=10).tokens

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


@pytest.mark.slow
def test_random_orders_leave_nothing_behind() -> None:
    """Submits, reads, cancels, closes and drops streams of the embedded model at random; no sequence stays in use."""
    with granite4v.load(device="cpu") as model:
        for seed in range(100):
            rng = random.Random(seed)
            streams: list[Stream] = []
            stream: Stream | None = None
            for _ in range(rng.randint(3, 12)):
                action = rng.choice(("submit", "submit", "read", "cancel", "close", "drop"))
                if action == "submit":
                    images = [rng.choice(PICTURES)] if rng.random() < 0.2 else []
                    streams.append(model.stream("x" * rng.randint(1, 9), images, max_tokens=rng.randint(0, 20)))
                elif streams and action == "drop":
                    streams.pop(rng.randrange(len(streams)))
                elif streams:
                    stream = rng.choice(streams)
                    {"read": lambda s: next(s, ""), "cancel": Stream.cancel, "close": Stream.close}[action](stream)
            while streams:
                streams.pop().result()
            stream = None
            gc.collect()
            for _ in range(2):  # the second call comes after a step, which ends dropped streams
                model.clear_cache()
            assert model.engine.n_sequences_in_use == 0, seed


@pytest.mark.parametrize("raised", [SystemExit(3), KeyboardInterrupt(), MemoryError("none left")])
def test_whatever_ends_a_step_leaves_no_reader_waiting(model: granite4v.Model, raised: BaseException) -> None:
    """Even if it is not an `Exception`. The engine goes on with later requests."""
    expected = model.generate("Hello", **LONG).tokens
    model.clear_cache()

    def listener() -> None:
        raise raised

    beside = model.stream("And this?", PICTURES[:1], **LONG)
    stream = model.submit(model.prepare("What?"), GenerationOptions(max_tokens=40), listener=listener)
    with pytest.raises((RuntimeError, MemoryError), match="interrupted|none left"):
        stream.result()
    with contextlib.suppress(RuntimeError, MemoryError):  # it may not have been part of that step
        beside.result()
    assert model.generate("Hello", **LONG).tokens == expected
    model.clear_cache()
    assert model.engine.n_sequences_in_use == 0


def test_closing_ends_every_stream(make_model: Callable[..., Path]) -> None:
    model = granite4v.load(make_model(PRESETS["tiny"]), device="cpu", exact=False)
    streams = [model.stream("Hello", [picture], max_tokens=3000, ignore_eos=True) for picture in PICTURES]
    next(streams[0])
    model.close()
    for stream in streams:
        with pytest.raises(ValueError, match="the model is closed"):
            list(stream)


def test_a_process_ends_with_a_stream_under_way(make_model: Callable[..., Path]) -> None:
    code = (
        "import sys, granite4v\n"
        "model = granite4v.load(sys.argv[1], device='cpu')\n"
        "stream = model.stream('Hello', max_tokens=3000, ignore_eos=True)\n"
        "print(len(next(stream)) > 0)"
    )
    command = [sys.executable, "-c", code, str(make_model(PRESETS["tiny"]))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


def test_a_token_that_the_model_does_not_have_ends_no_other_request(model: granite4v.Model) -> None:
    stream = model.stream("Hello", **LONG)
    next(stream)
    for wrong in (10**6, 2**40, -1):
        with pytest.raises(ValueError, match="vocabulary|0 or more"):
            model.score("What?", tokens=[wrong, 1])
    assert len(stream.result().tokens) == 40


def test_progress_of_an_image_may_use_the_model(model: granite4v.Model) -> None:
    model.clear_cache()
    seen: list[tuple[str, int]] = []

    def progress(stage: str, done: int, total: int) -> None:
        seen.append((stage, threading.get_ident()))
        assert len(model.generate("Hello", max_tokens=2, ignore_eos=True).tokens) == 2

    model.encode_image(PICTURES[0], progress=progress)
    assert seen and set(seen) == {("encode", threading.get_ident())}


def test_a_model_may_be_closed_while_an_image_is_encoded(make_model: Callable[..., Path]) -> None:
    model = granite4v.load(make_model(PRESETS["tiny"]), device="cpu", exact=False)
    with pytest.raises(ValueError, match="the model is closed"):
        model.encode_image(noise_picture((900, 700), 9), progress=lambda *_: model.close())


def test_a_close_that_is_interrupted_still_ends_every_stream(
    make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = granite4v.load(make_model(PRESETS["tiny"]), device="cpu", exact=False)
    streams = [model.stream("Hello", max_tokens=3000, ignore_eos=True) for _ in range(6)]
    next(streams[0])
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.close()
    for stream in streams:
        with pytest.raises(ValueError, match="the model is closed"):
            list(stream)
    model.close()


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_may_drop_what_it_has_inherited(make_model: Callable[..., Path]) -> None:
    code = (
        "import os, sys, granite4v\n"
        "model = granite4v.load(sys.argv[1], device='cpu')\n"
        "stream = model.stream('Hello', max_tokens=3000, ignore_eos=True)\n"
        "next(stream)\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    stream.cancel(); stream.close(); model.close()\n"
        "    for use in (stream.result, model.clear_cache, lambda: next(stream), lambda: model.logits('x')):\n"
        "        try: use()\n"
        "        except granite4v.DeviceError: continue\n"
        "        os._exit(1)\n"
        "    os._exit(0)\n"
        "print(os.waitpid(child, 0)[1])\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(make_model(PRESETS["tiny"]))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")
