"""Defines a mutation case, and what a kind of input must provide."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


@dataclass
class Case:
    """Edits in words, and command lines (without 'granite4v') to run one after another in the case's folder."""

    edits: list[str] = field(default_factory=list)
    commands: list[list[str]] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    """How one command ended. `status` is None if a signal or a time limit ended it."""

    command: list[str]
    status: int | None
    signal: int | None
    timed_out: bool
    seconds: float
    stdout: str
    stderr: str
    stack: str  # Python's, at the signal or the time limit
    left_running: bool  # processes that the command started outlived it
    left_behind: list[str]  # in the folder for temporary files


class Kind(Protocol):
    """One kind of input. Everything depends on the arguments alone, so that a case can be rebuilt."""

    name: str

    def prepare(self, bases: Path) -> None:
        """Makes the unmutated inputs that cases start from. Runs once, in a child process."""

    def build(self, rng: random.Random, bases: Path, folder: Path) -> Case:
        """Writes the files of a case into `folder`."""

    def run(self, command: list[str]) -> int | None:
        """Runs one command in the current folder and returns its exit status."""

    def check(self, folder: Path, case: Case, results: list[Result]) -> list[str]:
        """Describes what is wrong with what the commands left behind."""


def rng_of(kind: str, seed: int, index: int) -> random.Random:
    return random.Random(f"{kind} {seed} {index}")
