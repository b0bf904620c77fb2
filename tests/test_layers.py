"""Imports point one way through every room and sub-room, and nothing heavy is imported before it is used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from granite4v.families.registry import FAMILIES
from tests.helpers.source_tree import ROOT, imports, module_name, modules_of, parse, product_files, relative

# Each room (package or module) may import the rooms before it in this list, and none after it.
ORDER = [
    "granite4v.lazy",
    "granite4v.errors",
    "granite4v.extras",
    "granite4v.choices",
    "granite4v.child",
    "granite4v.gguf_keys",
    "granite4v.paths",
    "granite4v.memory",
    "granite4v.ggml",
    "granite4v.families",
    "granite4v.gguf_role",
    "granite4v.gguf_summary",
    "granite4v.models",
    "granite4v.clip_projector",
    "granite4v.runtime.llama",
    "granite4v.runtime.prompt",
    "granite4v.runtime.grammar",
    "granite4v.runtime.formats",
    "granite4v.runtime.answer",
    "granite4v.runtime.confidence",
    "granite4v.runtime.engine",
    "granite4v.runtime.options",
    "granite4v.runtime.model",
    "granite4v.runtime.known_tasks",
    "granite4v.runtime.verify",
    "granite4v.runtime.documents",
    "granite4v.runtime.extract",
    "granite4v.runtime.chat",
    "granite4v.runtime.server",
    "granite4v.converter",
    "granite4v.default_model",
    "granite4v.docling_plugin",
    "granite4v.doctor",
    "granite4v.cli",
]
FOUNDATIONS = set(ORDER[: ORDER.index("granite4v.clip_projector")])
# Rooms with narrower rules: they may import less than what is before them in the list.
ONLY = {
    "granite4v.converter": FOUNDATIONS,
    "granite4v.runtime.formats": {
        "granite4v.errors",
        "granite4v.extras",
        "granite4v.lazy",
        "granite4v.runtime.grammar",
    },
    "granite4v.runtime.documents": FOUNDATIONS | {"granite4v.clip_projector"},
}
# Only the command line may import these.
ENDS = {
    f"granite4v.{room}"
    for room in ("converter", "docling_plugin", "runtime.verify", "runtime.extract", "runtime.chat", "runtime.server")
}
# The package doors re-export names from other rooms, and import them on first use.
DOORS = {"granite4v", "granite4v.__main__", "granite4v.runtime"}
REFERENCE_ONLY = {"torch", "transformers", "peft"}


def room_of(module: str) -> str:
    """Returns the innermost room of a module; for a door outside all rooms, its own name."""
    return max((room for room in ORDER if f"{module}.".startswith(f"{room}.")), key=len, default=module)


def allowed(room: str) -> set[str]:
    if room in ("granite4v.default_model", "granite4v.cli"):
        return set(ORDER[: ORDER.index(room) + 1]) | DOORS
    return (ONLY.get(room) or set(ORDER[: ORDER.index(room)]) - ENDS) | {room}


def imported_modules(path: Path) -> set[str]:
    """Returns every module that a file imports, anywhere in it."""
    return {name for node in imports(parse(path)) for name in modules_of(node)}


def test_every_module_stands_in_a_room() -> None:
    homeless = {name for path in product_files() if room_of(name := module_name(path)) not in ORDER} - DOORS
    assert not homeless, f"{homeless}: give it a place in ORDER"


def test_imports_name_their_module_in_full() -> None:
    relative_ones = {path for path in product_files() if any(name[0] == "." for name in imported_modules(path))}
    assert not relative_ones


def test_imports_point_one_way() -> None:
    offenders = set()
    for path in product_files():
        if (name := module_name(path)) not in DOORS:
            rooms = {room_of(other) for other in imported_modules(path) if other.split(".")[0] == "granite4v"}
            offenders |= {(name, other) for other in rooms - allowed(room_of(name))}
    assert offenders == set()


def test_the_reference_is_imported_by_verify_alone() -> None:
    users = {
        relative(path)
        for path in product_files()
        if REFERENCE_ONLY & {name.split(".")[0] for name in imported_modules(path)}
    }
    assert users == {"runtime/verify.py"}


def family_names() -> set[str]:
    """Returns every spelling of a family's name, in lower case."""
    names = {name for family in FAMILIES for name in (family.name, *family.hf_model_types, type(family).__name__)}
    names |= {"granite 4 vision", "granite vision"}
    spelled = {name.replace("_", mark) for name in names for mark in ("_", "-", " ", "")}
    return {name.lower() for name in (*names, *spelled)}


def test_nothing_outside_the_family_files_names_a_family() -> None:
    """A family consists of new files in these rooms; shared code, including its comments, only reads what those files
    define."""
    for path in product_files():
        if not module_name(path).startswith(("granite4v.families", "granite4v.converter.tensors")):
            text = path.read_text(encoding="utf-8").lower()
            found = [name for name in family_names() if name in text]
            assert not found, f"{path}: {found}"


def test_shared_family_code_names_no_family() -> None:
    families, tensors = ROOT / "granite4v" / "families", ROOT / "converter" / "tensors"
    shared = [families / f"{name}.py" for name in ("anyres", "base", "fields", "rope", "towers")]
    for path in (*shared, *(tensors / f"{name}.py" for name in ("decoder", "rules", "vit"))):
        text = path.read_text(encoding="utf-8").lower()
        assert not [family for family in family_names() if family in text], path


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
    """Except the docling plugin, because docling loads torch itself."""
    names = [module_name(path) for path in product_files() if path.name != "__main__.py"]
    names = [name for name in names if not name.startswith("granite4v.docling_plugin.")]
    loaded = modules_after("\n".join(f"import {name}" for name in names))
    assert not loaded & {"llama_cpp", "torch", "transformers", "peft"}
