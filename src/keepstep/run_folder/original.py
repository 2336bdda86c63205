"""Whether a run folder is a copy of another one, which is still there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from keepstep.policy.lineage import Attempt
from keepstep.policy.selection import SelectionError
from keepstep.run_folder.launched import launched_of
from keepstep.run_folder.paths import RunPaths
from keepstep.run_folder.reader import RunFolder


def original_of(run: RunPaths, attempts: Sequence[Attempt]) -> Path | None:
    """The folder in which the newest attempt that has committed was launched, if that is another
    one and holds this run, too. None: it is this one; or it is gone (the run was moved), or not on
    this machine; or nothing tells.
    """
    launched = launched_of(run)
    known = [a.number for a in attempts if a.commits and a.number in launched]
    if not known:
        return None
    then = launched[known[-1]]
    place = Path(then.directory, str(then.recipe.get("output_dir", "")))
    try:
        if os.path.samefile(place, run.path):
            return None
        same = RunFolder(place).run_id() == RunFolder(run.path).run_id()
    except (OSError, ValueError, SelectionError):
        return None
    return place if same else None
