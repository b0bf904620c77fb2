"""Builds the report: all sections in order, and their problems."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from granite4v.doctor import kernels, machine, native
from granite4v.doctor.model import check_model
from granite4v.doctor.section import Problem, Section

__all__ = ["Problem", "Report", "Section", "examine"]


class Report:
    """All findings. `is_content`: nothing is broken, and nothing costs half of the speed or more."""

    def __init__(self, sections: list[Section]) -> None:
        self.sections = sections

    @property
    def problems(self) -> list[Problem]:
        """All problems, the serious ones first."""
        found = [problem for section in self.sections for problem in section.problems]
        return sorted(found, key=lambda problem: not problem.is_serious)

    @property
    def is_content(self) -> bool:
        return not any(problem.is_serious for problem in self.problems)

    def as_json(self) -> dict[str, Any]:
        return {
            "content": self.is_content,
            **{section.name: section.data for section in self.sections},
            "problems": [problem.as_json() for problem in self.problems],
        }


def examine(model: str | Path | None = None, step: Callable[[str], None] | None = None) -> Report:
    """Examines this machine, and the memory needs of `model` if given. `step` gets the name of each slow step.

    Takes some ten seconds, since kernels are measured again. No error of the machine or of a file is raised.
    """
    return Report(list(_sections(model, step or (lambda _: None))))


def _sections(model: str | Path | None, step: Callable[[str], None]) -> Iterator[Section]:
    step("loading llama-cpp-python")
    probe = native.probe()
    yield machine.cpu()
    yield native.build(probe)
    if probe.build is not None:
        step("measuring kernels")
        yield kernels.measure(probe.build)
    yield native.gpu(probe)
    yield machine.threads()
    yield machine.memory()
    yield machine.cache()
    yield machine.config()
    yield machine.extras()
    if model is not None:
        yield check_model(model)
