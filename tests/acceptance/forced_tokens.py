"""Text without alternatives is not sampled: fewer decode steps, and the same values.

    python -m tests.acceptance.forced_tokens --model MODEL_DIR [IMAGE...]

Reads forms greedily with and without fast-forward, in alternating order. Values may differ where the model spells
forced text in other tokens than the tokenizer does, and where two tokens are nearly tied; any other difference breaks
the promise.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image

import granite4v
from granite4v.runtime import Answer, Model
from granite4v.runtime.extract.parsed_answer import parse_answer
from granite4v.runtime.extract.questions import Question
from granite4v.runtime.grammar.grammar_state import Compiler
from scripts.nano import formats
from scripts.nano.truth import Form
from tests.acceptance.answering import ask_for
from tests.acceptance.harness import FORM, Json, Result, options_parser, ratio, run_check, tell
from tests.acceptance.pages import draw_page

NEAR_TIE = 0.1  # closer logits may swap ranks when tokens are computed in one batch


def main(arguments: Sequence[str] | None = None) -> int:
    parser = options_parser(__doc__ or "", max_tokens=512)
    parser.add_argument("image", type=Path, nargs="*", help="images; by default forms are drawn")
    parser.add_argument("--schema", help="of the fields on the images, a JSON Schema file")
    parser.add_argument("--pages", type=int, default=8, help="forms to draw (8)")
    parser.add_argument("--length", type=int, help="the most characters of a field: random weights find no end")
    return run_check(forced_tokens, parser.parse_args(arguments))


def forced_tokens(options: argparse.Namespace, work: Path) -> Result:
    """Extracts the fields of forms with and without fast-forward, in alternating order, greedily, with one loaded
    model."""
    pairs: list[tuple[Answer, Answer]] = []
    differences: list[Json] = []
    problems: list[str] = []
    with granite4v.load(options.model, n_threads=options.threads) as model:
        for number, (name, picture, schema) in enumerate(_forms(options)):
            question = ask_for(model, "kvp", schema)
            model.generate(question.prompt, [picture], max_tokens=1)  # prefills the page before either of the two
            order = (True, False) if number % 2 else (False, True)
            found = {forced: _answer(model, picture, question, options.max_tokens, forced) for forced in order}
            pair = found[True], found[False]
            pairs.append(pair)
            ours, theirs = (parse_answer("kvp", one.text, one.finish_reason, question.schema).value for one in pair)
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
    return Result("forced_tokens", figures, lines, problems)


def _forms(options: argparse.Namespace) -> Iterator[tuple[str, Any, Json]]:
    """Yields (name, picture, schema)."""
    if options.image:
        schema = FORM if options.schema is None else json.loads(Path(options.schema).read_text(encoding="utf-8"))
        yield from ((path.name, path, schema) for path in options.image)
        return
    for number in range(options.pages):
        document = draw_page(number, options.seed, "form")
        assert isinstance(document.truth, Form)
        schema = formats.form_schema(document.truth)
        for field in schema["properties"].values() if options.length is not None else ():
            field["maxLength"] = options.length
        yield f"form {document.seed}", document.picture, schema


def _answer(model: Model, picture: Image | Path, question: Question, max_tokens: int, forced: bool) -> Answer:
    return model.generate(
        question.prompt, [picture], max_tokens=max_tokens, constraint=question.constraint, fast_forward=forced
    )


def explained(model: Model, picture: Image | Path, question: Question, forced: Answer, sampled: Answer) -> Json:
    """Explains where an answer with fast-forward diverges from one without it, and why.

    `spelling`: forced text that the model on its own splits into other tokens than the tokenizer does, after which it
    continues differently. `near tie`: of two tokens with nearly equal logits, one wins when tokens are computed in one
    batch, the other when they are computed one by one. Everything else is `unexplained`.
    """
    pairs = list(itertools.zip_longest(forced.tokens, sampled.tokens))
    at = next(i for i, (one, other) in enumerate(pairs) if one != other)
    before, (ours, theirs) = forced.tokens[:at], pairs[at]
    logits = model.score(question.prompt, [picture], tokens=[*before, 0])[-1]
    told = {"behind": _text(model, before)[-40:]}
    if ours is not None and ours in _forced_behind(model, question, before, len(logits))[:1]:
        return {"why": "spelling", **told}
    end = max(logits[token] for token in model.prompts.stop_tokens)
    gap = abs(float((end if ours is None else logits[ours]) - (end if theirs is None else logits[theirs])))
    return {"why": "near tie" if gap < NEAR_TIE else "unexplained", **told, "gap": round(gap, 4)}


def _forced_behind(model: Model, question: Question, said: list[int], n_vocab: int) -> list[int]:
    """Returns the tokens that fast-forward feeds after these tokens."""
    assert question.constraint is not None
    state = Compiler(model.prompts.tokenizer(), n_vocab, model.prompts.stop_tokens).begin(question.constraint)
    for token in said:
        state.accept(token)
    return state.forced_tokens()


def _text(model: Model, tokens: list[int]) -> str:
    stream = model.prompts.tokenizer().text_stream()
    return "".join(map(stream.push, tokens)) + stream.flush()


def _compared(pairs: list[tuple[Answer, Answer]]) -> Json:
    figures: Json = {}
    for name in ("decode_s", "constraint_s", "n_steps", "n_generated", "n_forced"):
        with_, without = (sum(getattr(pair[side].timings, name) for pair in pairs) for side in (0, 1))
        figures[name] = {"with": round(with_, 4), "without": round(without, 4), "ratio": ratio(with_, without)}
    return figures


if __name__ == "__main__":
    sys.exit(main())
