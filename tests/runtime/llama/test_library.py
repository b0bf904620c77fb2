"""Tests of the library: long calls can be aborted, llama.cpp's reasons are kept, and imports load nothing heavy."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from granite4v.runtime.llama.abort import AbortFlag
from granite4v.runtime.llama.library import Log


def test_the_abort_flag_is_what_c_reads() -> None:
    flag = AbortFlag()
    callback = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)(flag.callback_address)
    assert not callback(flag.data_address) and not flag.is_raised
    flag.raise_()
    assert callback(flag.data_address) and flag.is_raised
    flag.clear()
    assert not callback(flag.data_address)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([], "llama.cpp gave no reason"),
        ([(2, "info\n"), (3, "warning\n")], "llama.cpp gave no reason"),
        (
            [(4, "llama_model_load: error loading model: bad file\n"), (4, "then: failed\n")],
            "error loading model: bad file",
        ),
        ([(4, "two words: kept"), (5, " going on")], "two words: kept"),
    ],
)
def test_the_first_error_is_the_reason(lines: list[tuple[int, str]], reason: str) -> None:
    log = Log()
    for level, text in lines:
        log.add(level, text)
    assert log.reason() == reason
    log.clear()
    assert log.reason() == "llama.cpp gave no reason"


HEAVY = ("numpy", "llama_cpp", "torch", "transformers", "jinja2", "tokenizers", "PIL")


@pytest.mark.parametrize("module", ["granite4v", "granite4v.runtime", "granite4v.cli.ask", "granite4v.cli.bench"])
def test_importing_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_front_door_imports_nothing_until_a_name_is_used() -> None:
    code = (
        "import sys, granite4v; before = [n for n in sys.modules if n.startswith('granite4v.')];"
        "granite4v.Model; granite4v.ModelFileError; print(before, 'granite4v.runtime' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "['granite4v.lazy'] True\n"


def test_every_public_name_is_there() -> None:
    import granite4v

    assert [name for name in granite4v.__all__ if not hasattr(granite4v, name)] == []
    assert dir(granite4v) == sorted(granite4v.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = granite4v.nonsense
