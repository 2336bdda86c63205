"""An attempt in a run folder: start, choose, stage, commit, end. One process: the main one.

The order of the disk operations is the promise: at every instant a valid checkpoint is there, and
nothing is removed before its successor is durable.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keepstep.policy.completeness import differences
from keepstep.policy.manifest import (
    BOUNDS,
    MANIFEST_NAME,
    Manifest,
    ManifestError,
    folder_name,
    step_of,
)
from keepstep.policy.retention import Policy
from keepstep.policy.samples import Sample, lines_of
from keepstep.policy.selection import WORDS, Choice, SelectionError, UnreadableError, Verify, choose
from keepstep.run_folder.contents import sizes_of
from keepstep.run_folder.keeping import Keeper, now, without_secrets_of_this
from keepstep.run_folder.kinds import adopting
from keepstep.run_folder.launched import Launched, path_of
from keepstep.run_folder.notes import notes_on
from keepstep.run_folder.progress import unheard
from keepstep.run_folder.reader import Checkpoint, RunFolder, read_checkpoint
from keepstep.run_folder.safe_read import OddFileError, read_text
from keepstep.run_folder.storage import NotOwnerError, Storage
from keepstep.run_folder.trash import in_the_way

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """A commit, as every rank hears of it.

    Attributes:
        checkpoint: what was committed.
        best: the best checkpoint now.
        pruned: the steps that went for it.
        free: bytes left on the disk; None: not known.
        facts: `stall`, `wait` (for the save before) and `hold` (ahead of the optimizer step, for
            the copy), both part of the stall, `copy`, `write` and `digest` (part of the write), in
            seconds, of the slowest rank each; `slowest_rank` to
            write; `gb_per_s`: of all ranks together; `read_back`: seconds to check the files that
            several ranks wrote, and to take in those that libraries wrote.
    """

    checkpoint: Checkpoint
    best: Checkpoint | None
    pruned: list[int]
    facts: dict[str, Any]
    free: int | None = None


class RunWriter(Keeper):
    """Makes an attempt's checkpoints. Raises OSError as the disk does.

    Attributes:
        min_free: bytes that a save is to leave on the disk.
        staging: its own part of that folder, as `trash` is one.
        asked: what its resume asked for, as the log holds it.
    """

    def __init__(
        self, run: RunFolder, policy: Policy, storage: Storage, owner: str | None = None
    ) -> None:
        super().__init__(run, policy, storage, owner)
        self.staging = run.staging / self.owner
        self.min_free = 0
        self.asked: str | None = None

    def start(self, **facts: Any) -> None:
        """Begin an attempt: sweep what a killed one left behind, and set the links right.

        `facts` go into events.jsonl.
        """
        self.attempt = min(self.attempt + 1, int(BOUNDS["attempt"][1]))  # a manifest must hold it
        self.storage.make_folder(self.run.private)
        self.trash.sweep()
        for place in (self.staging, self.trash.folder):
            with self.setbacks.allowed(f"{place.parent.name} has no folder yet"):  # a full disk
                self.storage.make_folder(place)
        self.identify()
        # Requests were meant for an earlier attempt; but those of a job for all that it makes.
        meant = {self.owner, ""} if "job" in facts else {self.owner}
        for name in self.run.requests():
            if self._meant_for(name) not in meant:
                self.storage.remove(self.run.request(name))
        self.storage.remove(self.run.status)  # it told how the attempt before this one ended
        self.record("attempt", run_id=self.run_id, **facts)
        heard = unheard(self.run, self.attempt)
        if heard is not None:
            self.record("heard", **heard)
        for name, note in notes_on(self.run).items():
            logger.warning("%s: %s", name, note)
        self.point()

    def keep_launched(self, launched: Launched) -> None:
        """Write down what this attempt was launched as; a full disk may cost no more than that."""
        with self.setbacks.allowed("what this attempt was launched as is not written down"):
            self.storage.make_folder(self.run.launched)
            path = path_of(self.run, self.attempt)
            self.storage.replace(path, launched.as_text().encode() + b"\n")

    def select(
        self,
        request: str,
        verify: Verify,
        patience: int,
        weights_only: bool = False,
        recipe: str | None = None,
        takeable: Collection[int] | None = None,
    ) -> tuple[Checkpoint | None, Choice]:
        """Choose the checkpoint to resume from; put damaged ones that were passed by aside.

        `recipe`: a digest of what is asked for, else; attempts of another one have proved nothing.
        `takeable`: the steps that can be had on every machine; None: all that are here.

        Raises:
            SelectionError: `request` cannot be had.
            UnreadableError: it cannot be read now.
        """
        own = self._own_step(request)
        situation = self.run.situation(
            *(request, self.policy, verify, patience, weights_only, recipe), takeable=takeable
        )
        if not (own or request in WORDS or request.isdecimal() or situation.under_way):
            return _read_foreign(Path(request)), Choice(None)
        choice = choose(own or request, situation)
        strangers = self.run.strangers()
        invalid = {folder_name(step): reason for step, reason in choice.invalid.items()}
        for name, reason in (self.run.lost_manifests() | invalid).items():
            if name not in strangers:
                self.quarantine(name, reason)
        for name, reason in self.run.in_the_way().items():
            if (step_of(name) or 0) > (choice.step or 0):
                logger.warning(
                    "%s is not touched, and in the way of that step's save: %s\n"
                    "    Hint: move it away; else that save is made a step later.",
                    *(name, reason),
                )
        self.point()
        return None if choice.step is None else self.run.checkpoint(choice.step), choice

    def stage(self, step: int) -> Path:
        """An empty staging folder for the checkpoint of `step`, and one for its reports.

        Raises:
            FileExistsError: the name that the checkpoint is to have belongs to a stranger.
        """
        self._see_to_the_way(step)
        self.discard(step)
        self._leave_room()
        folder = self.staging / folder_name(step)
        for place in (self.reports(step), folder):
            self.storage.make_folder(place)
        return folder

    def reports(self, step: int) -> Path:
        """The folder in which the ranks say that their parts of a staged checkpoint are written."""
        return self.staging / f"{folder_name(step)}-reports"

    def commit(self, manifest: Manifest, **facts: Any) -> Checkpoint:
        """Make the staged folder of `manifest` a checkpoint: the manifest first, then one rename.

        `facts` go into events.jsonl, beside what the manifest says.

        Raises:
            OSError: of the disk.
            ManifestError: the folder does not hold what the manifest says.
        """
        started = time.perf_counter()
        staged = self.staging / folder_name(manifest.global_step)
        self._seal(staged, manifest)
        target = self.run.path / staged.name
        replaced = self._put(staged, target, manifest)
        self.record(
            "commit",
            step=manifest.global_step,
            bytes=manifest.total_bytes,
            metrics=manifest.metrics,
            parent=manifest.parent,  # and the request: lineage does not hang on one line
            request=self.asked,
            commit=round(time.perf_counter() - started, 4),
            **facts,
        )
        self.parent = None  # the branch has a checkpoint of its own
        # It is saved, whatever happens from here on.
        self._settle(replaced, manifest.global_step)
        with self.setbacks.allowed(f"the reports of {target.name} are not removed"):
            self.storage.remove(self.reports(manifest.global_step), aside=True)
        return Checkpoint(target, manifest)

    def sealed(self, staged: Path, manifest: Manifest) -> Checkpoint:
        """A staged folder with its manifest, durable.

        Raises:
            OSError: of the disk.
            ManifestError: the folder does not hold what the manifest says.
        """
        self._seal(staged, manifest)
        return Checkpoint(staged, manifest)

    def put_in_place(self, brought: Checkpoint) -> None:
        """A checkpoint that was brought from elsewhere, in the place of what is there of its step.

        Raises:
            OSError: of the disk.
        """
        target = self.run.path / brought.path.name
        self._settle(self._put(brought.path, target, brought.manifest), brought.step)

    def _put(self, staged: Path, target: Path, manifest: Manifest) -> Path | None:
        """The commit itself; returns what has made way for it. Where it fails, that comes back."""
        replaced = self.trash.make_way(target)
        try:
            self.storage.rename(staged, target)
        except NotOwnerError:
            raise
        except OSError as error:
            if not _stands(target, manifest):
                if replaced is not None:
                    with self.setbacks.allowed(f"{target.name} is not back in its place"):
                        self.trash.settle(replaced)
                raise
            logger.warning("%s stands, but its folder could not be synced: %s", target.name, error)
        return replaced

    def _settle(self, replaced: Path | None, step: int) -> None:
        """Remove what had been there of a step, unless somebody has pinned it."""
        with self.setbacks.allowed(f"what had been {folder_name(step)} is not removed"):
            if replaced is not None:
                self.trash.settle(replaced)
                if replaced.exists():
                    self._empty(replaced, step, "replaced")

    def _seal(self, staged: Path, manifest: Manifest) -> None:
        """Write the manifest into a staged folder that holds what it says, durably."""
        missing = differences(manifest, sizes_of(staged, manifest.files))
        if missing:
            raise ManifestError(
                f"the staged checkpoint is incomplete: {'; '.join(missing)}",
                step=manifest.global_step,
                path=staged,
            )
        text = manifest.to_json()
        Manifest.from_json(text)  # what could not be read again must not be committed
        self.storage.write(staged / MANIFEST_NAME, text.encode())
        above = {name.rpartition("/")[0] for name in manifest.files}
        for folder in sorted({staged, *(staged / name for name in above)}):
            self.storage.sync_folder(folder)

    def discard(self, step: int) -> None:
        """Remove the staging folder of a checkpoint that will not be committed, and its reports."""
        for place in (self.staging / folder_name(step), self.reports(step)):
            if place.exists():
                self.storage.remove(place, aside=True)

    def _leave_room(self) -> None:
        """
        Raises:
            OSError: one more checkpoint, as large as the newest, would take `min_free`.
        """
        if not self.min_free:
            return
        newest, free = self.run.checkpoints()[-1:], self.storage.free(self.run.path)
        size = newest[0].manifest.total_bytes if newest else 0
        if free < size + self.min_free:
            raise OSError(
                errno.ENOSPC,
                f"{free / 1e9:.3g} GB are free, a checkpoint takes {size / 1e9:.3g} GB, and "
                f"min_free_bytes keeps {self.min_free / 1e9:.3g} GB",
            )

    def steps(self) -> list[int]:
        """Of the checkpoints that are there."""
        return [checkpoint.step for checkpoint in self.run.checkpoints()]

    def is_taken(self, step: int) -> bool:
        """Whether the name of the checkpoint of `step` belongs to something else."""
        target = self.run.path / folder_name(step)
        return os.path.lexists(target) and target.name in self.run.in_the_way()

    def _see_to_the_way(self, step: int) -> None:
        """Set aside what was a checkpoint of this run, and stop at what was not."""
        target = self.run.path / folder_name(step)
        if target.name in {checkpoint.path.name for checkpoint in self.run.checkpoints()}:
            return
        broken = self.run.damaged() | self.run.lost_manifests()
        if target.name in broken:
            self.quarantine(target.name, broken[target.name])
        if os.path.lexists(target):
            raise in_the_way(target)

    def record_resume(
        self,
        request: str,
        weights_only: bool,
        chosen: Checkpoint | None,
        choice: Choice,
        recipe: str | None = None,
    ) -> None:
        """Write down what this attempt grows from."""
        step = chosen.step if chosen and not choice.weights_only else None
        self.parent = step
        passed_by = {str(step): why for step, why in choice.passed_by.items()}
        self.asked, *others = self.run.names_of(request, weights_only)
        written = (
            {} if request in WORDS or request.isdecimal() else {"path": [self.asked, *others][-1]}
        )
        facts = {"step": step, "passed_by": passed_by, "recipe": recipe}
        self.record("resume", request=self.asked, **written, **facts)

    def record_samples(self, samples: Sequence[Sample]) -> None:
        """Add completions to samples.jsonl. A full disk may cost them, and nothing else."""
        lines = lines_of(samples, self.attempt, now())
        with self.setbacks.allowed(f"{self.run.samples_file.name} lacks some samples"):
            self.storage.append_line(self.run.samples_file, "\n".join(lines))

    def record_finish(self, step: int, plan: dict[str, Any]) -> None:
        """Write down that the run is finished: there may be no checkpoint of its last step."""
        alive = [r.step for r in self.run.records(None) if not r.abandoned]
        self.record("finished", step=step, newest=max(alive, default=None), plan=plan)

    def end(self, status: dict[str, Any], **facts: Any) -> None:
        """Say how this attempt ended: status.json for shells, a line in events.jsonl, which has
        the `facts`, too."""
        status = status | {"reason": without_secrets_of_this(status.get("reason"))}
        self.record("end", **status, **facts)
        text = self._without_paths(json.dumps({**status, "owner": self.owner}, indent=1))
        try:
            self.storage.replace(self.run.status, text.encode() + b"\n")
        except NotOwnerError:
            raise
        except OSError as error:
            logger.warning("status.json could not be written: %s", error)

    def _own_step(self, request: str) -> str | None:
        """The step that a path to one of this run's own checkpoints means."""
        path = Path(request).expanduser().resolve()
        step = step_of(path.name)
        return str(step) if step and path.parent == self.run.path.resolve() else None

    def _meant_for(self, name: str) -> str:
        """The attempt that a request names; of what cannot be read nobody knows it."""
        try:
            return read_text(self.run.request(name))
        except (OSError, OddFileError):
            return "nobody"


def _stands(target: Path, manifest: Manifest) -> bool:
    """Whether `target` is this checkpoint, and not what a successor of this attempt made of it."""
    try:
        return read_checkpoint(target).manifest.to_json() == manifest.to_json()
    except (ManifestError, UnreadableError):
        return False


def _read_foreign(path: Path) -> Checkpoint:
    path = path.expanduser()
    try:
        return read_checkpoint(path)
    except ManifestError as error:
        hint = ""
        if path.is_dir() and not os.path.lexists(path / MANIFEST_NAME):
            hint = f"\n    Hint: if another trainer wrote it: {adopting(path)}"
        raise SelectionError(f"resume_from_checkpoint: {error}{hint}", path=error.path) from error
