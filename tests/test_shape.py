"""Size and shape of the source: imports at the top, short functions, modules that can be read in one sitting."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.helpers.source_tree import (
    functions,
    imports,
    module_name,
    modules_of,
    parse,
    product_files,
    python_files,
    relative,
)

MAX_FUNCTION_LINES = 60
MAX_MODULE_LINES = 450
# Package doors import their exports on first use, and commands import inside their bodies, so that --help is fast.
LAZY_ROOMS = (
    *(f"granite4v.{room}" for room in ("__init__", "runtime.__init__", "clip_projector.__init__", "cli.")),
    "granite4v.default_model",  # part of the package door: it imports the converter and the runtime
)
# Optional extras, and llama_cpp, whose import loads its shared libraries.
OPTIONAL = {
    "av",
    "docling_core",
    "fsspec",
    "llama_cpp",
    "llvmlite",
    "openpyxl",
    "pandas",
    "peft",
    "pyarrow",
    "pydantic",
    "ray",
    "torch",
    "transformers",
}
# The process that reads pages stays small: it loads NumPy only for deep greyscale images, and PDFium only for PDFs.
FOR_SOME_PAGES = {
    ("clip_projector/images.py", "numpy"),
    ("runtime/documents/content.py", "granite4v.runtime.documents.pdf"),
}

# Private only by their spelling, or from libraries that offer nothing else.
OTHERS_PRIVATES = {
    *("_replace", "_exit", "_shutdown", "_run_exitfuncs"),
    *("_Element", "_attn_implementation", "_get_number_of_features", "_set_vocab_sentencepiece"),
    "_build_extraction_prompt",
    *("_backend", "_conversion_deadline"),  # of docling's pages and results
}


def all_files() -> list[Path]:
    return [*product_files(), *python_files("scripts", "tests")]


def is_optional(module: str) -> bool:
    return module.split(".")[0] in OPTIONAL


def imports_inside_functions(path: Path) -> set[str]:
    """Returns where a function imports something that is not an optional extra, and what."""
    return {
        f"{relative(path)}:{node.lineno}: {module}"
        for function in functions(parse(path))
        for node in imports(function)
        for module in modules_of(node)
        if not is_optional(module) and (relative(path), module) not in FOR_SOME_PAGES
    }


def test_imports_stand_at_the_top() -> None:
    found: set[str] = set()
    for path in product_files():
        dotted = f"{module_name(path)}.__init__" if path.name == "__init__.py" else module_name(path)
        if not dotted.startswith(LAZY_ROOMS):
            found |= imports_inside_functions(path)
    assert found == set()


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef, is_command: bool) -> int:
    """Returns the number of lines from `def` to the end; for a command from its body on, because its signature is a
    list of options."""
    start = function.body[0].lineno if is_command else function.lineno
    assert function.end_lineno is not None
    return function.end_lineno - start + 1


def test_functions_are_short() -> None:
    found = {
        f"{relative(path)} {function.name}"
        for path in all_files()
        for function in functions(parse(path))
        if lines_of(function, relative(path).startswith("granite4v/cli/")) > MAX_FUNCTION_LINES
    }
    assert found == set()


def test_modules_are_short() -> None:
    found = {
        relative(path) for path in all_files() if len(path.read_text(encoding="utf-8").splitlines()) > MAX_MODULE_LINES
    }
    assert found == set()


def is_counted_loop(node: ast.AST) -> bool:
    """Whether this is `parametrize("seed", ...)` or `parametrize(..., range(...))`."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "parametrize"):
        return False
    names, values = node.args[:2]
    return "seed" in ast.unparse(names) or (isinstance(values, ast.Call) and ast.unparse(values.func) == "range")


def test_loops_over_seeds_stand_inside_tests() -> None:
    """A test is something that can fail on its own; a hundred seeds of it are one test."""
    found = {relative(path) for path in python_files("tests") if any(map(is_counted_loop, ast.walk(parse(path))))}
    assert found == set()


def test_test_modules_import_no_other_test_modules() -> None:
    """Code that several test modules need is in tests/helpers."""
    modules = {module for path in python_files("tests") for node in imports(parse(path)) for module in modules_of(node)}
    assert {name for name in modules if ".test_" in name} == set()


def private_names(tree: ast.AST) -> set[str]:
    """Returns private attributes that are read from other objects than self, imported, or replaced by monkeypatch."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "self"):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("granite4v"):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "monkeypatch.setattr":
            strings = (one.value for one in node.args[:2] if isinstance(one, ast.Constant))
            found |= {value.split(".")[-1] for value in strings if isinstance(value, str)}
    return {name for name in found if name.startswith("_") and not name.startswith("__")} - OTHERS_PRIVATES


def test_tests_reach_into_no_privates() -> None:
    found = {f"{relative(path)} {name}" for path in python_files("tests") for name in private_names(parse(path))}
    assert found == set()
