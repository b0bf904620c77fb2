"""Tests of the files of the server's own page: what they may load, and that no code runs except from script files."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from granite4v.runtime.server.app import WEB
from tests.helpers.served import Served

FILES = sorted(path.name for path in WEB.iterdir())
TYPES = {".html": "text/html", ".css": "text/css", ".js": "javascript", ".svg": "image/svg+xml"}
# ways to turn text into markup or code
SINKS = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|setHTML|eval\(|new Function|\.srcdoc|DOMParser"


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.in_script = ""
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._open = tag

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open in ("script", "style"):
            self.in_script += data


def test_the_page_has_no_script_or_style_of_its_own_and_loads_its_files_alone() -> None:
    page = Tags((WEB / "index.html").read_text(encoding="utf-8"))
    assert not page.in_script.strip()
    names = {name for _, attributes in page.found for name in attributes}
    assert "style" not in names and not {name for name in names if name.startswith("on")}
    loaded = {attributes.get("src") or attributes.get("href") for tag, attributes in page.found if tag != "a"} - {None}
    assert loaded == {f"/web/{name}" for name in ("app.js", "style.css", "icon.svg")}


def test_every_label_and_description_has_its_element() -> None:
    page = Tags((WEB / "index.html").read_text(encoding="utf-8"))
    ids = [attributes["id"] for _, attributes in page.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    for name in ("for", "aria-labelledby", "aria-describedby"):
        assert {attributes[name] for _, attributes in page.found if name in attributes} <= set(ids)
    wanted = set(re.findall(r'\$\("([^"]+)"\)', (WEB / "app.js").read_text(encoding="utf-8")))
    assert wanted <= set(ids) and len(wanted) > 20


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith((".js", ".css"))])
def test_scripts_make_no_markup_and_name_no_other_place(name: str) -> None:
    text = (WEB / name).read_text(encoding="utf-8")
    assert not re.findall(SINKS, text)
    assert not re.findall(r"https?:|//[a-z]+\.|@import|url\(", text)


@pytest.mark.parametrize("name", ["", *(f"web/{name}" for name in FILES)])
def test_files_are_served_with_a_policy_that_forbids_inline_scripts(tiny: Served, name: str) -> None:
    reply = tiny.get(f"/{name}")
    policy = dict(part.strip().split(" ", 1) for part in reply.headers["content-security-policy"].split(";"))
    assert reply.status == 200 and reply.headers["x-content-type-options"] == "nosniff"
    assert (policy["default-src"], policy["script-src"], policy["style-src"]) == ("'none'", "'self'", "'self'")
    assert (policy["connect-src"], policy["frame-ancestors"]) == ("'self'", "'none'")
    assert TYPES[Path(name or "index.html").suffix] in reply.headers["content-type"]
    assert reply.body == (WEB / (name.removeprefix("web/") or "index.html")).read_bytes()
