"""Dependencies point one way, and nothing heavy is imported before it is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from granite4v.families import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {"clip_projector": "clip_projector", "converter": "converter", "runtime": "runtime", "cli": "granite4v/cli"}
MAY_IMPORT = {
    "shared": {"shared"},
    "clip_projector": {"shared", "clip_projector"},
    "converter": {"shared", "converter"},
    "runtime": {"shared", "clip_projector", "runtime"},
    "cli": {"shared", "clip_projector", "converter", "runtime", "door", "cli"},
}
DOORS = {"granite4v/__init__.py", "granite4v/__main__.py", "granite4v/default_model.py"}  # lead into rooms, lazily
REFERENCE_ONLY = {"torch", "transformers", "peft"}


def product_files() -> list[Path]:
    folders = ("granite4v", "clip_projector", "converter", "runtime")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def room_of_file(path: Path) -> str:
    relative = path.relative_to(ROOT).as_posix()
    return next((room for room, folder in ROOMS.items() if relative.startswith(f"{folder}/")), "shared")


def room_of_module(name: str) -> str:
    parts = name.split(".")
    if parts[1:2] == ["default_model"]:
        return "door"
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "shared"


def imported_modules(path: Path) -> list[str]:
    """Every module a file imports anywhere, `from granite4v import runtime` counted as `granite4v.runtime`."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


@pytest.mark.parametrize("path", product_files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_room_imports_only_what_stands_below_it(path: Path) -> None:
    if path.relative_to(ROOT).as_posix() in DOORS:
        return
    room = room_of_file(path)
    for name in imported_modules(path):
        if name.split(".")[0] == "granite4v":
            assert room_of_module(name) in MAY_IMPORT[room], f"{room} imports {name}"


def test_the_reference_is_imported_by_verify_alone() -> None:
    users = {
        path.relative_to(ROOT).as_posix()
        for path in product_files()
        if REFERENCE_ONLY & {name.split(".")[0] for name in imported_modules(path)}
    }
    assert users == {"runtime/verify.py"}


def family_names() -> set[str]:
    """Every spelling of a family's name, in small letters."""
    names = {name for family in FAMILIES for name in (family.name, *family.hf_model_types, type(family).__name__)}
    names |= {"granite 4 vision", "granite vision"}
    spelled = {name.replace("_", mark) for name in names for mark in ("_", "-", " ", "")}
    return {name.lower() for name in (*names, *spelled)}


def test_nothing_outside_the_family_files_names_a_family() -> None:
    """A family is new files in `families/`; shared code, comments included, reads what those files say."""
    for path in product_files():
        where = path.relative_to(ROOT).as_posix()
        if not where.startswith("granite4v/families/"):
            text = path.read_text(encoding="utf-8").lower()
            found = [name for name in family_names() if name in text]
            assert not found, f"{path}: {found}"


def test_shared_family_code_names_no_family() -> None:
    shared = ("anyres", "base", "fields", "tensor_rules", "tower_tensors", "towers")
    for name in shared:
        text = (ROOT / "granite4v" / "families" / f"{name}.py").read_text(encoding="utf-8").lower()
        assert not [family for family in family_names() if family in text], name


def modules_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = {"numpy", "PIL", "llama_cpp", "gguf", "jinja2", "tokenizers", "safetensors", "typer", "torch", "ctypes"}
    assert not heavy & modules_after("import granite4v")


def test_the_command_line_answers_help_without_heavy_imports() -> None:
    heavy = {"numpy", "PIL", "llama_cpp", "gguf", "jinja2", "tokenizers", "safetensors", "torch", "huggingface_hub"}
    assert not heavy & modules_after("import granite4v.cli.main")


def test_importing_every_module_loads_no_library() -> None:
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in product_files()
        if path.name not in ("__init__.py", "__main__.py")
    ]
    names = [name if name.startswith("granite4v.") else f"granite4v.{name}" for name in names]
    loaded = modules_after("\n".join(f"import {name}" for name in names))
    assert not loaded & {"llama_cpp", "torch", "transformers", "peft"}
