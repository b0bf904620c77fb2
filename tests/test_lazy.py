"""Packages that import their exports on first use."""

from __future__ import annotations

import subprocess
import sys

import pytest

import granite4v
import granite4v.clip_projector
import granite4v.runtime


def test_every_public_name_is_found_and_listed() -> None:
    for package in (granite4v, granite4v.runtime, granite4v.clip_projector):
        for name in package.__all__:
            assert getattr(package, name) is not None
        assert set(package.__all__) == set(dir(package))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'granite4v\.runtime' has no attribute 'Modell'"):
        granite4v.runtime.Modell  # noqa: B018


def test_nothing_is_imported_before_a_name_is_used() -> None:
    code = (
        "import sys, granite4v, granite4v.runtime, granite4v.clip_projector\n"
        "print(sorted(name for name in sys.modules if name.startswith('granite4v')), 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "['granite4v', 'granite4v.clip_projector', 'granite4v.lazy', 'granite4v.runtime'] False\n"
