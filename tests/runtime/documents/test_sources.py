"""Tests of finding documents: folders, globs, links, pipes, standard input."""

from __future__ import annotations

import errno
import glob
import io
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from granite4v.clip_projector import load_image
from granite4v.errors import DocumentError
from granite4v.runtime.documents import (
    Page,
    PageFailure,
    count_pages,
    open_pages,
)
from granite4v.runtime.documents.content import open_page_source
from granite4v.runtime.documents.limits import LIMITS
from granite4v.runtime.documents.sources import Document, NotFound, find_documents, glob_matches
from tests.helpers.page_tests import GOOD, VIEW, failure, one, read, same
from tests.helpers.pdfs import pdf_bytes, scan_pdf
from tests.helpers.pictures import encoded, noise_picture


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of images and other files; its parent is the current directory."""
    names = ("page10.png", "page2.PNG", "Page1.png", "notes.txt", ".hidden.png", "sub/a.jpg", ".git/b.png", "sub/c.d")
    for name in names:
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(noise_picture((8, 8), len(name)), "JPEG" if name.endswith("jpg") else "PNG"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "in"


def sources(*inputs: str | Path) -> list[str]:
    return [item.source for item in read(*inputs)]


IN_ORDER = ["in/Page1.png", "in/page2.PNG", "in/page10.png", "in/sub/a.jpg"]


@pytest.mark.usefixtures("folder")
def test_a_directory_gives_known_files_in_natural_order_and_paths_as_given() -> None:
    assert sources("in") == IN_ORDER
    assert sources("./in/") == sources("in//") == sources("./in/.") == IN_ORDER  # the same for every spelling
    assert sources(Path("in")) == IN_ORDER


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("in/*.png", ["in/Page1.png", "in/page10.png"]),
        ("in/[pP]age?.*", ["in/Page1.png", "in/page2.PNG"]),
        ("in/**/*.jpg", ["in/sub/a.jpg"]),
        ("i*", IN_ORDER),
        ("in/s*", ["in/sub/a.jpg"]),
    ],
)
def test_a_glob_that_the_shell_did_not_expand_is_expanded(pattern: str, expected: list[str]) -> None:
    assert sources(pattern) == expected


def test_a_file_whose_name_looks_like_a_glob_is_that_file(folder: Path) -> None:
    (folder / "scan[1].png").write_bytes(GOOD.read_bytes())
    assert sources("in/scan[1].png") == ["in/scan[1].png"]


def test_each_file_is_read_once_and_given_order_is_kept(folder: Path) -> None:
    assert sources("in/page10.png", "in", folder / "page2.PNG", "in/*.png") == [
        "in/page10.png",
        "in/Page1.png",
        "in/page2.PNG",
        "in/sub/a.jpg",
    ]


def test_a_file_named_openly_is_read_whatever_its_suffix(folder: Path) -> None:
    assert [type(item) for item in read("in/notes.txt", "in/sub/c.d")] == [Page, Page]
    (folder / "notes.txt").write_text("nothing to see")
    assert "'in/notes.txt' holds text; expected PNG" in str(failure("in/notes.txt").error)


def test_links_to_files_are_followed_and_those_to_directories_are_not(folder: Path) -> None:
    (folder / "loop").symlink_to(folder)
    (folder.parent / "elsewhere.png").write_bytes(GOOD.read_bytes())
    (folder / "zz.png").symlink_to("../elsewhere.png")
    (folder / "dangling.png").symlink_to(folder / "gone.png")
    assert sources("in") == ["in/dangling.png", *IN_ORDER[:3], *IN_ORDER[3:], "in/zz.png"]
    assert "'in/dangling.png' is a link to '" in str(failure("in/dangling.png").error)
    assert "gone.png', which does not exist" in str(failure("in/dangling.png").error)


def test_a_file_met_again_by_a_link_is_the_same_and_a_hard_link_is_another(folder: Path) -> None:
    (folder / "zz.png").symlink_to("page2.PNG")
    (folder.parent / "other").symlink_to("in")
    assert sources("in", "other", "other/page10.png") == IN_ORDER
    os.link(folder / "page2.PNG", folder / "hard.png")
    assert sources("in/hard.png", "in/page2.PNG") == ["in/hard.png", "in/page2.PNG"]


@pytest.mark.parametrize("pattern", ["in/**/*.png", "in/**/**/*.png", "./in//**/*.png", "**/*.png"])
def test_a_recursive_glob_follows_no_links_to_directories(folder: Path, pattern: str) -> None:
    (folder / "sub" / "up").symlink_to("..")
    (folder / "sub" / "self").symlink_to(".")
    (folder / "sub" / "b.png").write_bytes(GOOD.read_bytes())
    (folder / ".git" / "deep").mkdir()
    (folder / ".git" / "deep" / "c.png").write_bytes(GOOD.read_bytes())
    assert sources(pattern) == ["in/Page1.png", "in/page10.png", "in/sub/b.png"]
    assert sources("in/*/*.png") == ["in/sub/b.png"]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("pattern", ["in/*", "**/*", "i?/**/*", "in/s*/../*.PNG", "in/.h*", "[!x]n/p*", "*/sub/a.*"])
def test_globs_find_what_the_standard_library_finds(pattern: str) -> None:
    expected = {os.path.normpath(path) for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)}
    assert expected
    assert {os.path.normpath(path) for path in glob_matches(pattern, []) if os.path.isfile(path)} == expected


def test_files_that_look_readable_and_are_not_are_told(folder: Path) -> None:
    for name in ("x.heic", "y.HEIF", "sub/z.jxl", "sub/q.svg", "sub/r.txt"):
        (folder / name).write_text("x")
    (folder / "photo.jp2").write_bytes(encoded(noise_picture((8, 8)), "JPEG2000"))
    totals = count_pages(["in", "./in/", GOOD])
    assert totals.notes == (
        "skipped in 'in': 4 files of unsupported types (sub/q.svg, sub/z.jxl, x.heic and 1 more); convert "
        "them to PNG, JPEG or PDF.",
    )
    assert (totals.documents, totals.pages) == (6, 6)
    assert "in/photo.jp2" in sources("in")


def test_a_url_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="'gopher://x.org/a.pdf' cannot be read .ValueError: Protocol not known"):
        open_pages(["gopher://x.org/a.pdf"])


def test_pipes_in_a_directory_are_left_alone_and_one_that_is_named_is_read(folder: Path) -> None:
    pipe = folder / "pipe.png"
    os.mkfifo(pipe)
    assert sources("in") == IN_ORDER
    assert count_pages([pipe, "in"]).pages is None
    writer = threading.Thread(target=lambda: pipe.write_bytes(GOOD.read_bytes()))
    writer.start()
    same(one(pipe).image, load_image(GOOD))
    writer.join()


def test_names_that_are_no_utf8_become_text_that_can_be_written(folder: Path) -> None:
    name = os.fsencode(folder) + b"/sub/\xff.png"
    Path(os.fsdecode(name)).write_bytes(GOOD.read_bytes())
    page = next(item for item in read("in") if "xff" in item.source)
    assert isinstance(page, Page)
    assert page.source == "in/sub/\\xff.png"


def test_messages_show_control_characters_of_names_and_sources_keep_them(folder: Path) -> None:
    name = "in/new\nline\x1b[31m.txt"
    Path(name).write_text("nothing")
    found = failure(name)
    assert found.source == name
    assert str(found.error) == (
        "'in/new\\nline\\x1b[31m.txt' holds text; expected PNG, JPEG, WebP, TIFF, BMP, GIF or PDF."
    )
    with pytest.raises(DocumentError, match=r"there is no file or directory 'a\\x07b'"):
        open_pages(["a\x07b"])


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("gone.png", "there is no file or directory 'gone.png'."),
        ("in/*.pdf", "no file matches 'in/*.pdf'; is it the right directory?"),
        ("in/.git/b", "there is no file or directory"),
        ("", "an input is an empty string"),
    ],
)
def test_an_input_that_gives_nothing_is_an_error_alone_and_a_failure_beside_others(given: str, message: str) -> None:
    for call in (open_pages, count_pages):
        with pytest.raises(DocumentError) as caught:
            call([given])  # raised at once, before any iteration
        assert message in str(caught.value)
    found = read(given, "in/page2.PNG")
    assert [type(item) for item in found] == [PageFailure, Page]
    assert isinstance(found[0], PageFailure)
    assert found[0].number is None
    assert message in str(found[0].error)


def test_several_inputs_that_give_nothing_are_named_together(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "readme.md").write_text("x")
    with pytest.raises(DocumentError) as caught:
        open_pages([tmp_path / "empty", "gone.png", "*.none"])
    message = str(caught.value)
    assert (
        "empty' contains no supported files; expected PNG, JPEG, WebP, TIFF, BMP, GIF or PDF, by their usual" in message
    )
    assert "there is no file or directory 'gone.png'." in message
    assert "no file matches '*.none'" in message
    with pytest.raises(DocumentError, match="no input; give files, directories or globs, or '-'"):
        open_pages([])


@pytest.fixture
def no_root() -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")


@pytest.mark.usefixtures("no_root")
def test_files_and_directories_without_permission_are_failures(folder: Path) -> None:
    (folder / "page2.PNG").chmod(0)
    (folder / "sub").chmod(0)
    try:
        errors = [str(item.error) for item in read("in") if isinstance(item, PageFailure)]
        assert any("the directory 'in/sub' cannot be read: Permission denied." in error for error in errors)
        assert any("'in/page2.PNG' cannot be read: Permission denied." in error for error in errors)
    finally:
        (folder / "sub").chmod(0o700)


def test_errors_of_the_disk_are_failures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scan(path: str) -> Any:
        if path == "in/sub":
            raise PermissionError(13, "Permission denied", path)
        return opened(path)

    opened = os.scandir
    monkeypatch.setattr(os, "scandir", scan)
    found = [str(item.error) if isinstance(item, PageFailure) else item.source for item in read(folder.name)]
    assert found == ["the directory 'in/sub' cannot be read: Permission denied.", *IN_ORDER[:3]]


@pytest.mark.parametrize("pattern", ["in/**/*.png", "in/*/*.png", "i?/sub/*.png", "in/sub/*.png"])
def test_directories_that_a_glob_cannot_look_into_are_failures(
    folder: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    def refuse(call: Any) -> Any:
        def called(path: str = ".") -> Any:
            if Path(path) == Path("in/sub"):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
            return call(path)

        return called

    monkeypatch.setattr(os, "scandir", refuse(os.scandir))
    monkeypatch.setattr(os, "listdir", refuse(os.listdir))
    found = find_documents([pattern, "in/page2.PNG"])
    errors = [str(item.error) for item in found if isinstance(item, NotFound)]
    assert errors == ["the directory 'in/sub' cannot be read: Permission denied."]


def test_a_file_in_a_directory_that_cannot_be_searched_is_not_called_missing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str, call: Any = os.lstat) -> Any:
        if Path(path).parent == Path("in/sub"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return call(path)

    monkeypatch.setattr(os, "lstat", refuse)
    for given in ("in/sub/x.png", "i*/sub/x.png"):
        with pytest.raises(DocumentError, match=r"^'in/sub/x\.png' cannot be read: Permission denied\.$"):
            find_documents([given])


def test_a_link_to_itself_is_no_missing_file(folder: Path) -> None:
    Path("in/loop.png").symlink_to("loop.png")
    assert str(failure("in/loop.png").error) == f"'in/loop.png' cannot be read: {os.strerror(errno.ELOOP)}."


def test_directories_may_be_deeper_than_python_calls_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(1100):
        os.mkdir("d")
        os.chdir("d")
    Path("a.png").write_bytes(GOOD.read_bytes())
    deepest = os.open(".", os.O_RDONLY)
    os.chdir(tmp_path)
    try:
        assert len(find_documents(["d"])) == len(find_documents(["d/**/*.png"])) == 1
    finally:  # removed by hand, because the removal of temporary folders is recursive too
        os.chdir(deepest)
        os.close(deepest)
        os.unlink("a.png")
        for _ in range(1100):
            os.chdir("..")
            os.rmdir("d")


def test_a_file_that_the_disk_refuses_says_why(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "open", refuse)
    document = Document("in/page2.PNG", folder / "page2.PNG")
    with pytest.raises(DocumentError, match="'in/page2.PNG' cannot be read: Input/output error."):
        open_page_source(document, None, None, None, None, LIMITS)


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("kind", ["png", "pdf", "tiff"])
def test_standard_input_is_recognised_by_its_content(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image = noise_picture((40, 30))
    data = pdf_bytes(scan_pdf(image, image)) if kind == "pdf" else encoded(image, kind)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert count_pages(["-"]) == count_pages(["-", "-"])
    assert (count_pages(["-"]).documents, count_pages(["-"]).pages) == (1, None)
    pages = read("-", "-", view=VIEW)
    assert [(page.source, page.number) for page in pages] == [("-", i) for i in range(1, 3 if kind == "pdf" else 2)]
    for page in pages:
        assert isinstance(page, Page)
        same(page.image, image)


def test_standard_input_that_holds_nothing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert str(failure("-").error) == "standard input is empty (0 bytes)."
    monkeypatch.setattr(sys, "stdin", Terminal(io.BytesIO(b"")))
    assert "standard input is a terminal; pipe an image or PDF into it" in str(failure("-").error)
    assert str(failure("/dev/null").error) == "'/dev/null' is a device or a socket; give a file, a directory or a pipe."


def test_a_file_url_is_a_path(folder: Path, tmp_path: Path) -> None:
    named = tmp_path / "a b.png"
    named.write_bytes(b"x")
    for url in (f"file://{tmp_path}/a%20b.png", f"file://localhost{tmp_path}/a%20b.png", f"FILE:{tmp_path}/a b.png"):
        [found] = find_documents([url])
        assert isinstance(found, Document) and found.path == named


def test_a_page_behind_a_name_leads_to_the_option(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(b"x")
    with pytest.raises(DocumentError, match=r"'.*a\.pdf#3'\. To read pages of '.*a\.pdf', add --pages 3\."):
        find_documents([f"{tmp_path}/a.pdf#3"])
