"""What a folder is that no run has used: said as it is, so that a person finds the right one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from keepstep.output.printable import first_few, quoted
from keepstep.policy.manifest import MANIFEST_NAME, step_of
from keepstep.run_folder.paths import PRIVATE
from keepstep.run_folder.reader import RunFolder

OF_TRAINER = "trainer_state.json"


class WhyNoRun(NamedTuple):
    """Why a folder is no run's: `what` it is, as a sentence goes on behind its name, and a hint."""

    what: str
    hint: str


def why_no_run(run: RunFolder) -> WhyNoRun | None:
    """None: it is a run's, or was."""
    if run.private.is_dir() or run.checkpoints(any_run=True) or run.unreadable():
        return None
    here = run.path
    if (here / MANIFEST_NAME).is_file():
        return WhyNoRun(
            "is one checkpoint, as `keepstep fetch` brings one, and no run",
            f"keepstep verify {quoted(here)}, keepstep export {quoted(here)} --to DIR",
        )
    within = next((above for above in here.resolve().parents if (above / PRIVATE).is_dir()), None)
    if within is not None:
        return WhyNoRun("lies in a run's folder, and is no run", f"name the run: {quoted(within)}")
    folders = sorted(run.folders(), key=lambda name: step_of(name) or 0)
    if folders:
        stock = [name for name in folders if (here / name / OF_TRAINER).is_file()]
        if stock:
            return WhyNoRun(
                f"is no run of keepstep: a stock Trainer has written {first_few(stock)}",
                adopting(here / stock[-1]),
            )
        return WhyNoRun(
            f"is no run of keepstep, which has not written {first_few(folders)}",
            "name the output_dir of a run",
        )
    try:
        below = sorted(entry.name for entry in os.scandir(here) if _is_run(entry))
    except OSError:
        below = []
    if below:
        return WhyNoRun(
            f"is a folder of runs: {first_few(below)}", f"name one: {quoted(here / below[0])}"
        )
    if not any(here.iterdir()):
        return WhyNoRun("is empty: no run has begun there", "launch a run with that output_dir")
    return WhyNoRun("holds nothing of a run", "name the output_dir of a run")


def adopting(checkpoint: Path) -> str:
    """The command that takes in what a stock Trainer has written."""
    return f"keepstep adopt {quoted(checkpoint)} --into NEW_RUN"


def _is_run(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False) and (Path(entry.path) / PRIVATE).is_dir()
