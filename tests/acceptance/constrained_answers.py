"""Constrained answers are valid, and cut ones are valid up to their last complete part, whatever the model says.

    python -m tests.acceptance.constrained_answers --generations 500

Answers are generated in a child process (`answering`) and judged by third-party programs (`judges`), with none of our
code. With random weights at temperature 1 a model says anything that its grammar allows.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.acceptance.answering import TASKS, Case, Said, Talker, case_of
from tests.acceptance.harness import Json, Result, options_parser, run_check, tell
from tests.acceptance.judges import has_whole_row, judge, relaxed
from tests.acceptance.schemas import SCHEMAS

SPARE = 2  # slack on top of the tokens of a minimal complete answer


def main(arguments: Sequence[str] | None = None) -> int:
    parser = options_parser(__doc__ or "", max_tokens=500)
    parser.add_argument("--generations", type=int, default=500)
    parser.add_argument("--first", type=int, default=0, help="number of the first generation, to repeat one (0)")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds after which a generation hangs (300)")
    parser.add_argument("--show", action="store_true", help="print every answer on stderr")
    return run_check(constrained_answers, parser.parse_args(arguments))


def constrained_answers(options: argparse.Namespace, _: Path) -> Result:
    tallies: dict[str, Counter[str]] = {task: Counter() for task in sorted(set(TASKS))}
    problems: list[str] = []
    slowest = (0.0, "")
    with Talker((options.model, options.temperature, options.threads)) as talker:
        for i in range(options.generations):
            case = case_of(options.first + i, options.seed, options.max_tokens)
            said = talker.ask(case, options.timeout)
            kind, problem = verdict(case, said)
            tallies[case.task].update([kind, "n"], n_tokens=said.n_tokens)
            slowest = max(slowest, (said.seconds, str(case)))
            if options.show or problem:
                tell(f"{case}: {kind}, {said.finish_reason}, {said.n_tokens} tokens\n  {said.text!r}")
            if problem:
                repeat = f"--seed {options.seed} --max-tokens {options.max_tokens} --first {case.number}"
                problems.append(f"{case}: {problem}; again with {repeat} --generations 1")
            elif (i + 1) % 50 == 0:
                tell(f"{i + 1} of {options.generations} generations, {len(problems)} broken promises")
    figures: Json = {
        "generations": options.generations,
        "schemas": len(SCHEMAS),
        "tasks": {task: _summary(tally) for task, tally in tallies.items() if tally},
        "all": _summary(sum(tallies.values(), Counter())),
        "slowest_s": round(slowest[0], 2),
    }
    lines = [_line(task, one) for task, one in {**figures["tasks"], "all": figures["all"]}.items()]
    return Result("constrained_answers", figures, [*lines, f"slowest: {slowest[0]:.1f} s, {slowest[1]}"], problems)


KINDS = ("finished", "closed", "repetition", "cut", "broken")


def _summary(tally: Counter[str]) -> Json:
    """Counts each kind. `valid` counts complete answers, and those that ended as repetition with a valid value kept."""
    kinds = {kind: tally[kind] for kind in KINDS}
    valid = sum(tally[kind] for kind in ("finished", "closed", "repetition"))
    return {"n": tally["n"], **kinds, "valid": valid, "tokens": tally["n_tokens"]}


def _line(task: str, one: Json) -> str:
    return (
        f"{task:<12} {one['n']:>5}: {one['finished']} finished and {one['closed']} brought to an end at their limit, "
        f"all valid; {one['repetition']} ended as repetition with a valid value kept; {one['cut']} cut, with fewer "
        f"tokens than the shortest whole answer found; {one['broken']} broken"
    )


def verdict(case: Case, said: Said) -> tuple[str, str | None]:
    """Returns the kind of an answer, one of `KINDS`, and the promise that it breaks, or None."""
    problem = said.error or _broken(case, said)
    if problem:
        return "broken", problem
    if said.finish_reason == "stop":
        return "finished", None
    if said.finish_reason == "repetition":
        return ("repetition" if said.written is not None else "cut"), None
    return ("cut" if said.closing is None else "closed"), None


def _broken(case: Case, said: Said) -> str | None:
    if said.n_tokens > case.max_tokens:
        return f"the answer has {said.n_tokens} tokens"
    if said.finish_reason not in ("stop", "length", "repetition"):
        return f"the answer ended as '{said.finish_reason}'"
    schema = SCHEMAS[case.schema] if case.schema else None
    if said.finish_reason == "stop":
        problem = judge(case.task, said.text, schema)
        if problem:
            return f"a finished answer is not valid: {problem}"
        return None if said.valid else "a valid answer is taken for one that is not"
    if said.finish_reason == "length" and said.closing is None and case.max_tokens >= said.n_least + SPARE:
        return f"the answer was cut at {case.max_tokens} tokens, and a whole one has {said.n_least}"
    if said.closing is not None:
        problem = judge(case.task, said.text, schema)
        if problem:
            return f"an answer that was brought to an end is not valid: {problem}; {said.text!r:.200}"
    if said.written is None:
        own = said.text.removesuffix(said.closing or "")
        return "whole rows were lost" if has_whole_row(case.task, own) else None
    problem = judge(case.task, said.written, None if schema is None else relaxed(schema))
    return f"what was kept of a cut answer is not valid: {problem}; {said.written!r:.200}" if problem else None


if __name__ == "__main__":
    sys.exit(main())
