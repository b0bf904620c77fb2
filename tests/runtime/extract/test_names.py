"""Tests of the names of output files: mirrored folders, unique, and the same in every run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from granite4v.runtime.extract.names import MAX_NAME_BYTES, MAX_STEM_BYTES, Names


def test_names_fit_any_disk_and_are_never_the_same() -> None:
    names = Names()
    sources = [
        "x/a.pdf",
        "y/a.pdf",
        "y/A.png",
        "-",
        "...",
        "../..",
        "a/b:c*?.png",
        "\u00e9" * 300 + ".pdf",
        "\u00e9" * 301,
        "e\u0301t.png",
        "\u00e9t.png",
        "c d",
        "con.png",
        "LPT1.final.pdf",
        "trailing. . .png",
        "\x1b[31m.png",
    ]
    found = [names.stem(source) for source in sources]
    assert found[:5] == ["a", "a-2", "A-3", "stdin", "document"]
    assert found[-5:] == ["c_d", "con_", "LPT1_.final", "trailing", "31m"]
    assert len({name.casefold() for name in found}) == len(sources)
    assert all(len(name.encode()) <= MAX_NAME_BYTES + 4 and "/" not in name for name in found)
    assert found[10] == "\u00e9t-2"  # some file systems treat both spellings of the accent as equal
    assert [names.stem(source) for source in sources] == found


def test_folders_below_what_was_given_are_mirrored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "report.html").mkdir()
    monkeypatch.chdir(tmp_path)
    for inputs in (["in"], ["in/"], ["in/sub", "in"], ["./in"], ["in/**/*.png"], ["in/sub/x.png", "in/*"]):
        names = Names(inputs)
        assert names.stem("in/a.png") == "a" and names.stem("in/sub/deep er/a.png") == "sub/deep_er/a", inputs
        assert names.stem("elsewhere/sub/a.png") == "a-2", inputs
    names = Names(["."])
    assert names.stem("./in/a.png") == "in/a" and names.stem("../in/b.png") == "b"
    assert names.stem("Sub/x.png") == "Sub/x" and names.stem("sub/x.gif") == "sub/x-2"
    # no folder gets the name of one of our files
    assert names.stem("a.kvp.json/x.png") == "a.kvp.json_/x" and names.stem("report.html/x.png") == "report.html_/x"
    assert Names([str(tmp_path)]).stem(f"{tmp_path}/in/a.png") == "in/a"


def test_no_name_leads_out_of_the_directory(tmp_path: Path) -> None:
    names = Names([str(tmp_path)])
    for source in (
        "/../../etc/x.png",
        "/.hidden/../../y.png",
        "/a/../../z.png",
        "/..\\..\\w.png",
        "/~/v.png",
        "/ /u.png",
    ):
        stem = names.stem(f"{tmp_path}{source}")
        assert re.fullmatch(r"([\w+-][\w.+-]*/)*[\w+-][\w.+-]*", stem), stem


def test_a_deep_folder_is_left_out(tmp_path: Path) -> None:
    stem = Names([str(tmp_path)]).stem(f"{tmp_path}/{'/'.join(['d' * 90] * 6)}/a.png")
    assert stem == "a"
    stem = Names([str(tmp_path)]).stem(f"{tmp_path}/{'/'.join(['d' * 90] * 4)}/a.png")
    assert len(stem) <= MAX_STEM_BYTES and stem.endswith("/a")


def test_known_names_stay_and_are_not_given_away(tmp_path: Path) -> None:
    known = {"x/a.png": None, "y/a.png": "a", "z/a.png": None, "b.png": "../../b", "c.png": "/c", "d.png": "sub/a"}
    names = Names([str(tmp_path)], known)
    # None: named as by versions that recorded no names; recorded names that we would not give are not used
    assert [names.stem(source) for source in known] == ["a-2", "a", "a-3", "b", "c", "sub/a"]
    assert names.stem(f"{tmp_path}/a.png") == "a-4" and names.stem(f"{tmp_path}/sub/a.png") == "sub/a-2"
