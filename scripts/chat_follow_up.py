"""Measures the time to the first token of a chat's follow-up questions, relative to the first question about the page.

    python -m scripts.chat_follow_up build/full-model --mmproj mmproj-Q8_0.gguf --runs 3

Each run clears the cache, attaches the page (tests/data/invoice.png unless '--image' names another), and asks a first
question, a second one, a different second one after '/undo', and a task. A question about a small page reads the
weights beforehand. Seconds are what a person waits, from the question to the first piece of its answer. The last line
on stdout is one JSON object; 'ratio' is each question's median divided by the first one's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

import granite4v
from granite4v.runtime.chat import Chat
from scripts.measuring import middle

PAGE = Path(__file__).parents[1] / "tests" / "data" / "invoice.png"
SMALL_PX = 200  # side of the page that is not counted
QUESTIONS = {
    "first": "What is the total amount of this invoice?",
    "follow_up": "And when is it due?",
    "after_undo": "Who is the customer?",
    "task": "<tables_html>",
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model directory, or text GGUF file")
    parser.add_argument("--mmproj", type=Path, help="vision GGUF file")
    parser.add_argument("--image", type=Path, default=PAGE)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--max-tokens", type=int, default=16, help="of each answer")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args(arguments)
    with granite4v.load(options.model, mmproj=options.mmproj, n_threads=options.threads, device="cpu") as model:
        with tempfile.TemporaryDirectory() as folder:
            small = Path(folder) / "small.png"
            Image.new("RGB", (SMALL_PX, SMALL_PX), "white").save(small)
            run(model, small, options.max_tokens)
        runs = []
        for number in range(options.runs):
            runs.append(run(model, options.image, options.max_tokens))
            print(f"run {number + 1} of {options.runs}: {json.dumps(runs[-1])}", file=sys.stderr, flush=True)
    print(json.dumps(summary(runs)))


def run(model: granite4v.Model, page: Path, max_tokens: int) -> dict[str, dict[str, Any]]:
    """Returns for each question the seconds to its first token, and how much of its prompt was reused."""
    model.clear_cache()
    chat = Chat(model, max_tokens=max_tokens)
    chat.attach(str(page))
    found = {}
    for name, text in QUESTIONS.items():
        if name == "after_undo":
            chat.conversation.undo()
        reply = chat.ask(chat.question(text))
        list(reply)
        if reply.turn is None or reply.turn.stats is None:
            raise SystemExit(f"no answer to '{text}'; give a model that answers it.")
        stats = reply.turn.stats
        found[name] = {
            "first_token_s": round(stats.first_token_s, 4),
            "encode_s": round(stats.encode_s, 4),
            "prefill_s": round(stats.prefill_s, 4),
            "n_prompt": stats.n_prompt,
            "n_reused": stats.n_reused,
            "n_stored": stats.n_stored,
            "n_encoded": stats.n_encoded,
        }
    return found


def summary(runs: Sequence[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Returns medians and ranges over the runs, and the medians' ratios to the first question's."""
    seconds = {name: middle([one[name]["first_token_s"] for one in runs]) for name in QUESTIONS}
    return {
        "first_token_s": seconds,
        "ratio": {
            name: round(value["median"] / seconds["first"]["median"], 5)
            for name, value in seconds.items()
            if name != "first"
        },
        "prompts": {
            name: {key: runs[-1][name][key] for key in ("n_prompt", "n_reused", "n_encoded")} for name in QUESTIONS
        },
    }


if __name__ == "__main__":
    main()
