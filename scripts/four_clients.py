"""Measures tokens a second of `granite4v serve`: four clients at once against one, and against llama-server's slots.

    python -m scripts.four_clients build/full-model --peer-python venv/bin/python

Each client has its own page, which a first question has the server read. Then, in turn for `--rounds` rounds, one
client alone asks a second question, and all clients ask it at the same time; the fastest round counts. Every answer is
greedy and has exactly `--tokens` tokens. 'same_text' says whether our answer to the first client was always the same,
alone and with the others.

The peer is llama-server from the Python package xllamacpp, run by an interpreter that has it (see
scripts/llama_server.py), with as many slots as clients and the same prompts, pixels and numbers of tokens; each client
keeps its slot. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scripts.batch_pages import RENDER, ROOT, SERVER, find_files, run_shown
from scripts.draw_page import draw_page
from scripts.measuring import run_json
from tests.helpers.serving import Server

QUESTIONS = ("tables_html", "tables_json")  # the first reads the page, the second is measured
Json = dict[str, Any]


def main() -> int:
    options = parse_arguments()
    with tempfile.TemporaryDirectory() as directory:
        work = (options.work or Path(directory)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        text, mmproj = find_files(options.model, options.mmproj)
        pages = draw_pages(work, options)
        result: Json = {"model": str(options.model), "clients": options.clients, "tokens": options.tokens}
        result["size_px"], result["threads"] = list(options.size), options.threads
        result["ours"] = ours(text, mmproj, pages, options)
        print(f"ours: {json.dumps(result['ours'])}", file=sys.stderr, flush=True)
        if options.peer_python:
            result["llama-server"] = peer(text, mmproj, pages, options, work)
    print(json.dumps({**result, "ratios": ratios(result)}))
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a model directory, or a text GGUF with --mmproj")
    parser.add_argument("--mmproj", type=Path)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer (64)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", default="600x780", help="of a page, in pixels (600x780)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--ctx", type=int, default=4096, help="positions of a sequence (4096)")
    parser.add_argument("--peer-python", type=Path, help="an interpreter with xllamacpp")
    parser.add_argument("--work", type=Path, help="keep pages here")
    options = parser.parse_args()
    options.size = tuple(int(side) for side in options.size.split("x"))
    return options


def draw_pages(work: Path, options: argparse.Namespace) -> list[Path]:
    """Draws a page for each client. They differ in width by a pixel, so that none is a copy of another."""
    paths = []
    for i in range(options.clients):
        path = work / f"client-{i}.png"
        draw_page().resize((options.size[0] + i, options.size[1])).save(path)
        paths.append(path)
    return paths


# --- ours ---


def ours(text: Path, mmproj: Path, pages: Sequence[Path], options: argparse.Namespace) -> Json:
    chosen = ["--model", str(text), "--mmproj", str(mmproj), "--parallel", str(options.clients), "--no-page-store"]
    with Server(*chosen, "--ctx-size", str(options.ctx), "--threads", str(options.threads)) as server:

        def ask(client: int, question: str, n_tokens: int) -> Json:
            return post(server.port, pages[client], question, n_tokens)

        begin = time.perf_counter()
        for client in range(options.clients):
            ask(client, QUESTIONS[0], 1)
        read_s = time.perf_counter() - begin
        alone: list[float] = []
        at_once: list[float] = []
        texts = set()
        before = server.metrics()["granite4v_decode_steps_total"]
        for _ in range(options.rounds):
            alone_s, (answer,) = together(1, lambda client: ask(client, QUESTIONS[1], options.tokens))
            all_s, answers = together(options.clients, lambda client: ask(client, QUESTIONS[1], options.tokens))
            alone.append(round(alone_s, 2))
            at_once.append(round(all_s, 2))
            texts |= {said(answer), said(answers[0])}
        n_steps = server.metrics()["granite4v_decode_steps_total"] - before
    return {
        "read_s": round(read_s, 2),
        "one_s": alone,
        "all_s": at_once,
        "one_tok_s": round(options.tokens / min(alone), 3),
        "all_tok_s": round(options.clients * options.tokens / min(at_once), 3),
        "steps": n_steps,
        "cached": [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers],
        "n_prompt": [answer["usage"]["prompt_tokens"] for answer in answers],
        "same_text": len(texts) == 1,
    }


def post(port: int, page: Path, question: str, n_tokens: int) -> Json:
    url = f"data:image/png;base64,{base64.b64encode(page.read_bytes()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": f"<{question}>"}]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": n_tokens}
    body |= {"ignore_eos": True, "unconstrained": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=3600) as reply:
        return dict(json.load(reply))


def said(answer: Json) -> str:
    return str(answer["choices"][0]["message"]["content"])


def together(n: int, ask: Callable[[int], Json]) -> tuple[float, list[Json]]:
    """Runs n clients at once. Returns the seconds until the last one has its answer, and the answers."""
    answers: dict[int, Json] = {}
    start = threading.Barrier(n + 1)

    def work(client: int) -> None:
        start.wait()
        answers[client] = ask(client)

    threads = [threading.Thread(target=work, args=(client,)) for client in range(n)]
    for thread in threads:
        thread.start()
    start.wait()
    begin = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begin
    if len(answers) < n:
        raise SystemExit("a client got no answer; see above")
    return seconds, [answers[client] for client in range(n)]


# --- the peer ---


def peer(text: Path, mmproj: Path, pages: Sequence[Path], options: argparse.Namespace, work: Path) -> Json:
    render = [sys.executable, "-c", RENDER, str(text), str(mmproj), str(pages[0]), ",".join(QUESTIONS)]
    texts, clients = run_json(render, ROOT)["prompts"], range(len(pages))
    job = {
        "text": str(text.absolute()),
        "mmproj": str(mmproj.absolute()),
        "slots": options.clients,
        "threads": options.threads,
        "ctx": options.ctx,
        "pages": [str(page) for page in pages],
        "prompts": [
            prompt.replace("<image>\n", "{media}") for prompt in (texts[0], *([texts[1]] * 2 * options.rounds))
        ],
        "n_predict": [[1, *([options.tokens if i == 0 else 0, options.tokens] * options.rounds)] for i in clients],
        "in_rounds": True,
    }
    path = work / "peer.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    ran = run_shown([str(options.peer_python), str(SERVER), str(path)], work, dict(os.environ))
    alone, at_once = ran["rounds_s"][1::2], ran["rounds_s"][2::2]
    return {
        "read_s": ran["rounds_s"][0],
        "one_s": alone,
        "all_s": at_once,
        "one_tok_s": round(options.tokens / min(alone), 3),
        "all_tok_s": round(options.clients * options.tokens / min(at_once), 3),
        "cached": [one["n_reused"] for one in ran["answers"] if one["prompt"] == 2],
        "n_prompt": [one["n_prompt"] for one in ran["answers"] if one["prompt"] == 2],
        "version": ran["version"],
    }


def ratios(result: Json) -> Json:
    found = {"all / one": round(result["ours"]["all_tok_s"] / result["ours"]["one_tok_s"], 3)}
    if "llama-server" in result:
        theirs = result["llama-server"]
        found["all / llama-server"] = round(result["ours"]["all_tok_s"] / theirs["all_tok_s"], 3)
        found["one / llama-server"] = round(result["ours"]["one_tok_s"] / theirs["one_tok_s"], 3)
    return found


if __name__ == "__main__":
    sys.exit(main())
