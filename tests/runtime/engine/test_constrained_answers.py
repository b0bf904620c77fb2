"""Tests of a model's answers under a grammar, compared with a loop that masks the full distribution at each step."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import granite4v
from granite4v.errors import ConstraintError
from granite4v.runtime.formats.task_grammar import grammar_for
from granite4v.runtime.grammar.automaton import advance, start
from granite4v.runtime.grammar.grammar import Grammar
from tests.helpers.constrained import compiler, end_of_text, tokenizer
from tests.helpers.grammars import CLOSED, TASKS, is_text, own_matcher, rule_of, task_grammar
from tests.helpers.pictures import noise_picture
from tests.toy.spec import PRESETS


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path]) -> Iterator[granite4v.Model]:
    with granite4v.load(make_model(PRESETS["tiny"]), device="cpu", n_threads=1) as model:
        yield model


def masked_greedily(model: granite4v.Model, task: str, max_tokens: int) -> list[int]:
    """Tries every token at each step and takes the most likely one that the grammar accepts; returns these tokens."""
    matcher = own_matcher("toy", CLOSED)
    pieces, end, tokens = compiler("toy").index.pieces, end_of_text("toy"), list[int]()
    while len(tokens) < max_tokens:
        logits = model.score("What?", tokens=[*tokens, 0])[-1]
        if task == "kvp":
            allowed = [t for t in range(len(pieces)) if matcher.validate_tokens([t]) == 1]
        else:
            text = b"".join(pieces[t] for t in tokens)
            behind = advance(start(rule_of(task)), text)
            assert behind is not None
            allowed = [t for t, p in enumerate(pieces) if p and is_text(text + p) and advance(behind, p) is not None]
            allowed += [end] if behind.is_accepting and is_text(text + b" ") else []
        token = max(allowed, key=lambda t: (logits[t], -t))
        if token == end:
            break
        tokens.append(token)
        matcher.consume_token(token)
        if task == "kvp" and matcher.is_stopped():
            break
    return tokens


@pytest.mark.parametrize("task", TASKS)
def test_greedy_answers_are_those_of_masking_the_full_distribution(model: granite4v.Model, task: str) -> None:
    answer = model.generate(
        "What?", max_tokens=200, constraint=task_grammar(task), fast_forward=False, repetition=False
    )
    assert answer.tokens[:30] == masked_greedily(model, task, 30)
    n_closing = len(compiler("toy").index.spell((answer.closing or "").encode()))
    assert answer.timings.n_forced <= n_closing + 1, "a character that was not whole belongs to the end"


def test_fast_forward_changes_the_tokens_and_not_the_text_that_is_forced(model: granite4v.Model) -> None:
    schema = {
        "type": "object",
        "properties": {name: {"enum": [1, 2]} for name in ("a_long_name", "another_name", "größe")},
        "required": ["a_long_name", "another_name", "größe"],
    }
    grammar = grammar_for("kvp", schema)
    slow = model.generate("What?", max_tokens=100, constraint=grammar, fast_forward=False)
    fast = model.generate("What?", max_tokens=100, constraint=grammar)
    for answer in (slow, fast):
        assert answer.finish_reason == "stop"
        assert list(json.loads(answer.text)) == list(schema["properties"])  # type: ignore[call-overload]
    assert fast.tokens == tokenizer("toy").encode_plain(fast.text)
    timings = fast.timings
    assert timings.n_forced > 15 and timings.n_generated == len(fast.tokens)
    assert timings.n_steps < len(fast.tokens) - timings.n_forced + 2
    assert slow.timings.n_steps >= len(slow.tokens) - 1


def test_forced_text_alone_costs_one_decode(model: granite4v.Model) -> None:
    grammar = grammar_for("kvp", {"const": {"answer": [1, 2, 3], "text": "for certain"}})
    answer = model.generate("What?", max_tokens=100, constraint=grammar)
    assert json.loads(answer.text) == {"answer": [1, 2, 3], "text": "for certain"}
    assert answer.finish_reason == "stop"
    assert answer.timings.n_forced == len(answer.tokens) and answer.timings.n_steps == 0
    cut = model.generate("What?", max_tokens=5, constraint=grammar)
    assert (cut.tokens, cut.finish_reason, cut.timings.n_forced) == (answer.tokens[:5], "length", 5)


def test_more_forced_tokens_than_a_batch_holds(model: granite4v.Model) -> None:
    grammar = grammar_for("kvp", {"const": [f"value {i}" for i in range(300)]})
    answer = model.generate("What?", max_tokens=4000, constraint=grammar, repetition=False)
    assert json.loads(answer.text) == [f"value {i}" for i in range(300)] and answer.finish_reason == "stop"


@pytest.mark.parametrize(
    "options", [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 5, "min_p": 0.1, "top_p": 0.9}]
)
def test_sampled_answers_obey_the_grammar(model: granite4v.Model, options: dict[str, Any]) -> None:
    grammar = grammar_for("kvp", {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3})
    found = {model.generate("What?", max_tokens=60, constraint=grammar, seed=s, **options).text for s in range(12)}
    assert all(set(json.loads(text)) <= {"a", "b"} for text in found) and len(found) > 2
    again = model.generate("What?", max_tokens=60, constraint=grammar, seed=3, repeat_penalty=1.3, **options)
    assert json.loads(again.text) is not None


def test_the_end_comes_only_where_the_answer_is_complete(model: granite4v.Model) -> None:
    """`stop` texts end an answer anywhere. With `ignore_eos` it continues as long as the grammar allows."""
    grammar = grammar_for("kvp", {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]})
    endless = model.generate("What?", max_tokens=50, constraint=grammar, ignore_eos=True)
    assert (endless.text, endless.finish_reason) == ('{"a": 1}', "stop")
    cut = model.generate("What?", max_tokens=50, constraint=grammar, stop=[": 1"])
    assert (cut.text, cut.finish_reason) == ('{"a"', "stop")
    csv = model.generate("What?", max_tokens=25, constraint=task_grammar("chart2csv"), ignore_eos=True)
    assert csv.finish_reason == "length" and csv.closing == "" and 20 < len(csv.tokens) <= 25


def test_cancelling_a_constrained_answer_keeps_what_was_generated(model: granite4v.Model) -> None:
    stop = threading.Event()
    stream = model.stream("What?", max_tokens=300, constraint=task_grammar("kvp"), cancel=stop.is_set)
    first = next(stream)
    stop.set()
    assert not "".join(stream)
    assert stream.answer.finish_reason == "cancelled" and stream.answer.text.startswith(first)
    written = compiler("toy").index.text(stream.answer.tokens).decode(errors="replace")  # may be cut inside a character
    assert written.rstrip("\ufffd") == stream.answer.text.rstrip("\ufffd")
    other = model.stream("What?", max_tokens=300, constraint=task_grammar("kvp"))
    next(other)
    other.close()
    assert other.answer.finish_reason == "cancelled"


def test_two_constrained_answers_at_once_do_not_mix(model: granite4v.Model) -> None:
    tasks = ("kvp", "tables_otsl")
    alone = [model.generate("What?", max_tokens=20, constraint=task_grammar(task)).text for task in tasks]
    streams = [model.stream("What?", max_tokens=20, constraint=task_grammar(task)) for task in tasks]
    found = ["", ""]
    for _ in range(21):
        for i, stream in enumerate(streams):
            found[i] += next(stream, "")
    assert found == alone


def test_pictures_that_were_encoded_are_counted(model: granite4v.Model) -> None:
    model.clear_cache()
    one, two = noise_picture((150, 100), 1), noise_picture((150, 100), 2)
    counts = [
        model.generate("What?", pictures, max_tokens=1).timings.n_encoded
        for pictures in ([one], [one], [one, two], [two], [])
    ]
    assert counts == [1, 0, 1, 0, 0]


def test_a_grammar_that_llguidance_cannot_compile_costs_nothing(model: granite4v.Model) -> None:
    model.logits("What?")
    before = model.counters
    with pytest.raises(ConstraintError, match="uniqueItems"):
        model.generate("What?", constraint=Grammar("kvp", schema='{"type": "array", "uniqueItems": true}'))
    assert model.counters == before
