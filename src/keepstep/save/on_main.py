"""What the main process does about a save: stages, describes, tells what came of it, prunes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from keepstep.policy.manifest import Manifest
from keepstep.policy.save_states import SaveState
from keepstep.ranks import collectives
from keepstep.run_folder.ownership import NotOwnerError
from keepstep.run_folder.reader import Checkpoint
from keepstep.run_folder.writer import RunWriter, Saved
from keepstep.save.failure import Cause, in_words
from keepstep.save.in_flight import Flight
from keepstep.save.rank_part import Report

logger = logging.getLogger(__name__)


class Draft:
    """Main process: what is to be said of a save, once every part is written; worked out once."""

    def __init__(self, describe: Callable[[list[Report]], tuple[Manifest, dict[str, Any]]]) -> None:
        self._describe = describe
        self._known: tuple[Manifest, dict[str, Any]] | None = None

    def of(self, reports: list[Report]) -> tuple[Manifest, dict[str, Any]]:
        """The manifest of all parts, and what the log is to tell."""
        self._known = self._known or self._describe(reports)
        return self._known


def not_saved(step: int) -> str:
    return f"checkpoint-{step} was not saved"


def stage(writer: RunWriter, step: int) -> tuple[Path, Path]:
    """Main process: a folder for the checkpoint, and one for the ranks' reports."""
    try:
        return writer.stage(step), writer.reports(step)
    except OSError as error:
        writer.record("save_failed", step=step, reason=str(Cause.of(error, collectives.rank())))
        raise


def outcome(
    writer: RunWriter, flight: Flight, failures: list[Cause], stuck: bool
) -> tuple[SaveState, Saved | None, list[Cause]]:
    """Main process: where the save stands; the commit; or, once, why there is none."""
    known = flight.state
    if failures:
        flight.cancel(failures)
    if flight.running:
        flight.wait()
    else:
        flight.finish()
    flight.close()
    state = flight.state  # its thread may be at work, and bring it on
    if state is SaveState.OVERDUE and known is not SaveState.OVERDUE:
        logger.warning("the commit of checkpoint-%s is slow; it may still arrive", flight.step)
    if not state.is_given_up:
        return state, flight.saved if state is SaveState.COMMITTED else None, []
    at_work, causes = stuck or flight.running, []
    if state is SaveState.FAILING:
        causes = failures or flight.causes
        writer.record("save_failed", step=flight.step, reason=in_words(causes))
    if not at_work:  # else: when they have come back
        try:
            writer.discard(flight.step)
        except NotOwnerError:
            raise
        except OSError as error:
            logger.warning("not all of checkpoint-%s could be removed: %s", flight.step, error)
    flight.told(at_work)
    return flight.state, None, causes


def facts_of(reports: Sequence[Report]) -> dict[str, Any]:
    """See `Saved.facts`."""
    names = ("stall", "wait", "hold", "copy", "write", "digest")
    seconds = {n: round(max(r.seconds.get(n, 0.0) for r in reports), 4) for n in names}
    slowest = max(reports, key=lambda report: report.seconds.get("write", 0.0))
    rate = sum(r.bytes for r in reports) / max(seconds["write"], 1e-9) / 1e9
    return {**seconds, "gb_per_s": round(rate, 3), "slowest_rank": slowest.rank}


def after_commit(writer: RunWriter, checkpoint: Checkpoint, facts: dict[str, Any]) -> Saved:
    """Main process: after a commit the links, then retention, then the links once more.

    The checkpoint is there whatever the disk says here; what cannot be pruned now goes later.
    """
    pruned: list[int] = []
    best: Checkpoint | None = None
    free: int | None = None
    with writer.setbacks.allowed("the links are not set"):
        writer.point()
    with writer.setbacks.allowed("nothing is pruned"):
        pruned = writer.prune()
    with writer.setbacks.allowed("after a save the run folder cannot be looked at"):
        writer.point()
        best = writer.best()
        if best is not None and best.path == checkpoint.path:
            best = checkpoint  # the same object: ranks are told its thousands of files once
        free = writer.storage.free(writer.run.path)
    return Saved(checkpoint, best, pruned, facts, free)
