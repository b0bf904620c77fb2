"""Tests of the page reader process: whatever happens to it, each page is an image or a failure, and reading continues
with the next page."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from PIL import Image

from granite4v.clip_projector import load_image
from granite4v.errors import DeviceError, ImageError
from granite4v.runtime.documents import Page, PageFailure, count_pages, open_pages, reader
from granite4v.runtime.documents.limits import Limits
from tests.helpers.page_tests import GOOD, one, read, same
from tests.helpers.pictures import encoded, noise_picture, odd_files

Strange = Callable[[str], Path]


@pytest.fixture
def strange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Strange:
    """Returns a function that makes a document that misbehaves, see `strange_reader`."""
    monkeypatch.setattr(reader, "WORKER", "tests.helpers.strange_reader")
    monkeypatch.chdir(tmp_path)

    def make(stem: str) -> Path:
        path = Path(f"{stem}.strange")
        path.write_text("strange")
        return path

    return make


def kinds(found: list[Page | PageFailure]) -> list[tuple[type, int | None]]:
    return [(type(item), item.number) for item in found]


def error(item: Page | PageFailure) -> str:
    assert isinstance(item, PageFailure)
    return str(item.error)


def test_a_page_that_kills_its_reader_is_a_failure_and_the_next_goes_on(strange: Strange) -> None:
    found = read(strange("kill-2"), GOOD)
    assert kinds(found) == [(Page, 1), (PageFailure, 2), (Page, 3), (Page, 4), (Page, 1)]
    assert error(found[1]) == (
        "the page reader ended with SIGKILL while rendering page 2 of 'kill-2.strange', twice; the file is damaged or "
        "not supported. Print it to a new PDF, or save it as an image, and read that."
    )
    assert isinstance(found[2], Page)
    same(found[2].image, Image.new("RGB", (2, 3), (3, 0, 0)))
    assert isinstance(found[4], Page)
    same(found[4].image, load_image(GOOD))


def test_a_page_is_read_after_all_when_only_the_first_reader_ended(strange: Strange) -> None:
    found = read(strange("once-1-3"))
    assert kinds(found) == [(Page, 1), (Page, 2), (Page, 3), (Page, 4)]


def test_images_loaded_apart_are_those_that_load_image_gives(tmp_path: Path) -> None:
    files = odd_files()
    loaded = reader.load_apart([*files.values()])
    for content, found in zip(files.values(), loaded, strict=True):
        same(Image.frombytes("RGB", found.size, bytes(found.pixels)), load_image(content))
    (tmp_path / "page.png").write_bytes(files["16-bit"])
    (found,) = reader.load_apart([str(tmp_path / "page.png")])
    same(Image.frombytes("RGB", found.size, bytes(found.pixels)), load_image(files["16-bit"]))


@pytest.mark.parametrize(
    "source", ["missing.png", "https://example.org/a.png", b"", b"%PDF-1.7", b"\x89PNG\r\n\x1a\nx"]
)
def test_an_image_loaded_apart_fails_as_load_image_does(source: str | bytes) -> None:
    with pytest.raises(ImageError) as expected:
        load_image(source)
    with pytest.raises(ImageError) as caught:
        reader.load_apart([source])
    assert str(caught.value) == str(expected.value)


def test_an_image_that_kills_its_reader_is_an_error(strange: Strange) -> None:
    with pytest.raises(
        reader.ReaderEnded, match="^the page reader ended with SIGKILL while loading 'kill-0.strange', "
    ):
        reader.load_apart([str(strange("kill-0"))])
    with pytest.raises(reader.ReaderEnded, match="^'sleep-0.strange' takes longer than 1 s to load, twice; "):
        reader.load_apart([str(strange("sleep-0"))], Limits(page_s=1))


def test_a_document_that_kills_its_reader_while_it_is_opened_is_a_failure(strange: Strange) -> None:
    path = strange("kill-0")
    found = read(path, GOOD)
    assert kinds(found) == [(PageFailure, None), (Page, 1)]
    assert "the page reader ended with SIGKILL while opening 'kill-0.strange', twice" in error(found[0])


def test_what_ended_its_reader_while_counting_is_not_opened_again(
    strange: Strange, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = strange("kill-0")
    totals = count_pages([path])
    assert (totals.documents, totals.pages) == (1, 1)
    monkeypatch.setattr(sys, "executable", "/nowhere")  # no new reader can be started
    (failure,) = open_pages([path], counted=totals)
    assert isinstance(failure, PageFailure)
    assert "while opening 'kill-0.strange'" in str(failure.error)


def test_a_page_that_takes_too_long_is_a_failure_and_the_next_goes_on(strange: Strange) -> None:
    waits: list[tuple[str, int | None]] = []

    def waiting(source: str, number: int | None, seconds: float) -> None:
        assert seconds > 0
        waits.append((source, number))

    found = read(strange("sleep-2"), limits=Limits(page_s=2), waiting=waiting)
    assert kinds(found) == [(Page, 1), (PageFailure, 2), (Page, 3), (Page, 4)]
    assert error(found[1]) == (
        "page 2 of 'sleep-2.strange' takes longer than 2 s to render, twice; it is damaged or unusually large. "
        "Print it to a new PDF, or save it as an image, and read that."
    )
    assert ("sleep-2.strange", 2) in waits


def test_a_page_that_takes_too_much_memory_is_a_failure_and_the_next_goes_on(strange: Strange) -> None:
    found = read(strange("eat-2"), limits=Limits(memory_bytes=200 << 20))
    assert kinds(found) == [(Page, 1), (PageFailure, 2), (Page, 3), (Page, 4)]
    assert "page 2 of 'eat-2.strange'" in error(found[1])
    assert "memory" in error(found[1])


def test_an_error_of_any_kind_is_a_failure_in_the_same_process(strange: Strange) -> None:
    found = read(strange("raise-2-3"))
    assert kinds(found) == [(Page, 1), (PageFailure, 2), (PageFailure, 3), (Page, 4)]
    assert "page 2 of 'raise-2-3.strange' cannot be read (RecursionError: too deep); it is probably" in error(found[1])


@pytest.mark.parametrize(
    ("stem", "limits"), [("kill-1-2-3-4", Limits(n_ended=2)), ("raise-1-2-3-4", Limits(n_failed=2))]
)
def test_a_document_whose_pages_fail_one_after_another_is_given_up(stem: str, limits: Limits, strange: Strange) -> None:
    found = read(strange(stem), GOOD, limits=limits)
    assert kinds(found) == [(PageFailure, 1), (PageFailure, 2), (PageFailure, None), (Page, 1)]
    assert error(found[2]) == (
        f"'{stem}.strange' is abandoned at page 3 of 4: 2 pages in a row before it failed. Choose others "
        "with '--pages', or save the document again."
    )


def test_the_pages_of_a_document_are_limited(tmp_path: Path) -> None:
    frames = [noise_picture((8, 8), seed) for seed in range(4)]
    path = tmp_path / "a.tif"
    path.write_bytes(encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:]))
    found = read(path, limits=Limits(n_pages=3))
    assert kinds(found) == [(Page, 1), (Page, 2), (Page, 3), (PageFailure, None)]
    assert error(found[3]) == f"'{path}' has more than 3 pages; the rest are not read. Split the document."
    assert count_pages([path], limits=Limits(n_pages=3)).pages == 4


def test_images_are_limited_in_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(GOOD.read_bytes())
    with path.open("ab") as file:
        file.truncate(5_000_000)
    found = read(path, limits=Limits(file_bytes=4_999_999))
    assert error(found[0]) == (
        f"'{path}' has 5,000,000 bytes; expected an image of at most 4,999,999. Save it again as PNG or JPEG."
    )


def test_a_limit_on_pixels_that_was_raised_holds_for_the_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    path = tmp_path / "a.png"
    path.write_bytes(encoded(noise_picture((8, 8))))
    assert "more than 50 pixels" in error(read(path)[0])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert one(path).size_px == (8, 8)


@pytest.mark.parametrize(
    ("module", "program", "message"),
    [
        (reader.WORKER, "/nowhere/python", "the process that reads pages cannot be started with '/nowhere/python'"),
        ("no_such_module", sys.executable, "No module named 'no_such_module'"),
    ],
)
def test_a_reader_that_cannot_be_started_is_an_error_of_the_machine(
    module: str, program: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "WORKER", module)
    monkeypatch.setattr(sys, "executable", program)
    with pytest.raises(DeviceError) as caught:
        list(open_pages([GOOD]))
    assert message in str(caught.value)


def test_pages_are_read_where_nothing_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    assert one(GOOD).digest == load_image(GOOD).digest.hex()


def test_threads_read_at_the_same_time() -> None:
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(one(GOOD).digest)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [one(GOOD).digest] * 3


# --- from a user's script that has no `if __name__ == "__main__"`, in a folder with a file named like a library ---

SCRIPT = """
import sys, time
import psutil
sys.path.insert(0, {tests!r})
from granite4v.runtime.documents import open_pages, reader
reader.WORKER = "tests.helpers.strange_reader"
pages = open_pages(sys.argv[1:])
print(next(pages).number, psutil.Process().children()[0].pid, flush=True)
print(next(pages).number)
"""


@pytest.fixture
def script(tmp_path: Path, strange: Strange) -> list[str]:
    Path("script.py").write_text(SCRIPT.format(tests=str(Path(__file__).parents[3])))
    return [sys.executable, "script.py"]


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 30
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_reader_needs_no_guard_and_no_clean_folder(script: list[str], strange: Strange) -> None:
    Path("json.py").write_text("raise SystemExit")
    done = subprocess.run(
        [*script, strange("good"), GOOD], capture_output=True, text=True, env={**os.environ, "PYTHONSAFEPATH": "1"}
    )
    assert [done.stderr, done.stdout.split()[0], done.stdout.split()[2]] == ["", "1", "2"]
    wait_until_gone(int(done.stdout.split()[1]))


def test_a_reader_ends_with_its_owner_whatever_it_does(script: list[str], strange: Strange) -> None:
    with subprocess.Popen([*script, strange("sleep-2")], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline().split()[1])
        owner.kill()
    wait_until_gone(pid)


def test_ctrl_c_ends_both_and_only_the_owner_speaks(script: list[str], strange: Strange) -> None:
    with subprocess.Popen(
        [*script, strange("sleep-2")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # background jobs ignore SIGINT
    ) as owner:
        assert owner.stdout is not None and owner.stderr is not None
        pid = int(owner.stdout.readline().split()[1])
        os.killpg(owner.pid, signal.SIGINT)
        said = owner.stderr.read()
    assert said.count("Traceback") == 1
    assert said.rstrip().endswith("KeyboardInterrupt")
    wait_until_gone(pid)


def test_the_reader_imports_nothing_heavy() -> None:
    code = "import sys; from granite4v.runtime.documents import content, image_files, pdf, worker; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "llama_cpp", "numpy", "granite4v.ggml", "granite4v.runtime.model"} & set(
        loaded
    )
