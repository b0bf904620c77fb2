"""A wheel holds every module and the embedded checkpoint, and works without the repository beside it."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("clip_projector", "converter", "runtime")
CHECKPOINT = {path.relative_to(ROOT).as_posix() for path in (ROOT / "granite4v" / "nano").glob("[!.]*")}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git tracks or would track, so that no build leftovers come along."""
    source = tmp_path_factory.mktemp("source")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    return source


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(out), str(source)], check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_the_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "granite4v").rglob("*.py")}
    for room in ROOMS:
        expected |= {f"granite4v/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / room).rglob("*.py")}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert {name for name in names if name.endswith(".py")} == expected
    folders = {str(Path(name).parent) for name in expected}
    assert names - expected == {f"{folder}/py.typed" for folder in folders} | CHECKPOINT


def test_a_source_distribution_holds_what_the_wheel_is_made_of(source: Path, tmp_path: Path) -> None:
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    modules = {
        path.relative_to(ROOT).as_posix() for room in ("granite4v", *ROOMS) for path in (ROOT / room).rglob("*.py")
    }
    assert modules | CHECKPOINT <= names


def test_the_wheel_works_from_outside_the_repository(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r})\n"
        "import granite4v, granite4v.converter.plan, granite4v.runtime, granite4v.clip_projector, granite4v.cli.main\n"
        "print(granite4v.__file__, granite4v.runtime.__file__, granite4v.Model)"
    )
    # -I and no site hooks of the editable install: only the wheel may answer
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
