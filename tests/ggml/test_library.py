"""How the libraries of llama-cpp-python are loaded, and how OpenMP's threads wait for each other."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from granite4v.ggml.library import SPINS, openmp_for_this_load

CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@pytest.fixture(autouse=True)
def no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CHOICES:
        monkeypatch.delenv(name, raising=False)


def test_threads_wait_awake_for_a_bounded_time() -> None:
    with openmp_for_this_load():
        assert os.environ["GOMP_SPINCOUNT"] == str(SPINS)
    assert not set(CHOICES) & os.environ.keys()


@pytest.mark.parametrize(("name", "value"), [("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "5")])
def test_a_choice_of_the_user_stays(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with openmp_for_this_load():
        assert {key: os.environ.get(key) for key in CHOICES} == dict.fromkeys(CHOICES) | {name: value}
    assert os.environ[name] == value


def test_openmp_is_told_before_it_is_loaded() -> None:
    code = "from granite4v.ggml.library import lib; lib()"
    environment = {**os.environ, "OMP_DISPLAY_ENV": "verbose"}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    if "GOMP_SPINCOUNT" not in told.stderr:
        pytest.skip("this llama-cpp-python was built without GCC's OpenMP")
    assert f"GOMP_SPINCOUNT = '{SPINS}'" in told.stderr
