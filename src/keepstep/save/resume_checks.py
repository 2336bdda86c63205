"""Whether this attempt can go on from a checkpoint: its files, its state, rows and settings."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from keepstep.errors import KeepstepError
from keepstep.output.units import counted
from keepstep.policy.batch import Batch, BatchError, Dealt, agree
from keepstep.policy.completeness import missing_state, not_reshardable, of_files, part_of
from keepstep.policy.drift import drift
from keepstep.policy.parallel_layout import ParallelLayout
from keepstep.policy.selection import SelectionError, UnreadableError
from keepstep.ranks import collectives
from keepstep.run_folder.checkpoint import Checkpoint
from keepstep.run_folder.contents import sizes_of
from keepstep.run_folder.safe_read import patiently

ROWS = "rows_per_step"  # the setting that `Batch` decides
Depth = Literal["auto", "digests", "sizes", "off"]


class DriftError(KeepstepError, ValueError):
    """The run's settings are not those that its checkpoint was made with.

    Attributes:
        changed: what has changed, a line each: name, value then, value now.
        step, path: of the checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint, changed: Sequence[str]) -> None:
        names = ", ".join(line.split(":")[0] for line in changed)
        listing = "\n".join(f"    {line}" for line in changed)
        super().__init__(
            f"settings have changed since {checkpoint.path.name} was made:\n{listing}\n"
            f"    Hint: set them back, or accept by name: allow_drift: [{names}]",
            step=checkpoint.step,
            path=checkpoint.path,
        )
        self.changed = tuple(changed)


@dataclass(frozen=True)
class Resume:
    """How a resume is to be done.

    Attributes:
        request: auto, latest, best, never, a step, or a checkpoint's path.
        settings: what determines the trajectory, as this attempt has it.
        allow_drift: names of settings that may differ from the checkpoint's.
        verify: how the files are compared with the manifest before anything is loaded.
        patience: how often a checkpoint may be resumed without progress.
        weights_only: take the weights and start at step 0 with a new optimizer.
        batch: how the recipe shares out the rows of a step among this attempt's processes.
        allow_batch_change: accept other rows a step where those processes cannot share them out.
        parallel_layout: how many processes this attempt has, and how they share state out.
        rigid: why this attempt can only resume what was written by as many processes with the
            same stage; None: any.
        recipe: a digest of all that was asked for: what an attempt of the same recipe failed at,
            this one will fail at, too.
    """

    request: str = "auto"
    settings: Mapping[str, Any] | None = None
    allow_drift: Sequence[str] = ()
    verify: Depth = "auto"
    patience: int = 3
    weights_only: bool = False
    batch: Batch = field(default_factory=lambda: Batch(1, 1, 1))
    allow_batch_change: bool = False
    parallel_layout: ParallelLayout = field(default_factory=lambda: ParallelLayout(1))
    rigid: str | None = None
    recipe: str | None = None


def check_sight(chosen: Checkpoint | None, depth: Depth) -> None:
    """This rank sees what the main process has verified: those files that are its to load. (All of
    them, on every rank, are millions of requests where there are thousands of ranks.) Ranks: any.
    """
    if chosen is None or depth == "off":
        return
    host = socket.gethostname()
    files = part_of(chosen.manifest, collectives.rank(), collectives.world_size())
    try:
        faults = of_files(files, patiently(lambda: sizes_of(chosen.path, files)))
    except OSError as error:
        raise UnreadableError(
            f"{host} cannot read the checkpoint: {error}",
            step=chosen.step,
            path=chosen.path,
            errno=error.errno,
        ) from error
    if faults:
        raise SelectionError(
            "the checkpoint is not the same for every rank; is output_dir on a filesystem "
            f"that all nodes share? On {host}: {faults[0]}",
            step=chosen.step,
            path=chosen.path,
        )


def check_state(checkpoint: Checkpoint, resume: Resume) -> None:
    manifest, name = checkpoint.manifest, checkpoint.path.name
    missing = missing_state(manifest)
    if missing:
        raise SelectionError(
            f"{name} holds weights, not the state to go on from: it has no {', '.join(missing)}\n"
            "    Hint: resume_weights_only: true starts anew with its weights.",
            step=checkpoint.step,
            path=checkpoint.path,
        )
    reason = resume.rigid or not_reshardable(manifest.files)
    written, here = manifest.parallel_layout, resume.parallel_layout
    if written != here and reason:
        raise SelectionError(
            f"{name} was written by {written}; this attempt has {here}, and {reason}\n"
            f"    Hint: launch {counted(written.world_size, 'process')} with the config that the "
            "run began with.",
            step=checkpoint.step,
            path=checkpoint.path,
        )


def agreed_batch(checkpoint: Checkpoint, resume: Resume) -> Batch:
    """How the rows of a step are shared out from here on; anything else must not have changed."""
    manifest = checkpoint.manifest
    before = None if ROWS in resume.allow_drift else Dealt.from_json(manifest.dealt)
    try:
        batch = agree(before, resume.batch, resume.allow_batch_change)
    except BatchError as error:
        raise SelectionError(
            f"{checkpoint.path.name}: {error}", step=checkpoint.step, path=checkpoint.path
        ) from error
    accepted = [*resume.allow_drift, *([ROWS] if resume.allow_batch_change else [])]
    now = {**(resume.settings or {}), ROWS: batch.rows}
    changed = drift(manifest.settings, now, accepted, manifest.planned_steps)
    if changed:
        raise DriftError(checkpoint, changed)
    return batch
