"""How the command starts and ends: streams that are closed, full or in another encoding, signals, and statuses."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX streams and signals")
pytestmark = posix

# The console script with another command line.
STUB = """
import os, sys, time
from granite4v.cli import main
from granite4v.cli.entry import entry
from granite4v.errors import ModelFileError
def app():
{body}
main.app = app
entry()
"""
WAITING = """
try:
    print("working", flush=True)
    time.sleep(60)
finally:
    print("cleaned up", flush=True)
"""


def stub(body: str) -> list[str]:
    lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
    return [sys.executable, "-c", STUB.format(body=lines)]


def shell(command: list[str], redirection: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", f'"$@" {redirection}', "bash", *command],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


def granite4v(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "granite4v", *arguments]


# --- stdout, stderr, stdin ---


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["inspect", "nano"], ["inspect", "nano", "--json"]])
def test_a_full_disk_behind_stdout_is_a_message(arguments: list[str], unbuffered: str) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    done = shell(granite4v(*arguments), "> /dev/full", PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 1
    assert done.stderr.count("results cannot be written to standard output: No space left on device") == 1
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.parametrize("arguments", [["--version"], ["inspect", "nano"]])
def test_a_closed_stdout_is_refused_before_any_work(arguments: list[str]) -> None:
    done = shell(granite4v(*arguments), ">&-")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("granite4v: standard output is closed")


def test_what_is_opened_later_does_not_take_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    """A file opened as descriptor 2 would get what C libraries print."""
    body = f"file = open({str(tmp_path / 'file')!r}, 'w')\nprint(file.fileno())"
    done = shell(stub(body), "2>&- <&-")
    assert done.returncode == 0 and int(done.stdout) > 2


def test_messages_never_go_to_stdout_where_stderr_is_closed() -> None:
    done = shell(stub("print('a message', file=sys.stderr)\nprint('a result')"), "2>&-")
    assert (done.returncode, done.stdout) == (0, "a result\n")


def test_what_other_threads_print_is_no_result() -> None:
    """Ray prints about dead workers in a thread of its own."""
    body = "import threading\nother = threading.Thread(target=print, args=['a remark'])\nother.start()\nother.join()"
    done = shell(stub(f"{body}\nprint('a result')"), "")
    assert (done.returncode, done.stdout, done.stderr) == (0, "a result\n", "a remark\n")


def test_messages_that_cannot_be_written_do_not_end_the_work() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    done = shell(stub("print('a message', file=sys.stderr, flush=True)\nprint('a result')"), "2> /dev/full")
    assert (done.returncode, done.stdout) == (0, "a result\n")


def test_a_reader_that_stops_ends_the_command_without_a_word() -> None:
    done = shell(stub("while True: print('line')"), "| head -n 1; echo ${PIPESTATUS[0]}")
    assert (done.stdout, done.stderr) == ("line\n141\n", "")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"PYTHONIOENCODING": "cp1252"}, "caf\u00e9 \\u2713 \\U0001f642".encode("cp1252")),
        ({"PYTHONIOENCODING": "latin-1"}, "caf\u00e9 \\u2713 \\U0001f642".encode("latin-1")),
        ({"PYTHONIOENCODING": "ascii"}, b"caf\\xe9 \\u2713 \\U0001f642"),
        ({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, "caf\u00e9 \u2713 \U0001f642".encode()),
        ({}, "caf\u00e9 \u2713 \U0001f642".encode()),
    ],
)
def test_any_text_can_be_printed_in_any_encoding(environment: dict[str, str], expected: bytes) -> None:
    clear = {name: value for name, value in os.environ.items() if name != "PYTHONIOENCODING"}
    code = stub("print('caf\\u00e9 \\u2713 \\U0001f642')\nprint('\\udcff')")
    done = subprocess.run(code, capture_output=True, env={**clear, **environment})
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == expected + b"\n\\udcff\n"


def test_escapes_reach_a_pipe_and_no_terminal() -> None:
    code = stub("print('\\x1b[31mred')\nprint('\\x1b[31mred', file=sys.stderr)")
    piped = subprocess.run(code, capture_output=True)
    assert (piped.stdout, piped.stderr) == (b"\x1b[31mred\n", b"\\x1b[31mred\n")
    ours, theirs = pty.openpty()
    done = subprocess.run(code, stdout=theirs, stderr=subprocess.PIPE)
    shown = os.read(ours, 1000)
    os.close(ours)
    os.close(theirs)
    assert (done.returncode, shown) == (0, b"\\x1b[31mred\r\n")


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii"])
def test_json_can_be_read_back_whatever_the_encoding(encoding: str) -> None:
    text = "caf\u00e9 \u2713 \U0001f642 \udcff"
    data = f"{{'text': {text!r}, 'lost': [float('nan'), float('inf'), 1.5]}}"
    code = stub(f"from granite4v.cli.streams import to_json\nprint(to_json({data}))")
    done = subprocess.run(code, capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding})
    assert json.loads(done.stdout.decode(encoding)) == {"text": text, "lost": [None, None, 1.5]}


def test_a_warning_is_one_line_without_the_place_in_the_code() -> None:
    done = subprocess.run(stub("import warnings\nwarnings.warn('odd\\n\\x1b name')"), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "warning: odd\\n\\x1b name\n")


# --- signals ---


def interrupted(*numbers: signal.Signals, body: str = WAITING, before: str = "") -> subprocess.CompletedProcess[str]:
    """Runs a command and sends it these signals while it works."""
    command = ["bash", "-c", f'{before} exec "$@"', "bash", *stub(body)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.2)
    stdout, stderr = process.communicate(timeout=60)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


@pytest.mark.parametrize(
    ("number", "message"),
    [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "ended by SIGTERM"), (signal.SIGHUP, "ended by SIGHUP")],
)
def test_each_signal_cleans_up_and_has_its_message_and_status(number: signal.Signals, message: str) -> None:
    done = interrupted(number)
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "cleaned up\n", f"granite4v: {message}\n")


SLOW = WAITING.replace("finally:", "finally:\n    time.sleep(SECONDS)")


def test_a_second_signal_leaves_the_clean_up_alone() -> None:
    done = interrupted(signal.SIGTERM, signal.SIGTERM, body=SLOW.replace("SECONDS", "2"))
    assert (done.returncode, done.stdout) == (143, "cleaned up\n")
    assert done.stderr == "granite4v: cleaning up; interrupt once more to end at once\ngranite4v: ended by SIGTERM\n"


def test_a_third_signal_ends_a_clean_up_that_hangs() -> None:
    done = interrupted(signal.SIGINT, signal.SIGINT, signal.SIGTERM, body=SLOW.replace("SECONDS", "60"))
    assert (done.returncode, done.stdout) == (143, "")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["HUP", "INT"])
def test_a_signal_that_is_ignored_stays_ignored(name: str) -> None:
    """Ignored because of nohup, or by a shell for its background jobs."""
    body = WAITING.replace("time.sleep(60)", "time.sleep(1)")
    done = interrupted(signal.Signals[f"SIG{name}"], body=body, before=f"trap '' {name};")
    assert (done.returncode, done.stdout, done.stderr) == (0, "cleaned up\n", "")


LEFT_OVER = """
import threading
def wait():
    while threading.main_thread().is_alive():
        time.sleep(0.01)
    os.write(1, b"working\\n")
    time.sleep(60)
threading.Thread(target=wait).start()
"""


def test_a_signal_at_the_very_end_leaves_no_traceback() -> None:
    """While the interpreter waits for a thread."""
    done = interrupted(signal.SIGINT, body=LEFT_OVER)
    assert (done.returncode, done.stderr) == (130, "")


# --- failures and bugs ---


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("ModelFileError('\\x1b[2J is no GGUF file.')", "\\x1b[2J is no GGUF file."),
        ("MemoryError()", "out of memory."),
        ("FileNotFoundError(2, 'No such file or directory', 'gone')", "'No such file or directory': 'gone'"),
        ("RecursionError('deep')", "nested too deeply"),
    ],
)
def test_what_the_world_can_cause_is_a_message_and_status_1(error: str, message: str) -> None:
    done = subprocess.run(stub(f"raise {error}"), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("granite4v: ") and message in done.stderr and done.stderr.count("\n") == 1


def test_a_bug_says_so_and_keeps_its_traceback_in_a_file(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(stub("print(1 / 0)"), capture_output=True, text=True, env=environment)
    (kept,) = tmp_path.glob("granite4v-error-*.txt")
    assert (done.returncode, done.stdout) == (70, "")
    assert done.stderr.startswith("granite4v: internal error: ZeroDivisionError: division by zero (")
    assert str(kept) in done.stderr and "Traceback" not in done.stderr
    assert kept.read_text().startswith("Traceback (most recent call last):\n")
