"""Tests of typed lines: words, and file paths as the various terminals paste them."""

from __future__ import annotations

from pathlib import Path

import pytest

from granite4v.runtime.chat.line import Line, argument, split_files, starts_with_file, words
from granite4v.runtime.prompt.messages import normalize
from granite4v.runtime.server.content import Attachment, ContentReader
from granite4v.runtime.server.requests import ImagePart


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "my scan's page.png"
    path.write_bytes(b"")
    (tmp_path / "plain.pdf").write_bytes(b"")
    return path


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("what is the total?", ["what", "is", "the", "total?"]),
        ("'a b' \"c d\"", ["a b", "c d"]),
        (r"a\ b c", ["a b", "c"]),
        ("what's the boy's name?", ["what's", "the", "boy's", "name?"]),
        ("'tis so", ["'tis", "so"]),
        ("'a b'#2-3", ["a b#2-3"]),
        ("ends with \\", ["ends", "with", "\\"]),
        ("  \n ", []),
        ('5" wide', ['5"', "wide"]),
    ],
)
def test_words_are_those_of_a_shell_as_far_as_that_makes_sense(text: str, values: list[str]) -> None:
    assert [word.value for word in words(text)] == values


def test_words_know_their_places() -> None:
    text = r"  'a b'  c\ d"
    assert [text[word.start : word.end] for word in words(text)] == ["'a b'", r"c\ d"]


def spellings(path: Path) -> list[str]:
    """The ways in which terminals paste a path."""
    escaped = str(path).replace(" ", r"\ ").replace("'", r"\'")
    return [escaped, f'"{path}"', path.as_uri(), f"file://localhost{path.as_uri().removeprefix('file://')}"]


def test_a_dropped_file_is_attached_and_taken_out(page: Path) -> None:
    for spelled in spellings(page):
        assert split_files(spelled) == split_files(f" {spelled} ")
        for text in (f"{spelled} what is the total?", f"what is the total? {spelled}"):
            line = split_files(text)
            assert (line.text, line.files) == ("what is the total?", (str(page),)), spelled


def test_a_name_may_hold_any_bytes(tmp_path: Path) -> None:
    """Also in URLs: those of dropped files, and those that clients of the server send."""
    path = tmp_path / "caf\udce9.png"
    path.touch()
    url = f"file://{tmp_path}/caf%E9.png"
    assert split_files(f"{url} ?").files == (str(path),)
    (found,) = ContentReader([tmp_path]).parts([ImagePart(type="image_url", image_url=url)], "content")
    assert isinstance(found, Attachment) and found.path == path
    conversation = normalize([{"role": "user", "content": [{"type": "image", "url": url}]}])
    assert conversation.images == [path]


def test_a_file_alone_asks_nothing(page: Path) -> None:
    line = split_files(f'"{page}" {page.parent}/plain.pdf#2-3')
    assert (line.text, line.files) == ("", (str(page), f"{page.parent}/plain.pdf#2-3"))


def test_a_file_within_a_sentence_leaves_its_name(page: Path) -> None:
    line = split_files(f"is {page.parent}/plain.pdf like the other?")
    assert (line.text, line.files) == ("is plain.pdf like the other?", (f"{page.parent}/plain.pdf",))


def test_what_is_no_document_stays_text(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(page.parent)
    (page.parent / "README").write_text("")
    for text in ("read README", "missing.png", "a/b.png", "what is 1/2?", "nul \0.png", "~nobody/x.png"):
        assert split_files(text) == Line(text, ())
    assert split_files("plain.pdf?").files == ()
    assert split_files("plain.pdf").files == ("plain.pdf",)


def test_a_path_is_told_from_a_command(page: Path) -> None:
    assert starts_with_file(f"{page.parent}/plain.pdf total?")
    assert not starts_with_file("/attach x.png") and not starts_with_file("/") and not starts_with_file("")


def test_the_argument_of_a_command_may_have_spaces(page: Path) -> None:
    for spelled in (*spellings(page), str(page)):
        assert argument(spelled) == str(page)
    assert argument("file:///a%20b.pdf#2") == "/a b.pdf#2"
    assert argument("file://server/share.pdf") == "file://server/share.pdf"
