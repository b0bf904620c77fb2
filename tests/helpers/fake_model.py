"""A minimal fake model, and a batch of documents for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import Image

from granite4v.runtime import Answer
from granite4v.runtime.extract import Extraction, extract

SCHEMA = {"type": "object", "properties": {"shade": {"type": "integer"}}, "required": ["shade"]}


class FakeModel:
    """Answers with the brightness of a page, in the format that the task expects."""

    def __init__(self, path: Path, known: tuple[str, ...] = ("tables_html", "chart2csv")) -> None:
        path.write_bytes(b"weights")
        self.files = SimpleNamespace(text=SimpleNamespace(path=path), vision=None, adapter=None, vision_config=None)
        self.n_ctx, self.warnings = 5000, []
        self.settings = {"n_threads": 2, "device": "cpu", "vision_compute": "file", "cache_type": "f16"}
        self.vision_note: str | None = None
        self.parallel_note: str | None = None
        self.known, self.closed = known, False
        self.asked: list[tuple[str, int, int]] = []
        self.fail: Callable[[str, int], None] = lambda prompt, shade: None
        self.held: list[Any] = []
        self.streams: list[FakeStream] = []
        self.n_parallel = 1
        self.answers = {
            "<tables_html>": "<table><tr><th>shade</th></tr><tr><td>{shade}</td></tr></table>",
            "<chart2csv>": "x,shade\na,{shade}\n",
        }

    def prepare(self, prompt: str, images: Any, **held: Any) -> Any:
        expanded = f"task {len(prompt)}" if prompt.strip("<>") in self.known else prompt
        return SimpleNamespace(text=f"system {expanded}", n_tokens=1000, question=prompt, images=images)

    def submit(self, prepared: Any, options: Any, *, progress: Any, listener: Any, drafts: Any) -> Any:
        prompt, shade = prepared.question, prepared.images[0].pillow.getpixel((0, 0))[0]
        progress("prefill", 0, 1)
        self.asked.append((prompt, shade, options.max_tokens))
        self.held.append({"constraint": options.constraint, "fast_forward": options.fast_forward})
        self.fail(prompt, shade)
        text = self.answers.get(prompt, '{{"shade": {shade}}}' if "schema" in prompt else "It is {shade}.")
        self.streams.append(FakeStream(text.format(shade=shade), listener))
        return self.streams[-1]

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> FakeModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FakeStream:
    """A stream that yields one letter per poll."""

    def __init__(self, text: str, listener: Callable[[], None]) -> None:
        self.answer = Answer(finish_reason="stop")
        self.is_done = self.is_held = self.is_cancelled = False
        self._text, self._listener = text, listener

    def let_run(self) -> None:
        self._listener()

    def poll(self) -> bool:
        if self.is_held:  # until `is_held` is cleared
            return False
        self._listener()
        n = len(self.answer.tokens)
        if n == len(self._text):
            self.answer.timings.decode_s, self.is_done = 0.5, True
            return True
        self.answer.text += self._text[n]
        self.answer.tokens.append(n)
        self.answer.timings.n_generated += 1
        return False

    def cancel(self) -> None:
        self.is_cancelled = True

    def close(self) -> None:
        self.is_done = True


def make_scans(folder: Path) -> Path:
    """Writes four documents: three with five readable pages, of which c.png and d.bmp have the same pixels, and a
    broken one."""
    folder.mkdir()
    pages = [Image.new("RGB", (20, 30), (shade,) * 3) for shade in (10, 20, 30, 20)]
    pages[0].save(folder / "a.pdf", save_all=True, append_images=pages[1:3], resolution=72)
    (folder / "b.pdf").write_bytes(b"%PDF-1.7 nothing more")
    pages[3].save(folder / "c.png")
    Image.new("RGB", (20, 30), (20,) * 3).save(folder / "d.bmp")
    return folder


def run(model: Any, inputs: Any, tasks: Any = ("tables_html", "kvp"), **options: Any) -> Extraction:
    options = {"schema": SCHEMA if "kvp" in tasks else None, "unconstrained": True, **options}
    return extract(inputs, tasks, model=model, **options)


def without_timings(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key != "timings"} for line in lines]
