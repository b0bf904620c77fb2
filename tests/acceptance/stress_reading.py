"""What a page costs: tasks that share its reading, and text that is not sampled; part of `stress_extract.py`."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.acceptance.stress_batch import FORM, Json, Result, draw_page, in_new_process, on_letter, tell

if TYPE_CHECKING:
    from PIL.Image import Image

    from granite4v.runtime import Answer, Model
    from granite4v.runtime.extract.questions import Question

SHARED_TASKS: tuple[str, ...] = ("tables_html", "tables_otsl", "chart2csv")
COUNTS = ("n_image", "n_prompt", "n_encoded", "n_reused", "n_generated")
PARTS = {
    "page_s": ("encode_s", "prefill_image_s"),
    "all_s": ("encode_s", "prefill_image_s", "prefill_text_s", "decode_s", "constraint_s"),
}
NEAR_TIE = 0.1  # logits that are closer may change places where tokens are computed together


def share(options: argparse.Namespace, work: Path) -> Result:
    """All tasks in one process against each task in a process of its own; loading the model is left out."""
    tasks, image = tuple(options.task or SHARED_TASKS), options.image
    if image is None:
        image = work / "page.png"
        on_letter(draw_page(0, options.seed, "table").picture, 850).save(image)

    def read(names: tuple[str, ...]) -> list[Json]:
        return in_new_process(read_page, image, names, options.model, options.max_tokens, options.threads)

    read(tasks[:1])  # what a machine measures once is measured now, and files are in memory
    runs = []
    for number in range(options.runs):
        runs.append({"together": read(tasks), "apart": [record for task in tasks for record in read((task,))]})
        tell(f"run {number + 1} of {options.runs}: {_told(_seconds(runs[-1:], 'all_s'))}")
    figures: Json = {
        "tasks": list(tasks),
        "apart": "a process for each task; loading the model is left out",
        "runs": options.runs,
        **{what: {side: [_timing(one, what) for one in found] for side, found in runs[0].items()} for what in COUNTS},
        **{what: _seconds(runs, what) for what in PARTS},
    }
    encoded, reused = figures["n_encoded"], figures["n_reused"]
    lines = [
        f"together {sum(encoded['together'])} picture encoded and {reused['together']} prompt tokens reused, "
        f"apart {sum(encoded['apart'])} and {reused['apart']}",
        f"encoding and prefill of the page: {_told(figures['page_s'])}",
        f"all but loading: {_told(figures['all_s'])}",
    ]
    return Result("share", figures, lines, share_problems(runs[0]))


def _told(one: Json) -> str:
    return f"{one['together']} s together, {one['apart']} s apart, ratio {one['ratio']}"


def share_problems(sides: dict[str, list[Json]]) -> list[str]:
    """What the records of tasks 'together' and 'apart' say against reading a page once."""
    together, apart = sides["together"], sides["apart"]
    failed = [
        f"{one['task']}, {side}: {one['error']}" for side, found in sides.items() for one in found if one["error"]
    ]
    if failed:
        return failed
    problems = []
    n_encoded = [_timing(one, "n_encoded") for one in together]
    if n_encoded != [1] + [0] * (len(together) - 1):
        problems.append(f"the tasks together encoded {n_encoded} pictures; expected one, for the first")
    for one in together[1:]:
        n_image, n_reused = _timing(one, "n_image"), _timing(one, "n_reused")
        if n_reused < n_image or _timing(one, "prefill_image_s"):
            problems.append(f"{one['task']} reused {n_reused} prompt tokens; expected the page's {n_image} among them")
    problems += [
        f"{one['task']} answers otherwise together than apart: {one['text']!r:.100} and {other['text']!r:.100}"
        for one, other in zip(together, apart, strict=True)
        if (one["text"], one["finish_reason"]) != (other["text"], other["finish_reason"])
    ]
    return problems


def _timing(record: Json, name: str) -> Any:
    return record["timings"].get(name, 0)


def _seconds(runs: list[dict[str, list[Json]]], what: str) -> Json:
    """Medians of the runs."""

    def middle(side: str) -> float:
        return statistics.median(sum(_timing(one, part) for one in run[side] for part in PARTS[what]) for run in runs)

    together, apart = middle("together"), middle("apart")
    return {"together": round(together, 4), "apart": round(apart, 4), "ratio": _ratio(together, apart)}


def _ratio(one: float, other: float) -> float | None:
    return round(one / other, 4) if other else None


def read_page(image: Path, tasks: tuple[str, ...], model: Path, max_tokens: int, threads: int) -> list[Json]:
    """The records of one run as data."""
    import granite4v

    schema = FORM if "kvp" in tasks else None
    with granite4v.load(model, n_threads=threads) as loaded:
        records = granite4v.extract(image, tasks, model=loaded, schema=schema, max_tokens=max_tokens)
        return [record.as_dict() for record in records]


# --- fast-forward ---


def fast_forward(options: argparse.Namespace, work: Path) -> Result:
    """Fields of forms with and without it, in turn, greedily, by one loaded model."""
    import granite4v
    from granite4v.runtime.extract.reader import understand

    pairs: list[tuple[Answer, Answer]] = []
    differences: list[Json] = []
    problems: list[str] = []
    with granite4v.load(options.model, n_threads=options.threads) as model:
        for number, (name, picture, schema) in enumerate(_forms(options)):
            question = ask_for(model, "kvp", schema)
            model.generate(question.prompt, [picture], max_tokens=1)  # the page is read before either
            order = (True, False) if number % 2 else (False, True)
            found = {forced: _answer(model, picture, question, options.max_tokens, forced) for forced in order}
            pair = found[True], found[False]
            pairs.append(pair)
            ours, theirs = (understand("kvp", one.text, one.finish_reason, question.schema).value for one in pair)
            if ours != theirs:
                why = {"form": name, **explained(model, picture, question, *pair)}
                differences.append(why)
                if why["why"] == "unexplained":
                    problems.append(f"{name} has other values with fast-forward, from behind {why['behind']!r}")
            same = "the same values" if ours == theirs else f"other values ({differences[-1]['why']})"
            tell(f"{name}: {same}, {pair[0].timings.n_forced} of {len(pair[0].tokens)} tokens forced")
    n_same = len(pairs) - len(differences)
    figures = {"forms": len(pairs), "same_values": n_same, "differences": differences, **_compared(pairs)}
    reasons = Counter(one["why"] for one in differences)
    told = "; others differ " + ", ".join(f"{n} by {why}" for why, n in reasons.items()) if reasons else ""
    lines = [f"{n_same} of {len(pairs)} forms have the same values{told}"]
    for what, one in _compared(pairs).items():
        lines.append(f"{what}: {one['with']} with, {one['without']} without, ratio {one['ratio']}")
    return Result("fast-forward", figures, lines, problems)


def _forms(options: argparse.Namespace) -> Iterator[tuple[str, Any, Json]]:
    """(name, picture, schema)"""
    if options.image:
        schema = FORM if options.schema is None else json.loads(Path(options.schema).read_text(encoding="utf-8"))
        yield from ((path.name, path, schema) for path in options.image)
        return
    for number in range(options.pages):
        document = draw_page(number, options.seed, "form")
        from scripts.nano import formats
        from scripts.nano.truth import Form

        assert isinstance(document.truth, Form)
        schema = formats.form_schema(document.truth)
        for field in schema["properties"].values() if options.length is not None else ():
            field["maxLength"] = options.length
        yield f"form {document.seed}", document.picture, schema


def ask_for(model: Model, task: str, schema: Json | None) -> Question:
    """The question as `granite4v extract` asks it."""
    from granite4v.runtime.extract.questions import questions
    from granite4v.runtime.extract.schema import load_schema

    found = None if schema is None else load_schema(schema)
    return questions(model, (task,), None, found, unconstrained=False)[0]


def _answer(model: Model, picture: Image | Path, question: Question, max_tokens: int, forced: bool) -> Answer:
    return model.generate(
        question.prompt, [picture], max_tokens=max_tokens, constraint=question.constraint, fast_forward=forced
    )


def explained(model: Model, picture: Image | Path, question: Question, forced: Answer, sampled: Answer) -> Json:
    """Where an answer with fast-forward parts from one without it, and why.

    `spelling`: text that must come, which the model by itself cuts into other tokens than the tokenizer does, and goes
    on from there in another way. `near tie`: of two tokens that the model likes alike, one wins where tokens are
    computed together, the other where they come one by one. All else is `unexplained`.
    """
    pairs = list(itertools.zip_longest(forced.tokens, sampled.tokens))
    at = next(i for i, (one, other) in enumerate(pairs) if one != other)
    before, (ours, theirs) = forced.tokens[:at], pairs[at]
    logits = model.score(question.prompt, [picture], tokens=[*before, 0])[-1]
    told = {"behind": _text(model, before)[-40:]}
    if ours is not None and ours in _forced_behind(model, question, before, len(logits))[:1]:
        return {"why": "spelling", **told}
    end = max(logits[token] for token in model.engine.stop_tokens)
    gap = abs(float((end if ours is None else logits[ours]) - (end if theirs is None else logits[theirs])))
    return {"why": "near tie" if gap < NEAR_TIE else "unexplained", **told, "gap": round(gap, 4)}


def _forced_behind(model: Model, question: Question, said: list[int], n_vocab: int) -> list[int]:
    """What fast-forward feeds behind these tokens."""
    from granite4v.runtime.grammar.grammar_state import Compiler

    assert question.constraint is not None
    guide = Compiler(model.engine.tokenizer(), n_vocab, model.engine.stop_tokens).begin(question.constraint)
    for token in said:
        guide.accept(token)
    return guide.forced_tokens()


def _text(model: Model, tokens: list[int]) -> str:
    stream = model.engine.tokenizer().text_stream()
    return "".join(map(stream.push, tokens)) + stream.flush()


def _compared(pairs: list[tuple[Answer, Answer]]) -> Json:
    figures: Json = {}
    for name in ("decode_s", "constraint_s", "n_steps", "n_generated", "n_forced"):
        with_, without = (sum(getattr(pair[side].timings, name) for pair in pairs) for side in (0, 1))
        figures[name] = {"with": round(with_, 4), "without": round(without, 4), "ratio": _ratio(with_, without)}
    return figures
