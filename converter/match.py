"""Matches a checkpoint's tensor names against the tables: each name is used exactly once or dropped by a rule."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from granite4v.converter.checkpoint import Checkpoint
from granite4v.converter.safetensors_file import ELEMENT_BYTES, SourceTensor
from granite4v.converter.tensors.rules import TensorGroup, TensorRule
from granite4v.errors import CheckpointError

SHOWN_PROBLEMS = 20


@dataclass(frozen=True)
class Names:
    """The inverted tables: map every accepted spelling of a name to the tables' own, which has the group's first
    prefix."""

    groups: tuple[TensorGroup, ...]
    spellings: Mapping[str, str]

    @classmethod
    def of(cls, groups: Iterable[TensorGroup]) -> Names:
        groups = tuple(groups)
        spellings = {
            prefix + rule.source: group.prefixes[0] + rule.source
            for group in reversed(groups)
            for rule in group.rules
            if rule.values is None
            for prefix in reversed(group.prefixes)
        }
        return cls(groups, spellings)

    def drop_reason(self, name: str) -> str | None:
        """Why a checkpoint tensor is left out; None if no rule says so."""
        for group in self.groups:
            for prefix in group.prefixes:
                if name.startswith(prefix):
                    for drop in group.drops:
                        if drop.matches(name.removeprefix(prefix)):
                            return drop.reason
        return None


@dataclass(frozen=True)
class Match:
    """A checkpoint's tensors by the tables' spelling, and the dropped ones with the reason."""

    tensors: Mapping[str, SourceTensor]
    dropped: tuple[tuple[str, str], ...]


def match_tensors(names: Names, checkpoint: Checkpoint) -> Match:
    """Finds the tensors of the tables in a checkpoint.

    Raises CheckpointError with a list of all tensors that are unknown, missing, duplicate or have the wrong shape, and
    of broken files.
    """
    found: dict[str, SourceTensor] = {}
    dropped: list[tuple[str, str]] = []
    wrong = list(checkpoint.problems)
    for name, tensor in checkpoint.tensors.items():
        own = names.spellings.get(name)
        if own is None:
            reason = names.drop_reason(name)
            if reason is None:
                wrong.append(f"unknown tensor {name!r} {list(tensor.shape)}")
            else:
                dropped.append((name, reason))
        elif own in found:
            wrong.append(f"doubled tensor: '{found[own].name}' and '{name}' are the same")
        else:
            found[own] = tensor
    wrong += [problem for tensor in found.values() if (problem := type_problem(tensor))]
    for own, rule in _expected(names.groups).items():
        if own in found and found[own].shape != rule.shape:
            wrong.append(
                f"mis-shaped tensor '{found[own].name}': found {list(found[own].shape)}, "
                f"expected {list(rule.shape)} from config.json"
            )
        elif own not in found and not checkpoint.incomplete:
            wrong.append(f"missing tensor '{own}' {list(rule.shape)}")
    raise_problems(
        wrong,
        f"'{checkpoint.location.name}' does not hold the tensors that its config.json asks for",
        "Check the files, or download them again.",
    )
    return Match(found, tuple(dropped))


def type_problem(tensor: SourceTensor) -> str | None:
    """Describes why the type of a tensor cannot be converted; None if it can."""
    if tensor.dtype in ELEMENT_BYTES:
        return None
    return f"'{tensor.name}' in '{tensor.path.name}' has type {tensor.dtype}; expected {', '.join(ELEMENT_BYTES)}"


def _expected(groups: Iterable[TensorGroup]) -> dict[str, TensorRule]:
    """The rules of the tensors that the checkpoint must hold, by the tables' spelling."""
    return {group.prefixes[0] + rule.source: rule for group in groups for rule in group.rules if rule.values is None}


def raise_problems(problems: Collection[str], heading: str, advice: str) -> None:
    """Raises one CheckpointError that lists the first twenty problems and counts the others; does nothing without
    problems."""
    if not problems:
        return
    lines = list(dict.fromkeys(problems))
    more = [f"... and {len(lines) - SHOWN_PROBLEMS} more"] if len(lines) > SHOWN_PROBLEMS else []
    shown = "\n".join(f"  - {line}" for line in lines[:SHOWN_PROBLEMS] + more)
    raise CheckpointError(f"{heading}:\n{shown}\nNothing was written. {advice}")
