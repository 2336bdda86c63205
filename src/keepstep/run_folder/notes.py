"""What of a run's own files, beside the checkpoints, cannot be believed. It costs no checkpoint."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

from keepstep.output.units import be, counted
from keepstep.run_folder.evaluations import EVALUATIONS_NAME, fault_of_evaluations
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.safe_read import ABSENT, OddFileError, read_object


def notes_on(run: RunFolder) -> dict[str, str]:
    """Files of the run's private folder that are passed by: name → why."""

    def pins() -> None:
        if os.path.lexists(run.pins) and not stat.S_ISDIR(os.lstat(run.pins).st_mode):
            raise OddFileError("it is no folder: nothing is pinned")
        run.pinned()

    def events() -> None:
        fault = fault_of_log(run)
        if fault is not None:
            raise OddFileError(fault)

    looks: dict[Path, Callable[[], object]] = {
        run.identity: lambda: read_object(run.identity),
        run.owner_file: run.owner_words,
        run.pins: pins,
        run.events: events,
        run.target: lambda: read_object(run.target),
    }
    found = {}
    for path, look in looks.items():
        try:
            look()
        except ABSENT:
            continue
        except (OSError, OddFileError) as error:
            found[path.relative_to(run.path).as_posix()] = str(error)
    for checkpoint in run.checkpoints():
        fault = fault_of_evaluations(checkpoint.path, checkpoint.manifest)
        if fault is not None:
            found[f"{checkpoint.path.name}/{EVALUATIONS_NAME}"] = fault
    return found


def fault_of_log(run: RunFolder) -> str | None:
    """What of events.jsonl cannot be believed; None: nothing.

    Raises:
        OddFileError, OSError: it cannot be read at all.
    """
    events, damaged = run.events_read()
    if not damaged:
        return None
    lines = counted(len(events) + damaged, "line")
    return f"{damaged} of {lines} {be(damaged)} damaged, and passed by"
