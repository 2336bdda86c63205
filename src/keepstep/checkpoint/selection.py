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


def choose(request: str, candidates: Sequence[Candidate]) -> Choice:
    """What `resume_from_checkpoint` asks for.

    Args:
        request: `auto` for the newest valid checkpoint, else the start of the run; `never` for the
            start of a run that has no checkpoint.
        candidates: the run's committed checkpoints, in any order.

    Raises:
        SelectionError: with `auto`, checkpoints exist and none is valid: starting from zero would
            hide that. With `never`, checkpoints exist: a new run would mix with the old one.
    """
    if request == "never" and candidates:
        raise SelectionError(
            f"resume_from_checkpoint: never, and the run folder holds {len(candidates)} "
            "checkpoints\n    Hint: choose another output_dir, or move the folder away."
        )
    passed_by: dict[int, str] = {}
    for candidate in sorted(candidates, key=lambda c: c.step, reverse=True):
        if not candidate.faults:
            return Choice(candidate.step, passed_by)
        passed_by[candidate.step] = "; ".join(candidate.faults)
    if passed_by:
        listing = "\n".join(f"  checkpoint-{step}: {why}" for step, why in passed_by.items())
        raise SelectionError(
            f"{len(passed_by)} checkpoints exist and none is valid:\n{listing}\n"
            "    Hint: restore one of them, or choose another output_dir to start again."
        )
    return Choice(None, passed_by)
