"""Long calls can be ended, and llama.cpp's reasons are kept. Importing the runtime loads nothing."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
import time

import pytest

from granite4v.runtime.llama.library import Log, Worker


@pytest.fixture
def worker() -> Worker:
    return Worker("test")


def aborting(worker: Worker) -> bool:
    """What C's callback says now."""
    callback = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)(worker.abort_address)
    return bool(callback(worker.abort_data))


def wait_for_abort(worker: Worker) -> bool:
    for _ in range(500):
        if aborting(worker):
            return True
        time.sleep(0.01)
    return False


def test_a_call_runs_to_its_end_in_one_thread(worker: Worker) -> None:
    threads = {worker.run(threading.get_ident) for _ in range(3)}
    assert len(threads) == 1 and threading.get_ident() not in threads
    assert not worker.run(lambda: aborting(worker), cancel=lambda: False)


def test_cancelling_reaches_the_callback_and_is_gone_the_next_time(worker: Worker) -> None:
    assert worker.run(lambda: wait_for_abort(worker), cancel=lambda: True)
    assert not worker.run(lambda: aborting(worker))


def test_an_exception_while_waiting_aborts_the_call(worker: Worker) -> None:
    ended = threading.Event()

    def call() -> None:
        assert wait_for_abort(worker)
        ended.set()

    def interrupt() -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        worker.run(call, cancel=interrupt)
    assert ended.is_set()  # it was waited for


def test_errors_of_the_call_come_through(worker: Worker) -> None:
    with pytest.raises(ZeroDivisionError):
        worker.run(lambda: 1 / 0)


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
    assert out == "[] True\n"


def test_every_public_name_is_there() -> None:
    import granite4v

    assert [name for name in granite4v.__all__ if not hasattr(granite4v, name)] == []
    assert dir(granite4v) == sorted(granite4v.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = granite4v.nonsense
