"""`granite4v extract` with a tiny model with random weights: a batch that is killed, repeated, changed and extended."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from PIL import Image
from typer.testing import CliRunner

import granite4v
from granite4v.cli.extract import with_ray_address
from granite4v.cli.main import app
from granite4v.runtime.extract import Record
from tests.helpers.pictures import text_picture
from tests.toy.spec import PRESETS

TASKS = ("--task", "tables_html", "--task", "chart2csv")
SCHEMA = {"type": "object", "properties": {"paid": {"type": "boolean"}}, "required": ["paid"]}


@pytest.fixture(scope="module")
def folder(make_model: Callable[..., Path]) -> Path:
    return make_model(PRESETS["tiny"])


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pages: a PDF of six and four images, one of them broken and two with the same pixels."""
    scans = tmp_path_factory.mktemp("scans")
    pages = [text_picture((60, 90), seed) for seed in range(8)]
    pages[0].save(scans / "a.pdf", save_all=True, append_images=pages[1:6], resolution=72)
    pages[6].save(scans / "b.png")
    (scans / "c.png").write_bytes((scans / "b.png").read_bytes()[:300])
    pages[6].save(scans / "d.bmp")
    pages[7].save(scans / "e.webp", lossless=True)
    return scans


def command(*arguments: Any) -> list[str]:
    return [sys.executable, "-m", "granite4v", "extract", "--threads", "1", *map(str, arguments)]


def run(*arguments: Any) -> Any:
    # one thread: two would wait for each other while other processes keep the cores busy
    return CliRunner().invoke(app, command(*arguments)[3:])


def records(out: Path) -> list[dict[str, Any]]:
    found = [json.loads(text) for text in (out / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in record.items() if key != "timings"} for record in found]


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same_end(folder: Path, scans: Path, tmp_path: Path) -> None:
    arguments = [scans, "--model", folder, *TASKS, "--max-tokens", 8, "--report", "--format", "md"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(*arguments, "--out", whole).exit_code == 1  # one image is broken
    rng = random.Random(1)
    results = broken / "results.jsonl"
    ends = sorted(rng.sample(range(1, 17), 4))
    for n in [0, *ends]:
        process = subprocess.Popen(
            command(*arguments, "--out", broken, "--resume"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and n_lines(results) < n:
            time.sleep(0.002)
        time.sleep(rng.random() * (0.05 if n else 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert 0 < n_lines(results) <= 20
    with results.open("ab") as file:
        file.write(b'{"source": "torn')
    result = run(*arguments, "--out", broken, "--resume")
    assert result.exit_code == 1 and "from an earlier run" in result.stderr
    assert records(broken) == records(whole) and len(records(whole)) == 20
    keys = [(record["source"], record["page"], record["task"]) for record in records(broken)]
    assert len(set(keys)) == len(keys)
    names = [{path.name for path in out.iterdir()} for out in (whole, broken)]
    assert names[0] == names[1]
    # the attempt count of a page stays if the kill came between its record and the note that it was finished
    for name in names[0] - {"results.jsonl", "report.html", ".granite4v-pages", ".granite4v-attempts.json"}:
        assert (whole / name).read_bytes() == (broken / name).read_bytes()


def n_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_keeps_what_is_finished(folder: Path, scans: Path, tmp_path: Path, number: signal.Signals) -> None:
    arguments = [scans, "--model", folder, *TASKS, "--max-tokens", 60, "--out", tmp_path / "out"]
    process = subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and n_lines(tmp_path / "out" / "results.jsonl") < 2:
        time.sleep(0.01)
    second = run(*arguments, "--resume")
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in stderr and stdout == ""
    n = len(records(tmp_path / "out"))
    assert f"{n} finished records are kept in '{tmp_path / 'out'}'; continue with --resume" in stderr
    assert stderr.splitlines()[-1].startswith("granite4v: ")
    assert second.exit_code == 1 and "another process is writing to" in second.stderr
    assert len(records(tmp_path / "out")) == n_lines(tmp_path / "out" / "results.jsonl") >= 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_ended_with_pages_in_flight_it_goes_on_to_the_same_end(
    make_model: Callable[..., Path], scans: Path, tmp_path: Path, number: signal.Signals
) -> None:
    half = make_model(PRESETS["tiny"], text_type="F16")  # a float32 file is answered one question at a time
    arguments = [scans, "--model", half, *TASKS, "--max-tokens", 40, "--parallel", 3]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    told = run(*arguments, "--out", whole).stderr
    assert "up to 3 answers at once (as asked for)" in told
    for n in (1, 6):
        process = subprocess.Popen(
            command(*arguments, "--out", broken, "--resume"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and n_lines(broken / "results.jsonl") < n:
            time.sleep(0.002)
        process.send_signal(number)
        process.wait(60)
    n_kept = n_lines(broken / "results.jsonl")
    assert f"{n_kept} from an earlier run" in run(*arguments, "--out", broken, "--resume").stderr and n_kept >= 6
    assert records(broken) == records(whole) and len(records(whole)) == 20


def test_a_full_disk_is_a_message_and_loses_nothing(folder: Path, scans: Path, tmp_path: Path) -> None:
    code = (
        "import resource, sys\n"
        "from granite4v.cli.entry import entry\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))\n"
        "entry()\n"
    )
    arguments = [scans / "a.pdf", "--model", folder, *TASKS, "--max-tokens", 4, "--out", tmp_path / "out"]
    done = subprocess.run([sys.executable, "-c", code, *command(*arguments)[3:]], capture_output=True, text=True)
    kept = records(tmp_path / "out")
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
    assert f"no space left for '{tmp_path / 'out' / 'results.jsonl'}'" in done.stderr
    assert f"{len(kept)} finished records are kept; continue with --resume" in done.stderr and kept
    assert "resume it (--resume)" in run(*arguments).stderr
    run(*arguments, "--resume")
    assert records(tmp_path / "out")[: len(kept)] == kept and len(records(tmp_path / "out")) == 12


def test_one_page_and_one_task_is_the_output_alone(folder: Path, scans: Path) -> None:
    result = run(scans / "b.png", "--model", folder, "--prompt", "What is this?", "--max-tokens", 5)
    with granite4v.load(folder, n_threads=1) as model:
        answer = model.generate("What is this?", [scans / "b.png"], max_tokens=5)
    assert (result.exit_code, result.stdout) == (1, answer.text.strip() + "\n")  # a cut answer is not a success
    assert "1 page of 1 document, 1 record, 1 truncated, partly kept; 5 tokens" in result.stderr


def test_several_records_have_headings(folder: Path, scans: Path) -> None:
    result = run(scans / "a.pdf", "--pages", "1-2", "--model", folder, "--prompt", "What?", "--max-tokens", 5)
    headings = [text for text in result.stdout.splitlines() if text.startswith("== ")]
    assert headings == [f"== {scans / 'a.pdf'}, page {page}, prompt" for page in (1, 2)]


def test_records_as_lines_of_json(folder: Path, scans: Path, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    arguments = ["--model", folder, "--task", "kvp", "--schema", tmp_path / "schema.json", "--prompt", "Say a word."]
    result = run(scans / "b.png", scans / "c.png", *arguments, "--json", "--max-tokens", 30)
    found = [Record.from_dict(json.loads(text)) for text in result.stdout.splitlines()]
    assert [record.task for record in found] == ["kvp", "prompt"] * 2 and result.exit_code == 1
    jsonschema.validate(found[0].value, SCHEMA)
    assert found[0].valid and found[0].finish_reason == "stop"
    assert found[2].error is not None and "c.png" in found[2].error


def test_a_page_is_encoded_and_read_once_for_all_tasks(folder: Path, scans: Path) -> None:
    result = run(scans / "b.png", "--model", folder, *TASKS, "--prompt", "And?", "--json", "--max-tokens", 3)
    first, second, third = (json.loads(text)["timings"] for text in result.stdout.splitlines())
    assert [timings["n_encoded"] for timings in (first, second, third)] == [1, 0, 0]
    assert first["n_reused"] == 0
    for timings in (second, third):
        assert timings["n_image"] < timings["n_reused"] < timings["n_prompt"]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--task", "ocr"], 2, "there is no task 'ocr'"),
        ([], 2, "no task; give one or more of"),
        (["--task", "kvp"], 2, "needs a schema"),
        (["--task", "chart2csv", "--schema", "s.json"], 2, "a schema belongs to the task 'kvp'"),
        (["--prompt", "<chart2csv> please"], 2, "has the task tag"),
        (["--task", "chart2csv", "--resume"], 2, "'resume' needs a directory"),
        (["--task", "chart2csv", "--report"], 2, "(--out)"),
        (["--task", "chart2csv", "--format", "xls"], 2, "there is no format 'xls'"),
        (
            ["--prompt", "What?", "--format", "csv"],
            2,
            "the format 'csv' is for tables and chart data, which prompt does",
        ),
        (["--task", "chart2csv", "--out", "-"], 2, "'out' (--out) is '-'; expected a directory"),
        (["--task", "chart2csv", "--out", "x.json"], 2, "'x.json', which looks like a file; expected a directory"),
        (["--task", "chart2csv", "--out", "{scans}/b.png"], 2, "which is not a directory"),
        (["--task", "chart2csv", "--csv-safe"], 2, "'csv_safe' needs a directory"),
        (["--task", "chart2csv", "--retry-failed"], 2, "add 'resume' (--resume)"),
        (["--task", "chart2csv", "--pages", "3-1"], 2, "which is in descending order"),
        (["--task", "chart2csv", "--crop", "1,2,3"], 2, "is not four numbers"),
        (["--task", "chart2csv", "--max-tokens", "0"], 2, "--max-tokens"),
        (["--task", "kvp", "--schema", "s.json"], 1, "the schema 's.json' cannot be read"),
        (["--task", "chart2csv", "--model", "gone"], 1, "'gone' does not exist"),
        (["--task", "chart2csv", "--out", "{scans}"], 1, "which no run of 'granite4v extract' made"),
        (["--task", "chart2csv", "--ctx-size", "40"], 1, "but the context size is 40"),
    ],
)
def test_failures_are_a_message_and_a_status(
    folder: Path, scans: Path, arguments: list[str], status: int, message: str
) -> None:
    given = [argument.format(scans=scans) for argument in arguments]
    model = [] if "--model" in given else ["--model", folder]
    result = run(scans / "b.png", *model, *given)
    assert (result.exit_code, result.stdout) == (status, "")
    assert message in " ".join(result.stderr.split()) and "Traceback" not in result.stderr


def test_a_file_that_was_repaired_leaves_no_failure(folder: Path, scans: Path, tmp_path: Path) -> None:
    batch, out = tmp_path / "batch", tmp_path / "out"
    (batch / "sub").mkdir(parents=True)
    for name in ("b.png", "c.png"):
        (batch / "sub" / name).write_bytes((scans / name).read_bytes())
    arguments = [
        "--model",
        folder,
        "--task",
        "chart2csv",
        "--unconstrained",
        "--max-tokens",
        5,
        "--out",
        out,
        "--report",
    ]
    first = run(batch, *arguments)
    assert first.exit_code == 1 and "1 failed" in first.stderr and "sub/c.png" in first.stderr
    text_picture((60, 90), 20).save(batch / "sub" / "c.png")
    second = run(f"{batch}/", *arguments, "--resume")
    assert "2 from an earlier run, 1 of them replaced" in second.stderr and " failed" not in second.stderr
    assert [(Path(one["source"]).name, one["error"], one["stem"]) for one in records(out)] == [
        ("b.png", None, "sub/b"), ("c.png", None, "sub/c")
    ]  # fmt: skip
    assert "cannot be read" not in (out / "report.html").read_text()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is needed")
def test_records_are_kept_where_stdout_cannot_be_written(folder: Path, scans: Path, tmp_path: Path) -> None:
    arguments = [scans, "--model", folder, *TASKS, "--max-tokens", 4, "--out", tmp_path / "out", "--json"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command(*arguments), stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"standard output is no longer writable; all results are in '{tmp_path / 'out'}'" in done.stderr
    assert len(records(tmp_path / "out")) == 20 and "20 records" in done.stderr


def test_an_answer_that_was_cut_is_told(folder: Path, scans: Path, tmp_path: Path) -> None:
    result = run(scans / "b.png", "--model", folder, "--task", "chart2summary", "--unconstrained", "--max-tokens", 4)
    assert (
        result.exit_code == 1
        and "b.png, page 1, chart2summary: truncated, kept up to where it was cut: the answer did not end by itself"
        in result.stderr
    )


def test_warnings_of_a_page_are_told_once_for_all_tasks(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "floats.tif"
    Image.new("F", (30, 20), 0.5).save(path)
    result = run(path, *TASKS, "--max-tokens", 2, "--model", folder)
    assert result.stderr.count("warning: ") == 1
    assert f"warning: '{path}' is greyscale of floats" in result.stderr


def test_a_failure_names_its_file_once(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "notes.png"
    path.write_text("no image")
    result = run(path, *TASKS, "--model", folder)
    assert f"\n'{path}' holds text; expected " in result.stderr and result.stderr.count(f"{path}") == 1


def test_what_could_act_on_a_terminal_is_escaped(folder: Path, scans: Path, tmp_path: Path) -> None:
    name = tmp_path / "a\x1b[31m\rb.png"
    name.write_bytes((scans / "c.png").read_bytes())
    result = run(name, "--model", folder, "--prompt", "What?", "--max-tokens", 2)
    assert "\\x1b[31m\\rb.png" in result.stderr and not {"\x1b", "\r"} & set(result.stderr)


def test_the_files_are_listed(folder: Path, scans: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(scans / "b.png", "--model", folder, "--prompt", "What?", "--max-tokens", 5, "--out", out, "--report")
    assert result.stdout.splitlines() == [str(out / name) for name in ("results.jsonl", "b.prompt.md", "report.html")]
    again = run(scans / "b.png", "--model", folder, "--prompt", "What?", "--max-tokens", 5, "--out", out, "--resume")
    assert again.exit_code == 1 and "1 from an earlier run" in again.stderr


def test_the_same_from_python(folder: Path, scans: Path) -> None:
    found = list(granite4v.extract(scans / "b.png", model=folder, prompt="What?", max_tokens=5, n_threads=1))
    assert [(record.task, record.valid) for record in found] == [("prompt", True)]
    assert isinstance(found[0], granite4v.Record)


def test_the_example_of_the_documentation_runs(
    folder: Path, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").symlink_to(folder)
    (tmp_path / "scans").mkdir()
    for name in ("b.png", "c.png"):
        (tmp_path / "scans" / name).write_bytes((scans / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    example = textwrap.dedent(str(granite4v.extract.__doc__).partition("For instance:\n")[2])
    few = 'out="read/", n_threads=1, max_tokens=20)'
    assert 'out="read/")' in example
    exec(compile(example.replace('out="read/")', few), "example", "exec"), {})
    assert "scans/c.png 1 " in capsys.readouterr().out
    assert [record["task"] for record in records(Path("read"))] == ["tables_html", "kvp"] * 2


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--ray", "scans/"], ["--ray", "auto", "scans/"]),
        (["scans/", "--ray"], ["scans/", "--ray", "auto"]),
        (["--ray", "--json", "a.pdf"], ["--ray", "auto", "--json", "a.pdf"]),
        (["--ray", "head.example:6379", "a.pdf"], ["--ray", "head.example:6379", "a.pdf"]),
        (["--ray", "[::1]:6379"], ["--ray", "[::1]:6379"]),
        (["--ray", "ray://head:10001", "a"], ["--ray", "ray://head:10001", "a"]),
        (["--ray", "local", "a"], ["--ray", "local", "a"]),
        (["--ray=head:1", "a"], ["--ray=head:1", "a"]),
        (["a", "--", "--ray", "b"], ["a", "--", "--ray", "b"]),
        (["--ray", "s3://bucket/a.pdf"], ["--ray", "auto", "s3://bucket/a.pdf"]),
    ],
)
def test_an_input_is_not_taken_for_the_address_of_a_cluster(given: list[str], expected: list[str]) -> None:
    assert with_ray_address(given) == expected
