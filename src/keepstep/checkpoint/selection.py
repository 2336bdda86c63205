"""Which checkpoint a resume takes, and why not the others. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


class SelectionError(LookupError):
    """What was asked for cannot be had; the message lists what exists."""


@dataclass(frozen=True)
class Candidate:
    """One committed checkpoint as a resume sees it; `faults` is empty when it is valid."""

    step: int
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class Choice:
    """The step to resume from (None: start from the beginning), and why others were passed by."""

    step: int | None
    passed_by: Mapping[int, str]


def choose_newest_valid(candidates: Sequence[Candidate]) -> Choice:
    """`auto`: the newest valid checkpoint, else the start of the run.

    Raises:
        SelectionError: checkpoints exist and none is valid; starting from zero would hide that.
    """
    passed_by: dict[int, str] = {}
    for candidate in sorted(candidates, key=lambda c: c.step, reverse=True):
        if not candidate.faults:
            return Choice(candidate.step, passed_by)
        passed_by[candidate.step] = "; ".join(candidate.faults)
    if passed_by:
        listing = "\n".join(f"  checkpoint-{step}: {why}" for step, why in passed_by.items())
        raise SelectionError(
            f"{len(passed_by)} checkpoints exist and none is valid:\n{listing}\n"
            "Hint: repair one, or set resume_from_checkpoint: never to start again."
        )
    return Choice(None, passed_by)
