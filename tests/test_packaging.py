"""A wheel contains every module and the embedded checkpoint, and works without the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("clip_projector", "converter", "runtime")
MODULES = {path.relative_to(ROOT).as_posix() for path in (ROOT / "granite4v").rglob("*.py")}
MODULES |= {f"granite4v/{path.relative_to(ROOT).as_posix()}" for room in ROOMS for path in (ROOT / room).rglob("*.py")}
PAGE = {f"granite4v/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "runtime" / "server" / "web").iterdir()}
CHECKPOINT = {path.relative_to(ROOT).as_posix() for path in (ROOT / "granite4v" / "nano").glob("[!.]*")}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that git tracks or would track, so that build leftovers are excluded."""
    source = tmp_path_factory.mktemp("source")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            (source / name).symlink_to(os.readlink(ROOT / name))
        elif (ROOT / name).is_file():
            (source / name).write_bytes((ROOT / name).read_bytes())
    return source


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(out), str(source)], check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_the_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert {name for name in names if name.endswith(".py")} == MODULES
    folders = {str(Path(name).parent) for name in MODULES}
    assert names - MODULES == {f"{folder}/py.typed" for folder in folders} | CHECKPOINT | PAGE


def test_a_source_distribution_holds_what_the_wheel_is_made_of_once(source: Path, tmp_path: Path) -> None:
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = [member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile()]
    assert set(names) >= CHECKPOINT and len(names) == len(set(names))
    assert {name for name in names if name.endswith(".py") and not name.startswith("tests/")} == MODULES


def test_an_editable_install_is_a_folder_that_type_checkers_follow(source: Path, tmp_path: Path) -> None:
    """It uses a path in a .pth file, not an import hook."""
    code = f"from setuptools import build_meta; build_meta.build_editable({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        assert [Path(name).suffix for name in names] == [".pth"]
        assert archive.read(names[0]).decode().strip() == str(source)
    assert {path.name for path in (source / "granite4v").iterdir() if path.is_symlink()} == set(ROOMS)


def test_the_wheel_works_from_outside_the_repository(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r})\n"
        "import granite4v, granite4v.converter.plan, granite4v.runtime, granite4v.clip_projector, granite4v.cli.main\n"
        "print(granite4v.__file__, granite4v.runtime.__file__, granite4v.Model)"
    )
    # -I and no import hooks of the editable install: only the wheel can be imported
    hooks = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
    done = subprocess.run([sys.executable, "-I", "-c", hooks + code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(str(target)) == 2


def test_versions_agree() -> None:
    import granite4v

    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    version = next(line.split('"')[1] for line in text.splitlines() if line.startswith("version = "))
    assert granite4v.__version__ == version
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
