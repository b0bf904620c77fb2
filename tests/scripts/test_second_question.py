"""The measurement of a second question: what each side is asked, and the ratios; peers are fakes over real HTTP."""

from __future__ import annotations

import argparse
import base64
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from granite4v.default_model import embedded_model
from scripts import second_question
from tests.helpers.chats import INVOICE

# Writes the requests to a file.
EXAMPLE_SERVER = """
import http.server, json, pathlib, sys

config = json.loads(pathlib.Path(sys.argv[2]).read_text())
cache = pathlib.Path(config["disk_cache"]["path"])
cache.mkdir(parents=True, exist_ok=True)
(cache / "page").write_bytes(bytes(1000))

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply({})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with open("asked.jsonl", "a") as log:
            log.write(json.dumps(asked["messages"][0]["content"]) + "\\n")
        self.reply({"usage": {"prompt_tokens": 7}})

    def reply(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass

http.server.HTTPServer((config["server"]["host"], config["server"]["port"]), Handler).serve_forever()
"""
XLLAMACPP = """
import http.server, json, pathlib, threading, types

__version__ = "1"

class CommonParams(types.SimpleNamespace):
    def __init__(self):
        super().__init__(model=types.SimpleNamespace(), mmproj=types.SimpleNamespace(),
                         cpuparams=types.SimpleNamespace(), cpuparams_batch=types.SimpleNamespace())

class Server:
    def __init__(self, params):
        folder = pathlib.Path(params.slot_save_path)

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.reply(200, {"media_marker": "<here>"})

            def do_POST(self):
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path == "/slots/0?action=save":
                    (folder / asked["filename"]).write_text("state")
                elif self.path == "/slots/0?action=restore" and not (folder / asked["filename"]).exists():
                    return self.reply(400, {"error": "no state"})
                with (folder / "asked.jsonl").open("a") as log:
                    log.write(json.dumps([self.path, asked]) + "\\n")
                self.reply(200, {"tokens_evaluated": 9, "timings": {"cache_n": 8}})

            def reply(self, status, content):
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.listening_address = f"http://127.0.0.1:{server.server_port}"
"""


def options(**given: Any) -> argparse.Namespace:
    usual = {"mmproj": None, "threads": 1, "cache_type": "f16", "ctx": 512, "without_us": False}
    peers = {"llama_server": None, "example_server": None}
    return argparse.Namespace(model=str(embedded_model(str)), image=INVOICE, **{**usual, **peers, **given})


def test_ratios_by_hand() -> None:
    found = second_question.ratios({"seconds": [10.0, 0.1, 0.3], "load_s": 1.0}, {"seconds": [0.2, 5.0]})
    assert found == {
        "first_s": 10.0,
        "second_s": [0.1, 0.3],
        "restart_s": [0.2, 5.0],
        "second_ratio": 0.03,  # the slower of the later ones
        "restart_ratio": 0.02,  # the first one after the restart
        "first": {"load_s": 1.0},
        "restart": {},
    }


def test_our_page_is_read_once_for_both_processes(tmp_path: Path) -> None:
    side = second_question.measure(options(), tmp_path)["granite4v"]
    first, *others = side["first"]["questions"]
    assert first["n_stored"] == 0 and first["encode_s"] > 0
    assert [told["encode_s"] for told in (*others, *side["restart"]["questions"])] == [0, 0, 0, 0]
    after, last = side["restart"]["questions"]
    assert after["n_stored"] == last["n_reused"] > 100  # the page and what comes before it, from disk and from memory
    assert len(side["stored_bytes"]) == 1 and len(side["second_s"]) == 2 and len(side["restart_s"]) == 2


def test_peers_are_asked_the_same_with_our_prompt(tmp_path: Path) -> None:
    job = {"model": str(embedded_model(str)), "mmproj": None, "image": str(INVOICE), "threads": 1}
    told = second_question.files_and_prompt(job)
    assert told["prompt"].count("{media}") == told["prompt"].count("{question}") == 1
    assert told["prompt"].index("{media}") < told["prompt"].index("{question}")
    assert Path(told["text"]).name == "text-F16.gguf" and Path(told["vision"]).name == "mmproj-F16.gguf"

    server = tmp_path / "server.py"
    server.write_text(EXAMPLE_SERVER)
    side = second_question.measure(options(without_us=True, example_server=server), tmp_path)["example server"]
    assert side["cache_bytes"] == 1000 and [len(side[name]) for name in ("second_s", "restart_s")] == [2, 2]
    url = "data:image/png;base64," + base64.b64encode(INVOICE.read_bytes()).decode()
    asked = [json.loads(line) for line in (tmp_path / "asked.jsonl").read_text().splitlines()]
    texts = [
        second_question.WARM_UP,
        *second_question.QUESTIONS,
        second_question.WARM_UP,
        *second_question.LATER,
    ]
    assert [content[-1]["text"] for content in asked] == texts
    assert [content[0]["image_url"]["url"] for content in asked if len(content) > 1] == [url] * 5


def test_a_server_that_does_not_start_is_told(tmp_path: Path) -> None:
    server = tmp_path / "server.py"
    server.write_text("raise SystemExit('no such model')")
    side = second_question.measure(options(without_us=True, example_server=server), tmp_path)["example server"]
    assert side["error"] == "the server did not start" and "no such model" in side["log"]


def test_a_slot_is_saved_and_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "xllamacpp.py").write_text(XLLAMACPP)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    side = second_question.measure(options(without_us=True, llama_server=sys.executable), tmp_path)["llama-server"]
    assert side["first"]["questions"] == [{"n_prompt": 9, "n_reused": 8}] * 3
    assert "save" in side["first"] and "error" not in side["restart"]["restore"]
    asked = [json.loads(line) for line in (tmp_path / "slots" / "asked.jsonl").read_text().splitlines()]
    assert [path for path, _ in asked] == [
        *["/completion"] * 4, "/slots/0?action=save", "/completion", "/slots/0?action=restore", *["/completion"] * 2,
    ]  # fmt: skip
    bodies = [body for path, body in asked if path == "/completion" and "prompt_string" in body["prompt"]]
    page = base64.b64encode(INVOICE.read_bytes()).decode()
    assert {body["prompt"]["multimodal_data"][0] for body in bodies} == {page}
    questions = (*second_question.QUESTIONS, *second_question.LATER)
    for body, question in zip(bodies, questions, strict=True):
        assert question in body["prompt"]["prompt_string"] and "<here>" in body["prompt"]["prompt_string"]
        assert (body["id_slot"], body["cache_prompt"], body["n_predict"]) == (0, True, 1)


def test_the_result_is_the_last_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(second_question, "measure", lambda options, folder: {"granite4v": {"first_s": 1.0}})
    monkeypatch.setattr(sys, "argv", ["second_question", "model", "--image", "page.png", "--threads", "3"])
    second_question.main()
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told == {"image": "page.png", "threads": 3, "sides": {"granite4v": {"first_s": 1.0}}}
