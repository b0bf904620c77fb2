"""How the libraries of llama-cpp-python are loaded: how OpenMP's threads wait depends on how busy the machine is."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from granite4v.ggml.library import openmp_for_this_load

IDLE, BUSY = (0.0, 0.0, 0.0), (10_000.0, 0.0, 0.0)


def policy_while_loading() -> str | None:
    with openmp_for_this_load():
        return os.environ.get("OMP_WAIT_POLICY")


@pytest.fixture(autouse=True)
def no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("load", "policy"), [(IDLE, None), (BUSY, "passive")])
def test_threads_sleep_while_they_wait_on_a_busy_machine_alone(
    load: tuple[float, float, float], policy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: load)
    assert policy_while_loading() == policy
    assert "OMP_WAIT_POLICY" not in os.environ


def test_a_load_that_is_not_known_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> None:
        raise OSError("no load average")

    monkeypatch.setattr(os, "getloadavg", unknown)
    assert policy_while_loading() is None


@pytest.mark.parametrize(("name", "value"), [("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "5")])
def test_a_choice_of_the_user_stays(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: BUSY)
    monkeypatch.setenv(name, value)
    assert policy_while_loading() == (value if name == "OMP_WAIT_POLICY" else None)
    assert os.environ[name] == value


def test_openmp_is_told_before_it_is_loaded() -> None:
    code = f"import os; os.getloadavg = lambda: {BUSY}; from granite4v.ggml.library import lib; lib()"
    environment = {**os.environ, "OMP_DISPLAY_ENV": "true"}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    if "OMP_WAIT_POLICY" not in told.stderr:
        pytest.skip("this llama-cpp-python was built without OpenMP")
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in told.stderr
