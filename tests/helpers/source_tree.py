"""The repository's Python files as modules and syntax trees, for tests of its structure."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("clip_projector", "converter", "runtime")  # top-level folders, linked into the package granite4v
PRODUCT = ("granite4v", *ROOMS)


def python_files(*folders: str) -> list[Path]:
    """Returns all Python files below some folders of the repository; symbolic links are not followed."""
    files = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sorted(path for path in files if not any(parent.is_symlink() for parent in path.parents))


def product_files() -> list[Path]:
    return python_files(*PRODUCT)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    """Returns the name under which a product file is imported: `granite4v.runtime.model` for runtime/model.py."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return name if name.split(".")[0] == "granite4v" else f"granite4v.{name}"


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def is_module(name: str) -> bool:
    """Whether a dotted name is a module or package of the product."""
    parts = name.split(".")
    base = ROOT if len(parts) > 1 and parts[1] in ROOMS else ROOT / "granite4v"
    path = base.joinpath(*parts[1:])
    return parts[0] == "granite4v" and (path.is_dir() or path.with_suffix(".py").is_file())


def modules_of(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Returns the modules that one statement imports: `granite4v.runtime` for `from granite4v import runtime`, '.' for
    `from . import x`."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    module = "." * node.level + (node.module or "")
    inner = [f"{module}.{alias.name}" for alias in node.names]
    modules = [name for name in inner if is_module(name)]
    return modules if len(modules) == len(inner) else [module, *modules]


def imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
