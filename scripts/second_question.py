r"""Measures the time of a second question about a page relative to the first, in the same process and after a restart.

    python -m scripts.second_question MODEL --image page.png
    python -m scripts.second_question MODEL --mmproj V.gguf --image page.png --llama-server PYTHON \
        --example-server server.py

Every side answers questions about one page with one token each, so seconds are those to the first token. A question
without a page comes first and loads the text weights. Sides run one after another in their own processes:

- granite4v with the page store: three questions, then two in a new process.
- llama-server, as embedded by xllamacpp in the interpreter PYTHON: the same, with its prompt cache, and with slot save
  before the end and slot restore after the restart.
- llama-cpp-python's example server (its file `server.py`, in this interpreter): the same, with its disk caches of
  sequences and of embeddings.

The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import granite4v
from granite4v import PageStore
from granite4v.runtime.llama.files import ModelFiles
from scripts.measuring import run_json

Json = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
WARM_UP = "Hello."
QUESTIONS = ("What is the total?", "Who wrote this?", "When was it written?")
LATER = ("How many rows are there?", "Is it paid?")
START_S = 300.0  # limit for a server's start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model directory, or a text GGUF")
    parser.add_argument("--mmproj", type=Path)
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--cache-type", choices=("f16", "q8_0"), default="f16")
    parser.add_argument("--ctx", type=int, default=2048, help="positions of the peers' contexts (2048)")
    parser.add_argument("--llama-server", metavar="PYTHON", help="an interpreter with xllamacpp")
    parser.add_argument(
        "--example-server", type=Path, metavar="FILE", help="llama-cpp-python's examples/server/server.py"
    )
    parser.add_argument("--without-us", action="store_true", help="only the peers")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job is not None:
        print(json.dumps(answer(json.loads(options.job.read_text()))))
        return
    with tempfile.TemporaryDirectory(prefix="second-question-") as folder:
        sides = measure(options, Path(folder))
    for name, side in sides.items():
        print(f"{name}: {json.dumps(side)}", file=sys.stderr)
    print(json.dumps({"image": str(options.image), "threads": options.threads, "sides": sides}))


def measure(options: argparse.Namespace, folder: Path) -> Json:
    job = {
        "model": str(options.model),
        "mmproj": None if options.mmproj is None else str(options.mmproj),
        "image": str(options.image.resolve()),
        "threads": options.threads,
        "cache_type": options.cache_type,
        "ctx": options.ctx,
        "store": str(folder / "store"),
    }
    sides: Json = {}
    if not options.without_us:
        sides["granite4v"] = both(
            [sys.executable, "-m", "scripts.second_question", "-", "--image", "-", "--job"], job, folder
        )
        sides["granite4v"]["stored_bytes"] = [entry.n_bytes for entry in PageStore(folder / "store").entries()]
    if options.llama_server or options.example_server:
        job |= files_and_prompt(job)
    if options.llama_server:
        command = [options.llama_server, str(ROOT / "scripts" / "second_question_slots.py")]
        sides["llama-server"] = both(command, job, folder)
    if options.example_server is not None:
        sides["example server"] = example_server(options.example_server.resolve(), job, folder)
    return sides


def both(command: Sequence[str], job: Json, folder: Path) -> Json:
    """Runs the first questions, then those after a restart, and returns the figures of both."""
    runs = []
    for name, questions in (("first", QUESTIONS), ("restart", LATER)):
        path = folder / f"{name}.json"
        path.write_text(json.dumps({**job, "questions": questions, "is_restart": name == "restart"}))
        runs.append(run_json([*command, str(path)], ROOT))
    return ratios(*runs)


def ratios(first: Json, restart: Json) -> Json:
    seconds, later = first["seconds"], restart["seconds"]
    return {
        "first_s": seconds[0],
        "second_s": seconds[1:],
        "restart_s": later,
        "second_ratio": round(max(seconds[1:]) / seconds[0], 4),
        "restart_ratio": round(later[0] / seconds[0], 4),
        "first": {name: value for name, value in first.items() if name != "seconds"},
        "restart": {name: value for name, value in restart.items() if name != "seconds"},
    }


# --- granite4v ---


def answer(job: Json) -> Json:
    """Answers the job's questions in this process. Returns the seconds to the first token of each."""
    seconds, told = [], []
    store, mmproj = PageStore(job["store"]), job["mmproj"]
    with granite4v.load(
        job["model"],
        mmproj=mmproj,
        n_threads=job["threads"],
        page_store=store,
        cache_type=None if job["cache_type"] == "f16" else job["cache_type"],
    ) as model:
        warm_up = model.generate(WARM_UP, max_tokens=1)
        image = granite4v.load_image(job["image"])
        for question in job["questions"]:
            begin = time.perf_counter()
            timings = model.generate(question, [image], max_tokens=1, ignore_eos=True).timings
            seconds.append(round(time.perf_counter() - begin, 4))
            told.append(
                {
                    name: round(getattr(timings, name), 4)
                    for name in ("n_prompt", "n_stored", "n_reused", "load_s", "encode_s", "prefill_s")
                }
            )
        begin = time.perf_counter()
    return {
        "seconds": seconds,
        "questions": told,
        "load_s": round(warm_up.timings.load_s, 3),
        "close_s": round(time.perf_counter() - begin, 3),
    }


# --- peers ---


def files_and_prompt(job: Json) -> Json:
    """Returns the files, and our prompt as text, with '{media}' for the page and '{question}' for the question."""
    with granite4v.load(job["model"], mmproj=job["mmproj"], n_threads=job["threads"]) as model:
        placeholder = model.prompts.placeholder
        text = model.prepare("{question}", [job["image"]]).text
        name = model.files.text.texts("tokenizer.ggml.tokens")[placeholder] if placeholder is not None else ""
    with ModelFiles.open(job["model"], mmproj=job["mmproj"]) as files:
        assert files.vision is not None
        paths = {"text": str(files.text.path.resolve()), "vision": str(files.vision.path.resolve())}
    return {**paths, "prompt": text.replace(name, "{media}", 1)}


def example_server(server: Path, job: Json, folder: Path) -> Json:
    """Measures llama-cpp-python's example server, started twice with the same disk caches."""
    config, port = folder / "config.json", free_port()
    cache = folder / "example"
    # the template of our prompt: one image marker, then the question, in Jinja that works for string and dict parts
    before, after = job["prompt"].split("{media}")
    template = before + "{% for part in messages[-1].content %}{{ part if part is string else (part.text or part) }}"
    template += "{% endfor %}" + after.replace("{question}", "")
    config.write_text(
        json.dumps(
            {
                "server": {"host": "127.0.0.1", "port": port},
                "model": {
                    "path": job["text"],
                    "alias": "model",
                    "n_ctx": job["ctx"],
                    "n_seq_max": 4,
                    "n_batch": 512,
                    "n_ubatch": 512,
                    "threads": job["threads"],
                    "threads_batch": job["threads"],
                    "kv_unified": True,
                    "chat_template": template,
                    "mtmd": {
                        "mmproj_path": job["vision"],
                        "embedding_cache": {"path": str(cache / "embeddings"), "max_bytes": 1 << 32},
                    },
                },
                "disk_cache": {"path": str(cache / "sequences"), "max_bytes": 1 << 32, "min_tokens": 16},
            }
        )
    )
    runs = []
    for questions in (QUESTIONS, LATER):
        with (folder / "example.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, str(server), "-C", str(config)], stdout=log, stderr=log, cwd=folder
            )
        try:
            runs.append(ask_example_server(f"http://127.0.0.1:{port}", questions, job, process))
            time.sleep(3)  # it writes its caches after the answers
        except (OSError, RuntimeError) as error:
            log_end = (folder / "example.log").read_text(errors="replace")[-2000:]
            return {"error": str(error), "log": log_end}
        finally:
            process.terminate()
            process.wait(60)
    return {**ratios(*runs), "cache_bytes": sum(f.stat().st_size for f in cache.rglob("*") if f.is_file())}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def ask_example_server(address: str, questions: Sequence[str], job: Json, process: subprocess.Popen[bytes]) -> Json:
    deadline = time.monotonic() + START_S
    while True:
        try:
            urllib.request.urlopen(f"{address}/healthz", timeout=5).close()
            break
        except (urllib.error.URLError, OSError):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the server did not start") from None
            time.sleep(0.5)
    url = "data:image/png;base64," + base64.b64encode(Path(job["image"]).read_bytes()).decode()
    image = {"type": "image_url", "image_url": {"url": url}}
    post(address, [{"type": "text", "text": WARM_UP}])
    seconds, told = [], []
    for question in questions:
        begin = time.perf_counter()
        reply = post(address, [image, {"type": "text", "text": question}])
        seconds.append(round(time.perf_counter() - begin, 4))
        told.append(reply.get("usage"))
    return {"seconds": seconds, "questions": told}


def post(address: str, content: list[Json]) -> Json:
    body = {"model": "model", "messages": [{"role": "user", "content": content}], "max_tokens": 1, "temperature": 0.0}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=3600) as reply:
            return dict(json.load(reply))
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"status {error.code}: {error.read()[:500]!r}") from None


if __name__ == "__main__":
    main()
