"""Answers questions about pages in the slots of llama-server, as embedded by xllamacpp. Independent of granite4v.

    PYTHON_WITH_XLLAMACPP scripts/llama_server.py JOB.json

The job names the files ('text', 'mmproj'), 'slots', 'threads', 'ctx' (positions of a slot), 'pages' (image files) and
'prompts' (with one '{media}' where the page goes); 'n_predict' is the number of tokens of each answer, by page and
prompt. The order of questions is the best one for the server: all questions about a page go to one slot, one after
another, so that its prompt cache saves encoding and prefill, and different pages go to different slots. With
'in_rounds' each page has its own slot, and each prompt is asked about all pages at once (except those with no tokens to
generate), after all answers to the previous prompt have arrived; 'rounds_s' has the seconds of each round.

The clock starts after the server has answered a first question without a page. The last line on stdout is one JSON
object: seconds, the figures of each answer, and the peak memory of this process, which contains the server.
"""

from __future__ import annotations

import base64
import json
import queue
import re
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import xllamacpp  # type: ignore[import-not-found]  # in the interpreter that runs this

Json = dict[str, Any]


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    server = xllamacpp.Server(parameters(job))
    client = Client(server.listening_address)
    client.post("/completion", {"prompt": "Hello.", "n_predict": 2})
    begin = time.perf_counter()
    rounds_s: list[float] = []
    answers = ask_in_rounds(client, job, rounds_s) if job.get("in_rounds") else ask_all(client, job)
    seconds = time.perf_counter() - begin
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    result = {
        "seconds": round(seconds, 3),
        "rounds_s": rounds_s,
        "answers": answers,
        "peak_rss_gb": int(peak[1]) * 1024 / 1e9,
    }
    print(json.dumps({**result, "version": xllamacpp.__version__, "system": xllamacpp.get_system_info()}))


def parameters(job: Json) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path, params.mmproj.path = job["text"], job["mmproj"]
    params.n_parallel, params.n_ctx = job["slots"], job["ctx"] * job["slots"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job["threads"]
    params.cache_ram_mib = 0  # no page is asked about again after its questions
    params.no_extra_bufts = bool(job.get("plain_weights"))
    params.fit_params = False
    params.verbosity = 0
    return params


class Client:
    """A client of the server, over HTTP."""

    def __init__(self, address: str) -> None:
        self._address = address
        with urllib.request.urlopen(f"{address}/props", timeout=60) as reply:
            self.marker = json.load(reply).get("media_marker") or "<__media__>"

    def post(self, path: str, body: Json) -> Json:
        request = urllib.request.Request(
            self._address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=3600) as reply:
            return dict(json.load(reply))


def ask_all(client: Client, job: Json) -> list[Json]:
    """Asks every prompt about every page, each page in one slot. Returns the results sorted by page and prompt."""
    pages: queue.SimpleQueue[int] = queue.SimpleQueue()
    for i in range(len(job["pages"])):
        pages.put(i)
    answers: list[Json] = []
    failed: list[BaseException] = []

    def work(slot: int) -> None:
        try:
            while not failed:
                page = pages.get_nowait()
                image = base64.b64encode(Path(job["pages"][page]).read_bytes()).decode()
                for i, prompt in enumerate(job["prompts"]):
                    answers.append(ask(client, slot, page, i, prompt, image, job["n_predict"][page][i]))
        except queue.Empty:
            pass
        except BaseException as error:
            failed.append(error)

    slots = [threading.Thread(target=work, args=(slot,)) for slot in range(job["slots"])]
    for slot in slots:
        slot.start()
    for slot in slots:
        slot.join()
    if failed:
        raise failed[0]
    return sorted(answers, key=lambda answer: (answer["page"], answer["prompt"]))


def ask_in_rounds(client: Client, job: Json, rounds_s: list[float]) -> list[Json]:
    """Asks prompt by prompt about all pages at once. Appends the seconds of each prompt to `rounds_s`."""
    images = [base64.b64encode(Path(page).read_bytes()).decode() for page in job["pages"]]
    answers: list[Json] = []
    for i, prompt in enumerate(job["prompts"]):

        def work(page: int, i: int = i, prompt: str = prompt) -> None:
            answers.append(ask(client, page, page, i, prompt, images[page], job["n_predict"][page][i]))

        asked = [page for page in range(len(images)) if job["n_predict"][page][i]]
        threads = [threading.Thread(target=work, args=(page,)) for page in asked]
        begin = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        rounds_s.append(round(time.perf_counter() - begin, 3))
    return answers


def ask(client: Client, slot: int, page: int, i: int, prompt: str, image: str, n_predict: int) -> Json:
    begin = time.perf_counter()
    reply = client.post(
        "/completion",
        {
            "prompt": {"prompt_string": prompt.replace("{media}", client.marker), "multimodal_data": [image]},
            "id_slot": slot,
            "cache_prompt": True,
            "n_predict": n_predict,
            "ignore_eos": True,
            "temperature": 0.0,
        },
    )
    timings = reply["timings"]
    told = {
        "page": page,
        "prompt": i,
        "seconds": round(time.perf_counter() - begin, 3),
        "n_prompt": reply["tokens_evaluated"],
        "n_reused": timings.get("cache_n", 0),
        "prompt_s": round(timings["prompt_ms"] / 1e3, 3),
        "n_generated": timings["predicted_n"],
        "generate_s": round(timings["predicted_ms"] / 1e3, 3),
        "begins": reply["content"][:40],
    }
    print(json.dumps(told), file=sys.stderr, flush=True)
    return told


if __name__ == "__main__":
    main()
