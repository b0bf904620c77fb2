"""What `scripts.drafting` reports, and that replayed answers equal the recorded ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import granite4v
from granite4v.runtime.answer import LENGTH, STOP, Answer, Timings
from granite4v.runtime.engine.draft import DraftSource
from scripts.drafting import Asked, real_tables, replaying, report
from scripts.nano import formats
from tests.toy.spec import PRESETS


def asked(*steps: int, tokens: int = 5) -> list[Asked]:
    """Returns answers with these numbers of steps, two tasks per page."""
    return [
        Asked(
            i // 2,
            i % 2,
            Answer(tokens=[1] * tokens, finish_reason=STOP, timings=Timings(n_steps=n, decode_s=float(n))),
        )
        for i, n in enumerate(steps)
    ]


def test_ratios_are_those_of_first_and_later_tasks() -> None:
    found = report({"off": asked(10, 20, 30, 40), "chain": asked(8, 5, 24, 10)})
    chain = found["chain"]
    assert chain["all"] == {"steps": 0.47, "decode_s": 0.47}
    assert chain["first"]["steps"] == 0.8 and chain["later"]["steps"] == 0.25
    assert chain["second of first"] == round(15 / 32, 3)
    assert (found["off"]["steps"], found["tokens"], found["different"]) == (100, 20, 0)


def test_an_answer_that_ran_on_does_not_hide_what_later_tasks_take() -> None:
    found = asked(8, 4, 10, 1500, 12)  # the last page has only one answer
    found[3].answer.finish_reason = LENGTH
    chain = report({"off": asked(10, 20, 30, 1500, 12), "chain": found})["chain"]
    assert (chain["second of first"], chain["cut pages"]) == (0.5, 1)
    found[1].answer.finish_reason = LENGTH
    chain = report({"off": asked(10, 20, 30, 1500, 12), "chain": found})["chain"]
    assert "second of first" not in chain and chain["cut pages"] == 2


def test_other_tokens_are_counted() -> None:
    assert report({"off": asked(1, 1), "chain": asked(1, 1, tokens=4)})["different"] == 2


def test_a_replayed_answer_is_the_one_that_was_given(make_model: Callable[..., Path]) -> None:
    table = next(real_tables(1, seed=0))
    text = formats.html(table)
    source = DraftSource()
    with granite4v.load(make_model(PRESETS["tiny"]), device="cpu", n_threads=1) as model:
        source.predict(model.prompts.tokenizer().encode_plain(text))
        ask = replaying(model, [table])
        plain, drafted = ask(0, "tables_html", None), ask(0, "tables_html", [source])
    assert plain.text == drafted.text == text and plain.tokens == drafted.tokens
    assert plain.finish_reason == drafted.finish_reason == "stop"
    assert plain.timings.n_drafted == 0 and drafted.timings.n_steps <= plain.timings.n_steps
