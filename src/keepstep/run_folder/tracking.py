"""`.keepstep/trackers.json`: what trackers (`report_to`) have been given of a run."""

from __future__ import annotations

from keepstep.policy.strict import TextError
from keepstep.policy.tracking import Tracked, read_tracked
from keepstep.run_folder.paths import RunPaths
from keepstep.run_folder.safe_read import ABSENT, SMALL, OddFileError, read_text
from keepstep.run_folder.storage import Storage


def tracked_of(run: RunPaths) -> Tracked:
    """What there is of it; what cannot be believed is not there.

    Raises:
        OSError: it cannot be read now.
    """
    try:
        return read_tracked(read_text(run.trackers, SMALL))
    except (*ABSENT, OddFileError, TextError):
        return Tracked()


def show_tracked(run: RunPaths, storage: Storage, tracked: Tracked) -> None:
    """In one step. It is not synced, for no step is to wait for a disk; nor is what trackers hold
    themselves."""
    storage.show(run.trackers, tracked.as_text())
