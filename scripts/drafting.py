"""Measures what drafting saves: decode steps of nano on held-out tables, decode time of a large model on real tables.

    python -m scripts.drafting                                # nano
    python -m scripts.drafting --documents 100 --seed 5
    python -m scripts.drafting --replay build/full/text-Q4_K_M.gguf                  # 'off' and 'chain', some minutes
    python -m scripts.drafting --replay build/full/text-Q4_K_M.gguf --answers 1 --ways off,alone

Each table is asked for in several formats, in three ways: without drafting ('off'), with drafts from the answer itself,
its prompt and earlier pages ('alone'), and also with drafts from the other formats of the same page ('chain', what
`granite4v extract` does). All three must give the same tokens; otherwise the exit status is 1. The ways take turns,
answer by answer, so that other load on the machine affects all of them.

With `--replay` the answers are given: tables from Python's library and held-out ones, in the model's own tokens. The
model computes every row but its logits are ignored, so random weights suffice; grammars and drafts are real.

The last line on stdout is one JSON object: steps and decode seconds relative to 'off', for all answers, and for the
first and the later tasks of a page. 'second of first' is the steps of the pages' second tasks relative to those of the
first, both with drafting. 'cut pages' counts the pages left out of it because one of the two answers ran to its limit
or looped: it has many times the steps of the other, whatever drafting saves.
"""

from __future__ import annotations

import argparse
import errno
import http
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

from granite4v import gguf_keys as keys
from granite4v.default_model import embedded_model
from granite4v.errors import AnswerError
from granite4v.runtime import grammar
from granite4v.runtime.answer import STOP, Answer
from granite4v.runtime.engine.draft import Draft, Drafter, DraftSource
from granite4v.runtime.engine.parallel import Workload
from granite4v.runtime.engine.sampler import Sampling
from granite4v.runtime.engine.sequence import Sequence as AnswerSequence
from granite4v.runtime.engine.sequence import Step
from granite4v.runtime.extract.drafts import Drafts
from granite4v.runtime.extract.questions import Question
from granite4v.runtime.formats import read
from granite4v.runtime.formats.task_grammar import grammar_for
from granite4v.runtime.model import Model
from granite4v.runtime.options import GenerationOptions
from scripts.nano import formats
from scripts.nano.contents import random_table
from scripts.nano.documents import draw_document
from scripts.nano.truth import HELD_OUT_SEEDS, Cell, Table

WAYS = ("off", "alone", "chain")
MAX_TOKENS = 1500
WRITERS: dict[str, Callable[[Table], str]] = {
    "tables_json": formats.tables_json,
    "tables_html": formats.html,
    "tables_otsl": formats.otsl,
}
N_ROWS = 3  # of a table from Python's library, below its header
N_PROMPT = 1200  # tokens of the prompt of a replayed answer, about as many as a page's
# (page, task, sources or None without drafting) -> the answer
Ask = Callable[[int, str, Sequence[DraftSource] | None], Answer]


@dataclass(frozen=True)
class Asked:
    """One answer. `place`: index of its task among those of the page."""

    page: int
    place: int
    answer: Answer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, help="tables (24; 2 where answers are replayed)")
    parser.add_argument(
        "--tasks", default="tables_json,tables_html,tables_otsl", help="formats, in the order of asking"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the held-out documents")
    parser.add_argument("--ways", help=f"those of {', '.join(WAYS)} to measure (all; off,chain where replayed)")
    parser.add_argument("--answers", type=int, help="ends after so many answers in each way")
    parser.add_argument("--minutes", type=float, help="begins no further answer afterwards (6 where replayed)")
    parser.add_argument("--replay", metavar="MODEL", help="a model for given answers, in place of nano")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    tasks = options.tasks.split(",")
    ways = (options.ways or ("off,chain" if options.replay else ",".join(WAYS))).split(",")
    if not set(tasks) <= set(WRITERS) or not set(ways) <= set(WAYS) or "off" not in ways:
        parser.error(f"expected tasks of {', '.join(WRITERS)}, and 'off' and others of {', '.join(WAYS)}")
    n_documents = options.documents or (2 if options.replay else 24)
    minutes = options.minutes or (6 if options.replay else math.inf)
    path = options.replay or embedded_model(lambda line: print(line, file=sys.stderr))
    with Model.load(path, n_threads=options.threads, n_parallel=2, workload=Workload()) as model:
        if options.replay:
            ask = replaying(model, list(real_tables(n_documents, options.seed)))
        else:
            ask = asking(model, [HELD_OUT_SEEDS + 50_000_000 + 1000 * options.seed + i for i in range(n_documents)])
        end, asked = time.monotonic() + 60 * minutes, list[dict[str, Asked]]()
        for answers in itertools.islice(measure(model, ask, tasks, n_documents, ways), options.answers):
            asked.append(answers)
            if time.monotonic() > end:
                break
    result = report({way: [answers[way] for answers in asked] for way in ways})
    print(json.dumps({"model": options.replay or "nano", "answers": len(asked), "tasks": tasks, **result}))
    return 1 if result["different"] else 0


def measure(
    model: Model, ask: Ask, tasks: Sequence[str], n_documents: int, ways: Sequence[str]
) -> Iterator[dict[str, Asked]]:
    """Yields for each page and task the answers of all ways."""
    drafts = {way: Drafts(model) for way in ways}
    model.logits("Hello")  # reads the weights
    for page in range(n_documents):
        for place, task in enumerate(tasks):
            question, answers = Question(task, f"<{task}>"), dict[str, Asked]()
            for way in ways if page % 2 == 0 else ways[::-1]:
                key = f"{page} {task}" if way == "alone" else str(page)
                answer = ask(page, task, None if way == "off" else drafts[way].sources(key, question))
                answers[way] = Asked(page, place, answer)
                _tell(f"table {page + 1} of {n_documents}, {task}, {way}", answer)
                drafts[way].add(key, question, answer.tokens, _value(task, answer))
            yield answers
        for way in ways:
            for key in (str(page), *(f"{page} {task}" for task in tasks)):
                drafts[way].forget(key)


def _tell(name: str, answer: Answer) -> None:
    timings = answer.timings
    drafted = f", {timings.n_accepted} of {timings.n_drafted} drafted tokens accepted" if timings.n_drafted else ""
    told = f"{len(answer.tokens)} tokens, {timings.n_steps} steps, {timings.decode_s:.2f} s{drafted}"
    print(f"{name}: {told}", file=sys.stderr, flush=True)


def _value(task: str, answer: Answer) -> Any:
    try:
        return read(task, answer.text)
    except AnswerError:
        return None


def report(asked: dict[str, list[Asked]]) -> dict[str, Any]:
    off = asked["off"]
    result: dict[str, Any] = {"tokens": sum(len(one.answer.tokens) for one in off), "different": 0}
    places = sorted({one.place for one in off})
    for way, found in asked.items():
        different = sum(one.answer.tokens != other.answer.tokens for one, other in zip(found, off, strict=True))
        result["different"] += different
        result[way] = {
            "steps": _sum(found, "n_steps"),
            "decode_s": round(_sum(found, "decode_s"), 2),
            "drafted": _sum(found, "n_drafted"),
            "accepted": _sum(found, "n_accepted"),
        }
        if way == "off":
            continue
        for name, chosen in (("all", places), ("first", places[:1]), ("later", places[1:])):
            part = [(one, other) for one, other in zip(found, off, strict=True) if one.place in chosen]
            if part:
                mine, others = zip(*part, strict=True)
                result[way][name] = {
                    figure: round(_sum(mine, field) / _sum(others, field), 3)
                    for figure, field in (("steps", "n_steps"), ("decode_s", "decode_s"))
                }
        if len(places) > 1:
            result[way].update(_second_of_first(found))
    return result


def _second_of_first(asked: Sequence[Asked]) -> dict[str, Any]:
    first, second = ({one.page: one for one in asked if one.place == place} for place in (0, 1))
    pages = sorted(first.keys() & second.keys())
    whole = [page for page in pages if all(one[page].answer.finish_reason == STOP for one in (first, second))]
    if not whole:
        return {"cut pages": len(pages)}
    ratio = _sum([second[page] for page in whole], "n_steps") / _sum([first[page] for page in whole], "n_steps")
    return {"second of first": round(ratio, 3), "cut pages": len(pages) - len(whole)}


def _sum(asked: Sequence[Asked], field: str) -> Any:
    return sum(getattr(one.answer.timings, field) for one in asked)


# --- nano ---


def asking(model: Model, seeds: Sequence[int]) -> Ask:
    """Returns a function that asks the model about held-out documents."""
    prompts: dict[tuple[int, str], Any] = {}

    def ask(page: int, task: str, sources: Sequence[DraftSource] | None) -> Answer:
        if (page, task) not in prompts:
            picture = draw_document(seeds[page], "table").picture
            prompts.update({(page, name): model.prepare(f"<{name}>", [picture]) for name in WRITERS})
        options = GenerationOptions(
            max_tokens=MAX_TOKENS, constraint=grammar_for(task), repetition=task, drafting=sources is not None
        )
        return model.submit(prompts[page, task], options, drafts=sources or ()).result()

    return ask


# --- replayed answers ---


def real_tables(n: int, seed: int) -> Iterator[Table]:
    """Yields two tables from Python's library for each held-out one."""
    rng = Random(seed)
    numbers, statuses = sorted(errno.errorcode), list(http.HTTPStatus)
    for i in range(n):
        if i % 3 == 0:
            start = rng.randrange(len(statuses) - N_ROWS)
            rows = [(str(s.value), s.phrase, s.description) for s in statuses[start : start + N_ROWS]]
            yield _table(("Code", "Phrase", "Description"), rows)
        elif i % 3 == 1:
            start = rng.randrange(len(numbers) - N_ROWS)
            rows = [(str(n), errno.errorcode[n], os.strerror(n)) for n in numbers[start : start + N_ROWS]]
            yield _table(("Number", "Name", "Meaning"), rows)
        else:
            yield random_table(Random(HELD_OUT_SEEDS + rng.randrange(1_000_000)), 1.0)


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Table:
    lines = [header, *rows]
    cells = [Cell(i, j, text, header=i == 0) for i, line in enumerate(lines) for j, text in enumerate(line)]
    return Table(len(lines), len(header), 1, tuple(cells))


class Replay:
    """An answer whose tokens are given: its sequence sees logits that favour the next given token."""

    def __init__(self, sequence: AnswerSequence, tokens: Sequence[int], n_vocab: int, end: int) -> None:
        self._sequence, self._tokens, self._n_vocab = sequence, [*tokens, end], n_vocab

    def advance(self, logits: np.ndarray) -> Step:
        wanted = np.zeros(self._n_vocab, dtype=np.float32)
        wanted[self._tokens[len(self._sequence.answer.tokens)]] = 1
        return self._sequence.advance(wanted)

    def cancel(self) -> Step:
        return self._sequence.cancel()

    def draft(self, most: int) -> Draft:
        return self._sequence.draft(most)


def replaying(model: Model, tables: Sequence[Table]) -> Ask:
    """Returns a function that gives the tables as answers, in the model's tokens."""
    tokenizer, n_vocab = model.prompts.tokenizer(), model.files.text.n_texts(keys.TOKENS)
    compiler = grammar.Compiler(tokenizer, n_vocab, model.prompts.stop_tokens)
    prompt = model.prepare("word " * round(N_PROMPT * 100 / len(tokenizer.encode_plain("word " * 100))))

    def ask(page: int, task: str, sources: Sequence[DraftSource] | None) -> Answer:
        tokens, answer, constraint = tokenizer.encode_plain(WRITERS[task](tables[page])), Answer(), grammar_for(task)
        assert constraint is not None
        sequence = AnswerSequence(
            answer,
            tokenizer.text_stream(),
            sampling=Sampling(),
            stop_tokens=model.prompts.stop_tokens,
            max_tokens=len(tokens) + 200,
            grammar=compiler.begin(constraint),
            drafter=None if sources is None else Drafter((), sources),
        )
        replay = Replay(sequence, tokens, n_vocab, min(model.prompts.stop_tokens))
        model.engine.submit(prompt, replay, answer, max_tokens=len(tokens) + 200, adapter=False).result()
        return answer

    return ask


if __name__ == "__main__":
    sys.exit(main())
