"""Third-party programs use `granite4v serve`, each in its own environment, and must get the right answers.

    python -m tests.acceptance.clients --environments ~/clients

docling converts a page, reads a chart and extracts fields over its API engine, with its own presets; the `llm` command
uses its configuration of OpenAI-compatible models; OpenAI's client chats, streams and parses; curl does what a shell
script would. Their results are compared with the known contents of the pages. A missing environment is created with
pip, and kept if `--environments` is given.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from scripts.nano import formats
from scripts.nano.truth import Chart, Form, Table
from tests.acceptance.harness import Json, Result, tell
from tests.acceptance.pages import draw_page
from tests.helpers.serving import Server

PACKAGES = {"docling": "docling==2.143.*", "llm": "llm>=0.36", "openai": "openai>=3,<4"}
KEY = "a-key-of-the-check"
Check = tuple[str, Any, Any]  # description, found, expected


class Asked:
    """A server, pages in a folder, and the known contents of the pages."""

    def __init__(self, url: str, folder: Path, environments: Path) -> None:
        self.url, self.folder, self.environments = url, folder, environments
        table, chart, form = (draw_page(0, 0, kind) for kind in ("table", "chart", "form"))
        for document in (table, chart, form):
            document.picture.save(folder / f"{document.kind}.png")
        table.picture.save(folder / "table.pdf", resolution=200)
        assert isinstance(table.truth, Table) and isinstance(chart.truth, Chart) and isinstance(form.truth, Form)
        self.table, self.chart = table.truth, chart.truth
        self.schema = formats.form_schema(form.truth)
        (folder / "template.json").write_text(json.dumps(self.schema), encoding="utf-8")
        self.html = formats.html(self.table)
        self.fields = dict(form.truth.fields)

    def script(self, name: str) -> Any:
        """Returns what a client script of this folder prints, run in the environment of its name."""
        path = Path(__file__).with_name(f"{name}_client.py")
        return json.loads(self.run(self.interpreter(name), path, self.url, self.folder))

    def interpreter(self, name: str) -> Path:
        """Returns the Python of an environment, which is created first if it is missing."""
        place = self.environments / name
        python = place / "bin" / "python"
        if not python.exists():
            tell(f"installing {PACKAGES[name]} ...")
            venv.create(place, with_pip=True)
            subprocess.run([python, "-m", "pip", "install", "-q", PACKAGES[name]], check=True, stdout=sys.stderr)
        return python

    def run(self, *command: Any, **variables: str) -> str:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": KEY, **variables}
        done = subprocess.run(
            list(map(str, command)), env=environment, capture_output=True, text=True, timeout=600, cwd=self.folder
        )
        if done.returncode:
            raise RuntimeError(f"status {done.returncode}: {done.stderr.strip()[-800:]}")
        return done.stdout


def docling(asked: Asked) -> Iterator[Check]:
    found = asked.script("docling")
    plain = curl_answer(asked, "Convert this page to markdown. Do not miss any text and only output the bare markdown!")
    for name in ("markdown", "html"):
        yield f"VLM pipeline, {name}: status", (found[name]["status"], found[name]["errors"]), ("success", [])
    yield "VLM pipeline, the preset's own question", found["markdown"]["text"], plain
    yield "VLM pipeline, a table", found["html"]["tables"], [grid(asked.table)]
    chart = asked.chart
    rows = [[chart.axis, *chart.series]]
    rows += [[label, *values] for label, values in zip(chart.labels, chart.values, strict=True)]
    yield "chart stage, CSV", found["chart"]["cells"], rows
    yield "chart stage, summary", found["chart"]["summary"], curl_answer(asked, "<chart2summary>", "chart.png")
    yield "extraction's prompt", json.loads(found["fields"]), asked.fields


def llm(asked: Asked) -> Iterator[Check]:
    home = asked.folder / "llm"
    home.mkdir()
    (home / "extra-openai-models.yaml").write_text(
        f"- model_id: nano\n  model_name: nano\n  api_base: {asked.url}/v1\n  api_key_name: nano\n  vision: true\n"
        "  supports_schema: true\n"
    )
    (home / "keys.json").write_text(json.dumps({"nano": KEY}))
    command = asked.interpreter("llm").with_name("llm")

    def said(*arguments: Any) -> str:
        return asked.run(command, "-m", "nano", *arguments, LLM_USER_PATH=str(home)).strip()

    yield "a page, streamed", said("-a", "table.png", "<tables_html>"), asked.html
    yield "a page, whole", said("--no-stream", "-a", "table.png", "<tables_html>"), asked.html
    prompt = formats.kvp_prompt(asked.schema)
    yield "a schema", json.loads(said("-a", "form.png", "--schema", "template.json", prompt)), asked.fields
    name, value = next((name, value) for name, value in asked.fields.items() if value is not None)
    yield "a further question", said("-c", formats.field_question(name)), value


def openai(asked: Asked) -> Iterator[Check]:
    found = asked.script("openai")
    for name in ("chat", "stream"):
        yield name, found[name], asked.html
    for name in ("parsed", "response"):
        yield name, found[name], asked.fields


def curl(asked: Asked) -> Iterator[Check]:
    yield "a page", curl_answer(asked, "<tables_html>"), asked.html
    lines = curl_chat(asked, question("<tables_html>", asked.folder / "table.png") | {"stream": True}).splitlines()
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    deltas = [json.loads(line)["choices"][0]["delta"].get("content") or "" for line in data if '"delta"' in line]
    yield "a stream", ("".join(deltas), data[-1]), (asked.html, "[DONE]")
    form = {"type": "json_schema", "json_schema": {"name": "form", "schema": asked.schema}}
    body = question(formats.kvp_prompt(asked.schema), asked.folder / "form.png") | {"response_format": form}
    yield "a schema", json.loads(content(curl_chat(asked, body))), asked.fields
    file = {"file": {"filename": "table.pdf", "file_data": data_url(asked.folder / "table.pdf")}}
    parts = [{"type": "file", **file}, {"type": "text", "text": "<tables_html>"}]
    yield "a PDF", content(curl_chat(asked, {"messages": [{"role": "user", "content": parts}]})), asked.html
    for name, status in ((KEY, "200"), ("another", "401")):
        reply = asked.run(
            "curl", "-sw", "%{http_code}", "-H", f"Authorization: Bearer {name}", f"{asked.url}/v1/models"
        )
        yield f"the models with {name}", reply[-3:], status


def curl_answer(asked: Asked, text: str, page: str = "table.png") -> str:
    return content(curl_chat(asked, question(text, asked.folder / page) | {"max_tokens": 4096}))


def curl_chat(asked: Asked, body: Json) -> str:
    request = asked.folder / "request.json"
    request.write_text(json.dumps(body), encoding="utf-8")
    url = f"{asked.url}/v1/chat/completions"
    headers = ("-H", "Content-Type: application/json", "-H", f"Authorization: Bearer {KEY}")
    return asked.run("curl", "-sSN", "--fail-with-body", url, *headers, "-d", f"@{request}")


def question(text: str, page: Path) -> Json:
    image = {"type": "image_url", "image_url": {"url": data_url(page)}}
    return {"messages": [{"role": "user", "content": [image, {"type": "text", "text": text}]}], "temperature": 0}


def content(reply: str) -> str:
    return str(json.loads(reply)["choices"][0]["message"]["content"])


def data_url(path: Path) -> str:
    kind = "application/pdf" if path.suffix == ".pdf" else "image/png"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def grid(table: Table) -> list[list[str]]:
    """Returns the text of every slot; a cell that spans several slots is repeated in all of them."""
    slots = [[""] * table.n_cols for _ in range(table.n_rows)]
    for cell in table.cells:
        for i in range(cell.row, cell.row + cell.rowspan):
            slots[i][cell.col : cell.col + cell.colspan] = [cell.text] * cell.colspan
    return slots


CLIENTS: dict[str, Callable[[Asked], Iterator[Check]]] = {
    "docling": docling,
    "llm": llm,
    "openai": openai,
    "curl": curl,
}


def judge(result: Result, name: str, checks: Iterator[Check]) -> None:
    """Compares what a client got with what it should get. A client that fails does not stop the others."""
    right = 0
    try:
        for what, found, expected in checks:
            right += found == expected
            if found != expected:
                result.broken.append(f"{name}, {what}: {found!r:.300} instead of {expected!r:.300}")
    except Exception as error:
        result.broken.append(f"{name}: {type(error).__name__}: {error}")
    result.figures[name] = right
    result.lines.append(f"{name}: {right} right answers")


def check(options: argparse.Namespace, work: Path) -> Result:
    result = Result("clients")
    with Server("--api-key", KEY) as server:
        asked = Asked(f"http://127.0.0.1:{server.port}", work, options.environments or work / "environments")
        for name in options.clients:
            judge(result, name, CLIENTS[name](asked))
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, help="a directory for the clients' environments, kept")
    parser.add_argument("clients", nargs="*", default=list(CLIENTS), help=f"of {', '.join(CLIENTS)}; all by default")
    options = parser.parse_args(arguments)
    if unknown := set(options.clients) - set(CLIENTS):
        parser.error(f"unknown clients: {', '.join(sorted(unknown))}")
    if shutil.which("curl") is None:
        parser.error("curl is not installed")
    with tempfile.TemporaryDirectory(prefix="acceptance-") as work:
        return check(options, Path(work)).print()


if __name__ == "__main__":
    sys.exit(main())
