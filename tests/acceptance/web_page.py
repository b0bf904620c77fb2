"""Uses the server's own page in headless Chromium as a person would: by mouse, by keyboard, with a key, and with
answers that try to be markup.

python -m tests.acceptance.web_page [--shots DIR]

With --shots it also takes the README's screenshot, as 'readme.png'. The model is the embedded one unless another is
given. Needs a Chromium on the path, and the extra `dev`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from playwright.sync_api import Browser, Error, Page, Route, expect, sync_playwright

import granite4v
from granite4v.runtime.formats import Table, read, write
from granite4v.runtime.server import ServerOptions
from scripts.nano.evaluate import Question, held_out
from scripts.nano.formats import form_schema
from scripts.nano.truth import Form
from tests.acceptance.browser import WAIT_MS, Seen, choose, downloads, finish, opened, press, same, shown
from tests.acceptance.harness import Result
from tests.helpers.pdfs import pdf_bytes, text_pdf
from tests.helpers.served import Served, served
from tests.helpers.source_tree import ROOT

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Markup that would run or load something if it were not treated as text.
HOSTILE = '<img src=x onerror="window.taken=1"><script>window.taken=1</script>'
LEAST_CONTRAST = 4.5  # WCAG 2, level AA
README_PICTURE = ROOT / "docs" / "serve.png"
BLUR_PX = 10  # the screenshots are compared by the means of squares of this side
OTHER_GREY, OTHER_SHARE = 24, 0.02  # of 255; of the squares: the line of timings differs each time


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model directory; by default the embedded model")
    parser.add_argument("--shots", type=Path, help="a directory for screenshots")
    options = parser.parse_args(arguments)
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        parser.error(f"no browser; install one of {', '.join(BROWSERS)}")
    with granite4v.load(*filter(None, [options.model])) as model, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        with contextlib.closing(browser):
            return web_page(model, browser, options.shots).print()


def web_page(model: granite4v.Model, browser: Browser, shots: Path | None) -> Result:
    questions = {question.task: question for question in held_out(3)}
    seen, broken = Seen(), []
    checks: list[Callable[[Served, Browser, Seen, dict[str, Question]], None]] = [
        tables_are_tables,
        charts_are_tables,
        fields_are_a_form,
        questions_by_keyboard,
        pages_of_a_pdf,
        an_answer_is_stopped,
        refusals_are_told,
        answers_are_never_markup,
        colours_have_contrast,
        narrow_windows_do_not_scroll,
        everything_has_a_name,
        the_readme_shows_it,
    ]
    with served(model) as server:
        for check in checks:
            try:
                check(server, browser, seen, questions)
                seen.lines.append(check.__name__.replace("_", " "))
            except (AssertionError, Error) as error:
                broken.append(f"{check.__name__.replace('_', ' ')}: {error}")
        if shots is not None:
            take_shots(server, browser, questions, shots)
        server.wait_until_idle()
        strangers = seen.origins - {server.url, "data:", "blob:"}
    with served(model, ServerOptions(api_key="geheim")) as server:
        try:
            a_key_is_asked_for(server, browser, questions)
            seen.lines.append("a key is asked for")
        except (AssertionError, Error) as error:
            broken.append(f"a key is asked for: {error}")
    if strangers:
        broken.append(f"the page asked {', '.join(sorted(strangers))} for something")
    broken += [f"the page said: {error}" for error in seen.errors]
    return Result("web_page", {"checks": len(seen.lines), "browser": browser.version}, seen.lines, broken)


# --- what is promised ---


def tables_are_tables(server: Served, browser: Browser, seen: Seen, questions: dict[str, Question]) -> None:
    for task in ("tables_html", "tables_otsl", "tables_json"):
        with opened(server, browser, seen) as page:
            choose(page, questions[f"<{task}>"], task)
            tables: list[Table] = read(task, press(page))
            same(shown(page), [table.texts() for table in tables], f"the tables of {task}")
            found = downloads(page, "CSV", len(tables))
            same([one.decode() for one in found], [write(table, "csv") for table in tables], "CSV")
            (content,) = downloads(page, "JSON", 1)
            same(json.loads(content), [json.loads(write(table, "json")) for table in tables], "JSON")
            check_shades(page, sum(len(table.cells) for table in tables))


def check_shades(page: Page, n_cells: int) -> None:
    """Checks that cells have their least probability, and that uncertain cells have a shade and a label."""
    cells = page.evaluate(
        """() => [...document.querySelectorAll("#view [data-least]")].map((cell) => [
          Number(cell.dataset.least), cell.className, cell.textContent, cell.title])"""
    )
    assert n_cells / 2 < len(cells) <= n_cells, f"{len(cells)} of {n_cells} cells have a confidence"
    for least, shade, text, title in cells:
        level = 3 if least < 0.5 else 2 if least < 0.8 else 1 if least < 0.95 else 0
        same(shade, f"unsure-{level}" if level else "", f"the shade of a cell that is sure by {least}")
        same("(unsure" in text, level >= 2, f"what {text!r} says")
        assert title.startswith("least probability"), title
    page.get_by_role("button", name="Least certain").click()
    least = page.evaluate("() => Number(document.activeElement.dataset.least)")
    same(least, min(cell[0] for cell in cells), "the first cell of 'Least certain'")


def charts_are_tables(server: Served, browser: Browser, seen: Seen, questions: dict[str, Question]) -> None:
    with opened(server, browser, seen) as page:
        choose(page, questions["<chart2csv>"], "chart2csv")
        same(shown(page), [], "tables before the answer")
        text = press(page)
        same(shown(page), [read("chart2csv", text).texts()], "the chart's data")


def fields_are_a_form(server: Served, browser: Browser, seen: Seen, questions: dict[str, Question]) -> None:
    question = questions["kvp"]
    with opened(server, browser, seen) as page:
        choose(page, question, "kvp")
        page.get_by_label("JSON Schema of the fields").fill("{")
        page.get_by_role("button", name="Read").click()
        expect(page.locator("#schema-problem")).to_contain_text("not JSON")
        page.get_by_label("JSON Schema of the fields").fill(schema_of(question))
        value = read("kvp", press(page))
        (content,) = downloads(page, "JSON", 1)
        same(json.loads(content), value, "JSON")
        inputs = page.locator("#view input")
        leaves = list(_leaves(value))
        same([inputs.nth(i).input_value() for i in range(inputs.count())], [_written(one) for one in leaves], "inputs")
        inputs.first.fill("corrected")
        (content,) = downloads(page, "JSON", 1)
        same(next(iter(_leaves(json.loads(content)))), "corrected", "a field that was corrected")


def schema_of(question: Question) -> str:
    assert isinstance(question.document.truth, Form)
    return json.dumps(form_schema(question.document.truth), indent=2)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)
    else:
        yield value


def _written(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def questions_by_keyboard(server: Served, browser: Browser, seen: Seen, questions: dict[str, Question]) -> None:
    """Uses the keyboard alone, and no image."""
    with opened(server, browser, seen) as page:
        page.keyboard.press("Tab")
        for _ in range(20):
            if page.evaluate("() => document.activeElement.id") == "question":
                break
            page.keyboard.press("Tab")
        page.keyboard.press("Control+Enter")
        expect(page.locator("#failure")).to_have_text("Write a question first.")
        page.keyboard.type("What is this?")
        page.keyboard.press("Control+Enter")
        expect(page.locator("#status")).to_contain_text("tokens", timeout=WAIT_MS)
        text = finish(page)
        reply = server.post(
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "What is this?"}], "max_completion_tokens": 2048},
        )
        same(text, reply.json["choices"][0]["message"]["content"], "the answer")
        same(page.locator("#view").inner_text().split(), text.split(), "the text")


def pages_of_a_pdf(server: Served, browser: Browser, seen: Seen, questions: dict[str, Question]) -> None:
    with opened(server, browser, seen) as page:
        content = pdf_bytes(text_pdf("one", "two", "three"))
        page.get_by_label("Drop an image or a PDF here").set_input_files(
            {"name": "three.pdf", "mimeType": "application/pdf", "buffer": content}
        )
        page.get_by_label("Task", exact=True).select_option("tables_html")
        page.get_by_label("Pages, such as 1-3,7").fill("9")
        page.get_by_role("button", name="Read").click()
        expect(page.locator("#failure")).to_contain_text("3 pages")
        page.get_by_label("Pages, such as 1-3,7").fill("2")
        press(page)
        expect(page.locator("#failure")).to_have_text("")
        page.get_by_role("button", name="Remove three.pdf").click()
        same(page.locator("#pages li").count(), 0, "pages after their removal")
        seen.errors.clear()  # a browser reports every error response


def an_answer_is_stopped(server: Served, browser: Browser, seen: Seen, questions: dict[str, Question]) -> None:
    with opened(server, browser, seen) as page:
        page.get_by_label("Question").fill("What is this?")
        page.get_by_text("Options").click()
        page.get_by_label("Tokens at most").fill("7000")
        page.route("**/v1/chat/completions", without_an_end)
        page.get_by_role("button", name="Read").click()
        expect(page.locator("#text")).not_to_be_empty(timeout=WAIT_MS)
        page.get_by_role("button", name="Stop").click()
        expect(page.locator("#status")).to_have_text("Stopped.")
        server.wait_until_idle()


def without_an_end(route: Route) -> None:
    """Forwards a request with `ignore_eos`, so that the answer runs up to its token limit."""
    route.continue_(post_data=json.dumps({**json.loads(route.request.post_data or "{}"), "ignore_eos": True}))


def refusals_are_told(server: Served, browser: Browser, seen: Seen, questions: dict[str, Question]) -> None:
    with opened(server, browser, seen) as page:
        page.get_by_label("Question").fill("word " * 20_000)
        page.get_by_role("button", name="Read").click()
        expect(page.locator("#failure")).to_contain_text("context")
        expect(page.get_by_role("button", name="Read")).to_be_enabled()
        page.get_by_label("Task", exact=True).select_option("tables_html")
        page.get_by_role("button", name="Read").click()
        expect(page.locator("#failure")).to_have_text("Choose an image or a PDF first.")
        seen.errors.clear()


def answers_are_never_markup(server: Served, browser: Browser, seen: Seen, questions: dict[str, Question]) -> None:
    """Replaces the server's stream with texts that a model would not write by itself; its parsers stay in use."""
    cell = HOSTILE.replace("<", "&lt;")
    hostile = {
        "prompt": HOSTILE,
        "tables_html": f"<table><tr><th>{cell}</th></tr><tr><td>{cell}</td></tr></table>",
        "chart2csv": f'"{HOSTILE.replace(chr(34), chr(34) * 2)}",b\n1,2\n',
        "kvp": json.dumps({HOSTILE: HOSTILE, "list": [{"a": HOSTILE}]}),
    }
    for task, text in hostile.items():
        chunks = [
            {"choices": [{"index": 0, "delta": {"content": text}}]},
            {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
        ]
        body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
        with opened(server, browser, seen) as page:
            page.route("**/v1/chat/completions", functools.partial(_fulfil, body))
            choose(page, questions["kvp"], task)
            if task == "prompt":
                page.get_by_label("Question").fill("x")
            same(press(page), text, "the text")
            made = page.locator("#view").locator("img, script, iframe, object, a, svg").count()
            same((made, page.evaluate("() => window.taken")), (0, None), f"elements made by an answer to {task}")
            seen_text = page.locator("#view").evaluate(
                "(view) => view.textContent + [...view.querySelectorAll('input')].map((one) => one.value).join(' ')"
            )
            assert HOSTILE in seen_text, f"{seen_text!r} has not the text itself"


def _fulfil(body: str, route: Route) -> None:
    route.fulfill(status=200, content_type="text/event-stream", body=body)


def colours_have_contrast(server: Served, browser: Browser, seen: Seen, questions: dict[str, Question]) -> None:
    for scheme in ("light", "dark"):
        with opened(server, browser, seen, color_scheme=scheme) as page:
            page.locator("#legend").evaluate("(one) => { one.hidden = false; }")
            contrasts = page.evaluate(
                """() => {
                  const light = (c) => { const p = c.map((v) => { v /= 255; return v <= 0.04045 ? v / 12.92 :
                    ((v + 0.055) / 1.055) ** 2.4; }); return 0.2126 * p[0] + 0.7152 * p[1] + 0.0722 * p[2]; };
                  const parts = (text) => text.match(/[\\d.]+/g).map(Number);
                  const ground = (one) => { for (let at = one; at; at = at.parentElement) {
                    const c = parts(getComputedStyle(at).backgroundColor); if (c.length < 4 || c[3]) return c; }
                    return [255, 255, 255]; };
                  return [...document.querySelectorAll("body *")].filter((one) => one.checkVisibility() &&
                    [...one.childNodes].some((c) => c.nodeType === 3 && c.data.trim()) && !one.disabled)
                    .map((one) => { const a = light(parts(getComputedStyle(one).color).slice(0, 3));
                      const b = light(ground(one).slice(0, 3));
                      return [one.textContent.trim().slice(0, 30), (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
                    });
                }"""
            )
            assert len(contrasts) > 10, contrasts
            low = [(text, round(value, 2)) for text, value in contrasts if value < LEAST_CONTRAST]
            same(low, [], f"texts with too little contrast, {scheme}")


def narrow_windows_do_not_scroll(server: Served, browser: Browser, seen: Seen, questions: dict[str, Question]) -> None:
    with opened(server, browser, seen, viewport={"width": 360, "height": 640}) as page:
        choose(page, questions["<tables_html>"], "tables_html")
        press(page)
        width = page.evaluate("() => document.documentElement.scrollWidth")
        assert width <= 360, f"the page is {width} px wide in a window of 360"


def everything_has_a_name(server: Served, browser: Browser, seen: Seen, questions: dict[str, Question]) -> None:
    """Checks roles and names for screen readers: every control has a role and a name."""
    with opened(server, browser, seen) as page:
        choose(page, questions["<tables_html>"], "tables_html")
        press(page)
        page.get_by_text("Options").click()
        tree = page.locator("body").aria_snapshot()
        for line in (
            'button "Read"', 'button "Stop" [disabled]', 'combobox "Task"', 'spinbutton "Tokens at most"',
            'checkbox "Show how sure the model is" [checked]', 'heading "Answer" [level=2]', "table", "columnheader",
            'region "Table 1"', "status:", 'img "The page page.png"', 'button "Remove page.png"',
        ):  # fmt: skip
            assert line in tree, f"no {line} in {tree}"
        nameless = page.evaluate(
            """() => [...document.querySelectorAll("input, select, textarea, button")].filter((one) =>
              one.checkVisibility() && !one.labels?.length && !one.textContent.trim() && !one.ariaLabel)
              .map((one) => one.id)"""
        )
        same(nameless, [], "controls without a name")


def the_readme_shows_it(server: Served, browser: Browser, seen: Seen, questions: dict[str, Question]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "now.png"
        take_readme_shot(server, browser, seen, questions, path)
        with PIL.Image.open(path) as now, PIL.Image.open(README_PICTURE) as kept:
            same(kept.size, now.size, "the size of the README's picture")
            # smoothed, because text rendering differs slightly between machines
            small = [
                image.convert("L").resize((image.width // BLUR_PX, image.height // BLUR_PX), PIL.Image.Resampling.BOX)
                for image in (now, kept)
            ]
        differences = np.abs(np.asarray(small[0], np.int16) - np.asarray(small[1], np.int16))
        n_other = int((differences > OTHER_GREY).sum())
    seen.lines.append(f"the README's picture: {n_other} of {differences.size} squares differ")
    if n_other > OTHER_SHARE * differences.size:
        raise AssertionError(
            f"{README_PICTURE.name} shows another page ({seen.lines.pop()}); take it anew with --shots"
        )


def take_readme_shot(server: Served, browser: Browser, seen: Seen, questions: dict[str, Question], path: Path) -> None:
    """Takes the screenshot of a table and its confidences."""
    with opened(server, browser, seen, viewport={"width": 1280, "height": 650}) as page:
        choose(page, questions["<tables_html>"], "tables_html")
        press(page)
        expect(page.locator("#view table")).to_have_count(1)
        page.screenshot(path=path)


def a_key_is_asked_for(server: Served, browser: Browser, questions: dict[str, Question]) -> None:
    with contextlib.closing(browser.new_context()) as context:
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        page.goto(server.url)
        for key in ("wrong", "geheim"):
            expect(page.get_by_role("dialog")).to_be_visible()
            page.get_by_label("Key", exact=True).fill(key)
            page.get_by_role("button", name="Use it").click()
        expect(page.get_by_role("dialog")).to_be_hidden()
        expect(page.locator("#task option", has_text="tables_html")).to_have_count(1)
        choose(page, questions["<tables_html>"], "tables_html")
        tables = read("tables_html", press(page))
        same(shown(page), [table.texts() for table in tables], "the table behind a key")


def take_shots(server: Served, browser: Browser, questions: dict[str, Question], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    looks: dict[str, dict[str, Any]] = {
        "light": {},
        "dark": {"color_scheme": "dark"},
        "narrow": {"viewport": {"width": 400, "height": 800}},
    }
    for name, settings in looks.items():
        for task, tag in (("tables_html", "<tables_html>"), ("kvp", "kvp")):
            with opened(server, browser, Seen(), **settings) as page:
                choose(page, questions[tag], task)
                if task == "kvp":
                    page.get_by_label("JSON Schema of the fields").fill(schema_of(questions[tag]))
                press(page)
                page.screenshot(path=folder / f"{name}-{task}.png", full_page=name == "narrow")
    take_readme_shot(server, browser, Seen(), questions, folder / "readme.png")


if __name__ == "__main__":
    sys.exit(main())
