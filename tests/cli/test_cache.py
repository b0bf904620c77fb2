"""`granite4v cache`, and the page store in `ask`, `extract` and other commands."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from granite4v import PageStore
from granite4v.cli.main import app
from granite4v.runtime.engine.state_file import Description
from tests.helpers.pictures import text_picture
from tests.toy.spec import PRESETS


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def store() -> PageStore:
    """A store with two pages: one used now, one two days ago."""
    store = PageStore()
    for number, model, days in ((1, "out/text-Q4_K_M.gguf", 2), (2, "other/text-F16.gguf", 0)):
        data = np.arange(2_000_000 * number, dtype=np.uint64).astype(np.uint8)
        assert store.save(Description(f"{number:064x}", model, 1200 * number, number, time.time()), data)
        used = time.time() - 86400 * days
        os.utime(store.path_of(f"{number:064x}"), (used, used))
    return store


def test_list_shows_what_was_used_last_first(store: PageStore) -> None:
    result = run("cache", "list")
    heading, first, second = result.stdout.splitlines()
    assert result.exit_code == 0 and heading.split() == ["MODEL", "TOKENS", "IMAGES", "SIZE", "LAST", "USED", "KEY"]
    today = time.strftime("%Y-%m-%d", time.localtime())
    assert first.split()[:6] == ["other/text-F16.gguf", "2,400", "2", "4.0", "MB", today]
    assert second.split()[:5] == ["out/text-Q4_K_M.gguf", "1,200", "1", "2.0", "MB"]
    assert result.stderr == f"2 pages, 6.0 MB, in '{store.folder}'\n"


def test_list_as_json(store: PageStore) -> None:
    told = json.loads(run("cache", "list", "--json").stdout)
    assert told["folder"] == str(store.folder) and told["bytes"] == sum(page["bytes"] for page in told["pages"])
    assert [(page["model"], page["tokens"], page["images"]) for page in told["pages"]] == [
        ("other/text-F16.gguf", 2400, 2),
        ("out/text-Q4_K_M.gguf", 1200, 1),
    ]
    assert [Path(page["path"]).name.removesuffix(".state") for page in told["pages"]] == [
        page["key"] for page in told["pages"]
    ]


def test_a_damaged_page_is_listed_as_such(store: PageStore) -> None:
    store.path_of(f"{1:064x}").write_bytes(b"something else")
    result = run("cache", "list")
    assert result.exit_code == 0 and "(damaged)" in result.stdout.splitlines()[1]


def test_a_date_that_is_none(store: PageStore) -> None:
    """One damaged page does not prevent the listing of the others."""
    entry = store.entries()[0]
    content = entry.path.read_bytes()
    created = json.dumps(entry.description.created).encode()
    entry.path.write_bytes(content.replace(created, b"9e99".ljust(len(created)), 1))
    told = json.loads(run("cache", "list", "--json").stdout)["pages"]
    assert [page["created"] for page in told if page["key"] == entry.key] == ["?"]
    assert run("cache", "list").exit_code == 0


def test_an_empty_store(tmp_path: Path) -> None:
    for command, told in (("list", "0 pages, 0.0 MB"), ("clear", "removed 0 pages"), ("verify", "0 pages sound")):
        result = run("cache", command)
        assert (result.exit_code, result.stdout) == (0, "") and told in result.stderr
    assert not PageStore().folder.exists()


def test_clear_removes_all_or_the_old_ones(store: PageStore) -> None:
    result = run("cache", "clear", "--older-than", "36h")
    assert result.exit_code == 0 and result.stderr == "removed 1 page: 2.0 MB freed\n"
    assert [entry.description.model for entry in store.entries()] == ["other/text-F16.gguf"]
    assert "removed 0 pages" in run("cache", "clear", "--older-than", "1d").stderr
    assert run("cache", "clear").stderr == "removed 1 page: 4.0 MB freed\n" and store.entries() == []


@pytest.mark.parametrize("age", ["", "d", "3", "3 days", "-1d", "1.5h", "3x"])
def test_an_age_must_be_understood(store: PageStore, age: str) -> None:
    result = run("cache", "clear", "--older-than", age)
    assert result.exit_code == 2 and "90m, 12h or 30d" in result.stderr and len(store.entries()) == 2


def test_verify_names_removes_and_fails_for_damaged_pages(store: PageStore) -> None:
    result = run("cache", "verify")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "2 pages sound, 0 damaged\n")
    path = store.path_of(f"{2:064x}")
    data = bytearray(path.read_bytes())
    data[1_000_000] ^= 1
    path.write_bytes(data)
    result = run("cache", "verify")
    assert result.exit_code == 1 and result.stdout == f"'{path}': its checksum is wrong; removed\n"
    assert result.stderr == "1 page sound, 1 damaged\n" and not path.exists()
    assert run("cache", "verify").exit_code == 0


def test_verify_goes_on_where_nothing_can_be_removed(store: PageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for entry in store.entries():
        entry.path.write_bytes(b"something else")
    monkeypatch.setattr(Path, "unlink", refuse)
    result = run("cache", "verify")
    assert result.exit_code == 1 and result.stdout.count("; left where it is") == 2
    assert result.stderr == "0 pages sound, 2 damaged\n"


# --- the store in use ---


@pytest.fixture
def page(tmp_path: Path) -> Path:
    text_picture((150, 100)).save(tmp_path / "page.png")
    return tmp_path / "page.png"


def test_ask_stores_pages_unless_told_otherwise(make_model: Callable[..., Path], page: Path) -> None:
    model = make_model(PRESETS["tiny"], "F16")
    command = ("ask", page, "What is this?", "--model", model, "--max-tokens", 8)
    alone = run(*command, "--no-page-store")
    assert alone.exit_code == 0 and PageStore().entries() == []
    first, second, third = run(*command), run(*command), run(*command, "--no-page-store")
    assert first.stdout == second.stdout == third.stdout == alone.stdout
    for result, is_stored in ((first, False), (second, True), (third, False)):
        assert ("encoding images ..." in result.stderr) != is_stored
        assert ("from stored pages)" in result.stderr) == is_stored
    (entry,) = PageStore().entries()
    assert entry.description.model == f"{model.name}/text-F16.gguf" and entry.description.n_images == 1
    told = json.loads(run(*command, "--json").stdout)["timings"]
    assert told["n_stored"] == entry.description.n_tokens and told["n_encoded"] == 0


def test_a_damaged_page_costs_ask_one_warning(make_model: Callable[..., Path], page: Path) -> None:
    command = ("ask", page, "What is this?", "--model", make_model(PRESETS["tiny"], "F16"), "--max-tokens", 8)
    first = run(*command)
    (entry,) = PageStore().entries()
    os.truncate(entry.path, entry.n_bytes // 2)
    with pytest.warns(UserWarning, match="a stored page is ignored") as said:
        second = run(*command)
    assert (second.exit_code, second.stdout, len(said)) == (0, first.stdout, 1)
    assert run("cache", "verify").exit_code == 0 and len(PageStore().entries()) == 1


def test_extract_stores_pages_when_asked(make_model: Callable[..., Path], page: Path) -> None:
    model = make_model(PRESETS["tiny"], "F16")
    command = ("extract", page, "--model", model, "--prompt", "What is this?", "--max-tokens", 8, "--json")
    results = [run(*command), run(*command, "--page-store"), run(*command, "--page-store")]
    records = [json.loads(result.stdout) for result in results]
    assert len({record["text"] for record in records}) == 1
    assert [record["timings"]["n_stored"] > 0 for record in records] == [False, False, True]


def test_the_cache_type_is_an_option(make_model: Callable[..., Path], page: Path) -> None:
    model = make_model(PRESETS["tiny-wide"], "F16")
    command = ("ask", page, "What is this?", "--model", model, "--max-tokens", 8)
    sizes = []
    for kind in ("f16", "q8_0"):
        assert run("cache", "clear").exit_code == 0
        assert run(*command, "--cache-type", kind).exit_code == 0
        sizes.append(PageStore().entries()[0].n_bytes)
    assert 0.5 < sizes[1] / sizes[0] < 0.56  # 34 bytes for 32 values instead of 64, and positions
    told = json.loads(run("bench", "--model", model, "--image", page, "--cache-type", "q8_0", "--json").stdout)
    assert told["settings"]["cache_type"] == "q8_0"
    assert run(*command, "--cache-type", "q4_0").exit_code == 2
    result = run("verify", model, "--reference", model, "--exact", "--cache-type", "q8_0")
    assert result.exit_code == 2 and "--cache-type" in result.stderr
