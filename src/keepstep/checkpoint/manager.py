"""The life of a checkpoint: stage → write → commit → prune → point.

`CheckpointManager` is collective: every rank holds one and calls it at the same step. What it
decides or changes in the run folder, the main process does (`RunWriter`) and the others hear.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from .. import distributed
from ..outcome import Outcome
from .manifest import MANIFEST_NAME, FileEntry, Manifest, ManifestError, differences, folder_name
from .retention import Policy, best_step, plan_retention
from .runfolder import Committed, RunFolder, records_of
from .selection import Choice, choose
from .storage import Storage, sizes_under
from .writer import Part

T = TypeVar("T")


class SaveError(RuntimeError):
    """A checkpoint could not be written; the same error on every rank, naming the culprit."""


@dataclass(frozen=True)
class Saved:
    """A commit, as every rank hears of it: the checkpoint, the best one now, the steps pruned."""

    checkpoint: Committed
    best: Committed | None
    pruned: list[int]


class RunWriter:
    """Changes a run folder. One process of a run holds one: the main process.

    Attributes:
        run: the folder.
        run_id: the run's name, made at its first attempt.
        attempt: this launch, counted from 1.
    """

    def __init__(self, run: RunFolder, policy: Policy, storage: Storage) -> None:
        self.run = run
        self.policy = policy
        self.storage = storage
        self.run_id = run.run_id() or secrets.token_hex(6)
        self.attempt = run.attempts() + 1

    def start(self) -> None:
        """Begin an attempt: sweep what a killed one left behind, and set the links right."""
        self.storage.make_folder(self.run.private)
        for leftover in (self.run.staging, self.run.trash):
            if leftover.exists():
                self.storage.remove(leftover)
            self.storage.make_folder(leftover)
        identity = {"run_id": self.run_id, "policy": vars(self.policy)}
        self.storage.remove(self.run.status)  # it told how the attempt before this one ended
        self.storage.replace(self.run.identity, json.dumps(identity, indent=1).encode() + b"\n")
        self.record("attempt")
        # Nothing is pruned here: the newest checkpoint has not been verified yet, and only a valid
        # newest one may displace older ones. The next commit prunes.
        self.point()

    def stage(self, step: int) -> Path:
        """An empty staging folder for the checkpoint of `step`."""
        folder = self.run.staging / folder_name(step)
        if folder.exists():
            self.storage.remove(folder)
        self.storage.make_folder(folder)
        return folder

    def commit(self, manifest: Manifest) -> Committed:
        """Make the staged folder of `manifest` a checkpoint: the manifest first, then one rename.

        Raises:
            OSError: of the disk.
            ManifestError: the folder does not hold what the manifest says.
        """
        staged = self.run.staging / folder_name(manifest.global_step)
        missing = differences(manifest, sizes_under(staged))
        if missing:
            raise ManifestError(f"the staged checkpoint is incomplete: {'; '.join(missing)}")
        self.storage.write(staged / MANIFEST_NAME, manifest.to_json().encode())
        for folder in sorted({staged, *((staged / name).parent for name in manifest.files)}):
            self.storage.sync_folder(folder)
        target = self.run.path / staged.name
        if target.exists():  # an invalid one that the resume passed by
            self.storage.rename(target, self.run.trash / f"{target.name}-replaced")
        self.storage.rename(staged, target)
        self.record(
            "commit",
            step=manifest.global_step,
            bytes=manifest.total_bytes,
            seconds=manifest.save_seconds,
        )
        return Committed(target, manifest)

    def discard(self, step: int, reason: str) -> None:
        """Remove a staging folder that will not be committed."""
        self.storage.remove(self.run.staging / folder_name(step))
        self.record("save_failed", step=step, reason=reason)

    def prune(self) -> list[int]:
        """Apply the retention plan; returns the steps that went. First renamed, then removed."""
        checkpoints = {c.step: c for c in self.run.checkpoints()}
        plan = plan_retention(records_of(list(checkpoints.values()), self.policy), self.policy)
        gone = [decision.step for decision in plan if not decision.keep]
        for step in gone:
            discarded = self.run.trash / folder_name(step)
            self.storage.rename(checkpoints[step].path, discarded)
            self.storage.remove(discarded)
            self.record("prune", step=step)
        return gone

    def best(self) -> Committed | None:
        """The committed checkpoint with the best metric, None when none has one."""
        checkpoints = self.run.checkpoints()
        step = best_step(records_of(checkpoints, self.policy), self.policy)
        return next((c for c in checkpoints if c.step == step), None)

    def point(self) -> None:
        """Set the links `latest` and `best`: hints for people; the truth is in the manifests."""
        checkpoints = self.run.checkpoints()
        targets = {"latest": checkpoints[-1] if checkpoints else None, "best": self.best()}
        for name, checkpoint in targets.items():
            link = self.run.path / name
            if link.exists() and not link.is_symlink():
                continue  # a user's own file
            if checkpoint is not None:
                self.storage.point(link, checkpoint.path.name)
            elif link.is_symlink():
                self.storage.remove(link)

    def record(self, event: str, **facts: Any) -> None:
        """Add one line to events.jsonl."""
        line = {"time": now(), "attempt": self.attempt, "event": event, **facts}
        self.storage.append_line(self.run.events, json.dumps(line))

    def end(self, status: dict[str, Any]) -> None:
        """Say how this attempt ended: status.json for shells, a line in events.jsonl."""
        self.storage.replace(self.run.status, json.dumps(status, indent=1).encode() + b"\n")
        self.record("end", **status)


class CheckpointManager:
    """One attempt's checkpoints. Ranks: all call each method, at the same step (collective)."""

    def __init__(self, output_dir: str, policy: Policy, storage: Storage | None = None) -> None:
        self.run = RunFolder(output_dir)
        self.storage = storage or Storage()
        self.policy = policy
        self._writer: RunWriter | None = None
        self._parent: int | None = None
        self.attempt = 0

    def start(self) -> None:
        """Begin an attempt. Ranks: all (collective)."""

        def begin() -> int:
            self._writer = RunWriter(self.run, self.policy, self.storage)
            self._writer.start()
            return self._writer.attempt

        self.attempt = distributed.on_main_process("starting the attempt", begin)

    def choose(self, request: str) -> tuple[Committed | None, Choice]:
        """The checkpoint to resume from, None to start from the beginning. Ranks: all (collective).

        Raises:
            SelectionError: what `request` asks for cannot be had.
        """

        def decide() -> tuple[Committed | None, Choice]:
            choice = choose(request, self.run.candidates())
            chosen = next((c for c in self.run.checkpoints() if c.step == choice.step), None)
            self.writer.record("resume", step=choice.step, passed_by=dict(choice.passed_by))
            return chosen, choice

        chosen, choice = distributed.on_main_process("choosing the checkpoint", decide)
        self._parent = choice.step
        return chosen, choice

    def save(self, manifest: Manifest, write: Callable[[Part], None]) -> Saved:
        """Stage, write and commit one checkpoint, then prune. Ranks: all (collective).

        Args:
            manifest: what is known of this step; run, attempt, parent, files, times are filled in.
            write: stores this rank's files through the given `Part`; it may be collective.

        Raises:
            SaveError: on every rank, when one of them could not write. Nothing of it is left.
        """
        started = time.perf_counter()
        step = manifest.global_step
        staged = self._on_main("staging", lambda writer: writer.stage(step))
        part = Part(staged, distributed.rank(), self.storage)
        write(part)
        parts = distributed.gather((part.files, _describe(part.error)))
        try:
            failures = [f"rank {r}: {error}" for r, (_, error) in enumerate(parts) if error]
            if failures:
                raise SaveError("; ".join(failures))
            files = [of_rank for of_rank, _ in parts]
            return self._on_main(
                "committing", lambda w: self._finish(w, part, manifest, files, started)
            )
        except SaveError as error:
            reason = str(error)
            self._on_main("cleaning up", lambda writer: writer.discard(step, reason))
            raise SaveError(f"checkpoint-{step} was not saved: {reason}") from error

    def best(self) -> Committed | None:
        """The best committed checkpoint. Ranks: all (collective)."""
        return self._on_main("looking up the best checkpoint", lambda writer: writer.best())

    def end(self, outcome: Outcome) -> None:
        """Write how the attempt ended, for shells and for the record. Ranks: all (collective)."""
        self._on_main("writing the outcome", lambda writer: writer.end(outcome.as_json()))
        if distributed.is_main():
            outcome.tell_shell()

    @property
    def writer(self) -> RunWriter:
        """The main process's writer."""
        if self._writer is None:
            raise RuntimeError("start() was not called, or this is not the main process")
        return self._writer

    def _on_main(self, what: str, action: Callable[[RunWriter], T]) -> T:
        try:
            return distributed.on_main_process(what, lambda: action(self.writer))
        except (OSError, ManifestError, distributed.RankError) as error:
            raise SaveError(f"{what}: {error}") from error

    def _finish(
        self,
        writer: RunWriter,
        part: Part,
        manifest: Manifest,
        files: Sequence[dict[str, FileEntry]],
        started: float,
    ) -> Saved:
        """Main process: every rank's part is written. Commit them, apply retention."""
        claimed = {name: entry for of_rank in files for name, entry in of_rank.items()}
        part.adopt_unclaimed(set(claimed))
        if part.error:
            raise part.error
        manifest = replace(
            manifest,
            run_id=writer.run_id,
            attempt=writer.attempt,
            parent=self._parent,
            saved_at=now(),
            save_seconds=round(time.perf_counter() - started, 3),
            files={**claimed, **part.files},
        )
        checkpoint = writer.commit(manifest)
        writer.point()
        pruned = writer.prune()
        writer.point()
        return Saved(checkpoint, writer.best(), pruned)


def _describe(error: Exception | None) -> str | None:
    return f"{type(error).__name__}: {error}" if error else None


def now() -> str:
    """UTC, ISO 8601, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
