"""The progress display: a live line on a terminal, plain lines elsewhere, and nothing left behind."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from types import SimpleNamespace

import pytest

from granite4v.cli.progress import Activity, Progress, duration, plural
from granite4v.converter import Progress as Written


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("granite4v.cli.progress.time.monotonic", lambda: clock.now)
    return clock


def test_counts_and_durations_read_as_people_write_them() -> None:
    assert [duration(seconds) for seconds in (3, 99, 600, 7800)] == ["3 s", "99 s", "10 min", "2 h 10 min"]
    assert [plural(n, "page") for n in (0, 1, 2000)] == ["0 pages", "1 page", "2,000 pages"]


# --- not on a terminal ---


def test_a_line_for_each_stage_and_every_ten_seconds(clock: SimpleNamespace) -> None:
    stream = io.StringIO()
    with Progress(stream) as progress:
        for done in range(0, 100, 10):
            progress.stage("encode", done, 100)
            clock.now += 4
        progress.stage("load", 0, 1)
    assert stream.getvalue().splitlines() == [
        "encoding images ...",
        "encoding images: 30%, 28 s left, 12 s elapsed",
        "encoding images: 60%, 16 s left, 24 s elapsed",
        "encoding images: 90%, 4 s left, 36 s elapsed",
        "loading weights ...",
    ]


def test_time_left_is_shown_once_it_can_be_estimated(clock: SimpleNamespace) -> None:
    """Shown after two seconds and two percent; what was done before the first call does not count."""
    progress = Progress(io.StringIO())

    def figures(now: float, done: int) -> list[str]:
        clock.now = now
        progress.written(Written(done, 1000, "text.gguf", "a"))
        return progress.figures(now)

    assert figures(150.0, 0) == ["0%"]
    assert figures(151.0, 500) == ["50%", "1 s elapsed"]
    assert figures(155.0, 10) == ["1%", "5 s elapsed"]
    assert figures(160.0, 200) == ["20%", "40 s left", "10 s elapsed"]
    assert figures(160.5, 1000) == ["100%", "0 s left", "10 s elapsed"]


def test_generated_tokens_have_a_speed_and_no_end(clock: SimpleNamespace) -> None:
    progress = Progress(io.StringIO())
    progress.stage("generate", 1, 0)
    clock.now += 10
    progress.stage("generate", 25, 0)
    assert progress.line(clock.now) == "generating: 2.5 tokens/s, 25 tokens, 10 s elapsed"


def test_work_that_ends_before_the_delay_shows_nothing(clock: SimpleNamespace) -> None:
    stream = io.StringIO()
    progress = Progress(stream, delay_s=0.5)
    progress.written(Written(1, 100, "text.gguf", "a"))
    assert stream.getvalue() == ""
    clock.now += 0.6
    progress.written(Written(25, 100, "text.gguf", "b"))
    assert stream.getvalue() == "writing text.gguf: b: 25%\n"


def test_names_cannot_control_what_shows_them(clock: SimpleNamespace) -> None:
    stream = io.StringIO()
    progress = Progress(stream)
    progress.show(Activity("reading", detail="a\x1b[2J\n\u202eb.pdf"))
    progress.say("c\x1b[2J.pdf")
    assert stream.getvalue() == "reading a\\x1b[2J\\n\\u202eb.pdf ...\nc\\x1b[2J.pdf\n"


# --- on a terminal: in a child process, because the display uses the process's streams ---

START = """
import sys, time
from granite4v.cli import main
from granite4v.cli.entry import entry
from granite4v.cli.progress import Activity, Progress
def app():
    with Progress() as progress:
{body}
main.app = app
entry()
"""
# the line is drawn ten times per second; what must have been drawn stays for several times that long
REPORTING = """
for done in range(5):
    progress.show(Activity("encoding", done, 4, detail="a[red]\x1b[31m.png"))
    time.sleep(0.4 if done == 4 else 0.05)
print("a result", flush=True)
progress.show(Activity("encoding", 4, 4))
progress.say("a remark")
progress.show(Activity("generating", n_tokens=7, tokens_per_s=3.5))
time.sleep(0.4)
"""
HANGING = """
progress.show(Activity("encoding", 1, 4))
time.sleep(0.3)
print("ready", flush=True)
progress.show(Activity("encoding", 2, 4))
time.sleep(60)
"""


def command(body: str) -> list[str]:
    return [sys.executable, "-c", START.format(body="\n".join(f"        {line}" for line in body.strip().splitlines()))]


def open_terminal(columns: int) -> tuple[int, int]:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    return ours, theirs


def read_all(descriptor: int) -> bytes:
    """Reads until the other end is closed, which is an error on Linux and an empty read on macOS."""
    read = b""
    while True:
        try:
            piece = os.read(descriptor, 1 << 16)
        except OSError:
            return read
        if not piece:
            return read
        read += piece


def on_terminal(body: str, columns: int = 80, **environment: str) -> str:
    ours, theirs = open_terminal(columns)
    clean = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        command(body), stdin=theirs, stdout=theirs, stderr=theirs, env={**clean, "TERM": "xterm", **environment}
    )
    os.close(theirs)
    shown = read_all(ours)
    os.close(ours)
    assert process.wait(timeout=60) == 0
    return shown.decode()


ESCAPE = re.compile(r"\x1b\[([\d;?]*)([A-Za-z])")


def screen(output: str) -> list[str]:
    """Returns what a terminal finally shows for output that moves up, returns and erases lines."""
    lines, row, column = [""], 0, 0
    position = 0
    while position < len(output):
        sequence = ESCAPE.match(output, position)
        position = sequence.end() if sequence else position + 1
        if sequence is None:
            character = output[position - 1]
            if character == "\n":
                row += 1
                lines += [""] * (row + 1 - len(lines))
            elif character == "\r":
                column = 0
            else:
                lines[row] = lines[row].ljust(column)[:column] + character + lines[row][column + 1 :]
                column += 1
        elif sequence[2] == "A":
            row -= int(sequence[1] or 1)
        elif sequence[2] == "K":
            lines[row] = ""
        else:
            assert sequence[2] == "m", sequence[0]  # colours; nothing else may be needed
    return [line.rstrip() for line in lines]


def test_the_live_line_gives_way_to_results_and_remarks_and_goes_in_the_end() -> None:
    shown = on_terminal(REPORTING)
    assert [line for line in screen(shown) if line] == ["a result", "a remark"]
    drawn = re.split(r"[\r\n]", ESCAPE.sub("", shown))
    assert any(re.fullmatch(r"encoding a\[red\]\\x1b\[31m\.png +━+ +100%", line.rstrip()) for line in drawn)
    assert any(re.match(r"generating .* 3\.5 tokens/s, 7 tokens", line) for line in drawn)
    assert "\x1b[?25l" not in shown  # the cursor is not hidden, because a killed process could not restore it


def test_a_long_title_has_the_room_of_the_bar() -> None:
    title = "16 answers at once, document 3 of 12: scan.pdf"
    body = f"""
for done in range(4):
    progress.show(Activity("", done, 4, detail="{title}", tokens_per_s=28.0, left_s=300.0))
    time.sleep(0.4 if done == 3 else 0.05)
"""
    drawn = [line.rstrip() for line in re.split(r"[\r\n]", ESCAPE.sub("", on_terminal(body)))]
    assert any(re.fullmatch(f"{title} +75%, 5 min left, 28.0 tokens/s", line) for line in drawn), drawn
    wide = [line.rstrip() for line in re.split(r"[\r\n]", ESCAPE.sub("", on_terminal(body, columns=120)))]
    assert any(re.fullmatch(f"{title} +━.* 75%, 5 min left, 28.0 tokens/s", line) for line in wide), wide


def test_the_live_line_fits_a_narrow_terminal() -> None:
    shown = on_terminal(REPORTING, columns=24)
    drawn = re.split(r"[\r\n]", ESCAPE.sub("", shown))
    assert max(map(len, drawn)) <= 24 and any(line.startswith("encoding a[red") for line in drawn)
    assert [line for line in screen(shown) if line] == ["a result", "a remark"]


def test_without_colour_nothing_is_coloured() -> None:
    colours = {match[1] for match in ESCAPE.finditer(on_terminal(REPORTING, NO_COLOR="1")) if match[2] == "m"}
    assert not [colour for colour in colours if re.search(r"(^|;)[349]\d", colour)], colours
    assert [match for match in ESCAPE.finditer(on_terminal(REPORTING)) if match[2] == "m"]


def test_a_terminal_that_knows_no_sequences_gets_plain_lines() -> None:
    shown = on_terminal(REPORTING, TERM="dumb")
    assert shown.splitlines() == ["encoding a[red]\\x1b[31m.png ...", "a result", "a remark", "generating ..."]


def test_ctrl_c_removes_the_live_line() -> None:
    ours, theirs = open_terminal(80)
    with subprocess.Popen(command(HANGING), stdout=subprocess.PIPE, stderr=theirs, text=True) as process:
        os.close(theirs)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        shown = read_all(ours).decode()
        assert process.wait(timeout=60) == 130
    os.close(ours)
    assert [line for line in screen(shown) if line] == ["granite4v: interrupted"]
    assert "encoding" in shown


def test_rich_is_imported_for_a_live_line_alone() -> None:
    code = (
        "import sys\n"
        "import granite4v.cli.main\n"
        "from granite4v.cli.progress import Activity, Progress\n"
        "with Progress() as progress:\n"
        "    progress.show(Activity('encoding'))\n"
        "print('rich' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\n", "encoding ...\n")
