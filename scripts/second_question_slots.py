"""The llama-server side of `scripts.second_question`: PYTHON_WITH_XLLAMACPP second_question_slots.py JOB.json

Asks the job's questions about its page in one slot, and saves or restores the slot's state as the job says. Independent
of granite4v. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import base64
import json
import sys
import time
import urllib.error
from pathlib import Path
from typing import Any

import xllamacpp  # type: ignore[import-not-found]  # in the interpreter that runs this
from llama_server import Client, parameters  # type: ignore[import-not-found]  # next to this file

Json = dict[str, Any]
STATE = "page.slot"


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    params = parameters({**job, "mmproj": job["vision"], "slots": 1})
    folder = Path(job["store"]).parent / "slots"
    folder.mkdir(exist_ok=True)
    params.slot_save_path = f"{folder}/"
    params.endpoint_slots = True
    server = xllamacpp.Server(params)
    client = Client(server.listening_address)
    client.post("/completion", {"prompt": "Hello.", "n_predict": 1, "id_slot": 0})
    told: Json = {"version": xllamacpp.__version__}
    if job["is_restart"]:
        told["restore"] = slot(client, "restore")
    image = base64.b64encode(Path(job["image"]).read_bytes()).decode()
    seconds, questions = [], []
    for question in job["questions"]:
        begin = time.perf_counter()
        text = job["prompt"].replace("{media}", client.marker).replace("{question}", question)
        reply = client.post(
            "/completion",
            {
                "prompt": {"prompt_string": text, "multimodal_data": [image]},
                "id_slot": 0,
                "cache_prompt": True,
                "n_predict": 1,
                "ignore_eos": True,
                "temperature": 0.0,
            },
        )
        seconds.append(round(time.perf_counter() - begin, 4))
        questions.append({"n_prompt": reply["tokens_evaluated"], "n_reused": reply["timings"].get("cache_n", 0)})
    if not job["is_restart"]:
        told["save"] = slot(client, "save")
    print(json.dumps({"seconds": seconds, "questions": questions, **told}))


def slot(client: Client, action: str) -> Json:
    """Returns the server's reply to `action`, and the seconds it took."""
    begin = time.perf_counter()
    try:
        reply = client.post(f"/slots/0?action={action}", {"filename": STATE})
    except urllib.error.HTTPError as error:
        reply = {"status": error.code, "error": error.read().decode(errors="replace")[:500]}
    return {**reply, "seconds": round(time.perf_counter() - begin, 3)}


if __name__ == "__main__":
    main()
