"""The first run on a machine measures its kernels: a message says so, and Ctrl-C ends it with all child processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from granite4v.ggml import autotune
from granite4v.ggml.kernel_timing import MANY
from granite4v.ggml.kernels import FLOAT32, PLAIN
from granite4v.runtime.model import Model
from tests.helpers import faulty_kernels
from tests.helpers.pictures import text_picture
from tests.toy.spec import PRESETS

HANGING = """
from types import SimpleNamespace
from granite4v.ggml import autotune
autotune.SMALL = 0
autotune.kernel_timing = SimpleNamespace(__name__="tests.helpers.faulty_kernels")
from granite4v.cli.entry import entry
entry()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to a child there")
def test_ctrl_c_while_measuring(make_model: Callable[..., Path], tmp_path: Path) -> None:
    model, picture, log = make_model(PRESETS["tiny"], "F16", "F16"), tmp_path / "page.png", tmp_path / "children"
    text_picture((150, 100)).save(picture)
    environment = {
        **os.environ,
        "GRANITE4V_CACHE": str(tmp_path / "cache"),
        "FAULTY_KERNELS": json.dumps({PLAIN: "hang"}),
        "FAULTY_KERNELS_LOG": str(log),
    }
    command = [sys.executable, "-c", HANGING, "ask", str(picture), "What is this?", "--model", str(model)]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "measuring the fastest kernels" in line:
                break
        children = list(map(int, log.read_text().split()))
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert (
        children
        and process.returncode == 130
        and stdout == ""
        and "interrupted" in stderr
        and "Traceback" not in stderr
    )
    assert time.monotonic() - start < 30  # a hanging kernel sleeps for 60 seconds
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
    known = tmp_path / "cache" / autotune.CACHE
    assert not known.exists() or not any(json.loads(known.read_text()).values())  # nothing that was not measured


def test_a_slow_measurement_is_reported_to_the_caller(
    make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRANITE4V_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FAULTY_KERNELS", json.dumps({PLAIN: 1.0, FLOAT32: "hang"}))
    monkeypatch.setenv("FAULTY_KERNELS_LOG", str(tmp_path / "children"))
    monkeypatch.setattr(autotune, "SMALL", 0)
    monkeypatch.setattr(autotune, "BUDGET_S", 4.0)
    monkeypatch.setattr(autotune, "kernel_timing", SimpleNamespace(__name__=faulty_kernels.__name__))
    stages: list[str] = []
    with Model.load(make_model(PRESETS["tiny"], "F16", "F16"), device="cpu") as model:
        model.generate("x", [text_picture((150, 100))], max_tokens=2, progress=lambda stage, *_: stages.append(stage))
    assert "measure" in stages and stages.index("measure") < stages.index("encode")
    (known,) = json.loads((tmp_path / "cache" / autotune.CACHE).read_text()).values()
    assert known[f"F16 {PLAIN} {MANY}"] == MANY and f"F16 {FLOAT32} {MANY}" not in known


def test_a_small_model_is_not_measured(
    make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRANITE4V_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(autotune, "run_main", lambda *_, **__: pytest.fail("measured"))
    with Model.load(make_model(PRESETS["tiny"], "F16", "F16"), device="cpu") as model:
        model.generate("x", [text_picture((150, 100))], max_tokens=2)
        assert model.settings["vision_kernels"] == {} and model.settings["text_buffer_types"] == {}
