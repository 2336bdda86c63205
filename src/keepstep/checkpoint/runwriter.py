"""Changes a run folder: stage, commit, prune, quarantine, point. One process: the main one.

The order of the disk operations is the promise: at every instant a valid checkpoint is there, and
nothing is removed before its successor is durable.
"""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .manifest import MANIFEST_NAME, Manifest, ManifestError, differences, folder_name, step_of
from .retention import Policy, best_step, plan_retention
from .runfolder import Committed, RunFolder, read_checkpoint
from .selection import WORDS, Choice, SelectionError, Verify, choose
from .storage import Storage, sizes_of


class RunWriter:
    """Changes a run folder. Raises OSError as the disk does.

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
        self.attempt = max((attempt.number for attempt in run.attempts()), default=0) + 1

    def start(self) -> None:
        """Begin an attempt: sweep what a killed one left behind, and set the links right."""
        self.storage.make_folder(self.run.private)
        identity = {"run_id": self.run_id, "policy": asdict(self.policy)}
        self.storage.replace(self.run.identity, _json(identity))
        for leftover in (self.run.staging, self.run.trash):
            if leftover.exists():
                self.storage.remove(leftover)
            self.storage.make_folder(leftover)
        self.storage.remove(self.run.status)  # it told how the attempt before this one ended
        self.record("attempt")
        # Nothing is pruned here: the newest checkpoint has not been verified yet, and only a valid
        # newest one may displace older ones. The next commit prunes.
        self.point()

    def select(
        self, request: str, verify: Verify, patience: int
    ) -> tuple[Committed | None, Choice]:
        """Choose the checkpoint to resume from; put damaged ones that were passed by aside.

        Raises:
            SelectionError: `request` cannot be had.
        """
        own = self._own_step(request)
        situation = self.run.situation(_stored(request, self.run), self.policy, verify, patience)
        if not (own or request in WORDS or request.isdecimal() or situation.under_way):
            return _read_foreign(Path(request)), Choice(None)
        choice = choose(own or request, situation)
        strangers = self.run.strangers()
        for step, reason in choice.invalid.items():
            if folder_name(step) not in strangers:
                self.quarantine(step, reason)
        self.point()
        return None if choice.step is None else self.run.checkpoint(choice.step), choice

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
        missing = differences(manifest, sizes_of(staged, manifest.files))
        if missing:
            raise ManifestError(f"the staged checkpoint is incomplete: {'; '.join(missing)}")
        self.storage.write(staged / MANIFEST_NAME, manifest.to_json().encode())
        for folder in sorted({staged, *((staged / name).parent for name in manifest.files)}):
            self.storage.sync_folder(folder)
        target = self.run.path / staged.name
        if os.path.lexists(target):  # of a branch that this attempt went back from
            if target.name not in {c.path.name for c in self.run.checkpoints()}:
                raise ManifestError(f"{target.name} is in the way, and is not this run's")
            self._discard(target, "replaced")
        self.storage.rename(staged, target)
        self.record(
            "commit",
            step=manifest.global_step,
            bytes=manifest.total_bytes,
            seconds=manifest.save_seconds,
            metrics=manifest.metrics,
        )
        return Committed(target, manifest)

    def discard(self, step: int, reason: str) -> None:
        """Remove a staging folder that will not be committed."""
        folder = self.run.staging / folder_name(step)
        if folder.exists():
            self.storage.remove(folder)
        self.record("save_failed", step=step, reason=reason)

    def prune(self, keep_abandoned: bool = True) -> list[int]:
        """Apply the retention plan; returns the steps that went. First renamed, then removed."""
        plan = plan_retention(self.run.records(self.policy.metric), self.policy, keep_abandoned)
        gone = [decision for decision in plan if not decision.keep]
        for decision in gone:
            self._discard(self.run.path / folder_name(decision.step), decision.reason)
        return [decision.step for decision in gone]

    def quarantine(self, step: int, reason: str) -> None:
        """Set a damaged checkpoint aside, with the reason beside it. It is never deleted."""
        self.storage.make_folder(self.run.quarantine)
        name = f"{folder_name(step)}-attempt-{self.attempt}"
        self.storage.write(self.run.quarantine / f"{name}.txt", f"{reason}\n".encode())
        self.storage.rename(self.run.path / folder_name(step), self.run.quarantine / name)
        self.record("quarantine", step=step, reason=reason)

    def best(self) -> Committed | None:
        """The committed checkpoint with the best metric, None when none has one."""
        step = best_step(self.run.records(self.policy.metric), self.policy)
        return None if step is None else self.run.checkpoint(step)

    def point(self) -> None:
        """Set the links `latest` and `best`: hints for people; the truth is in the manifests."""
        alive = [r.step for r in self.run.records(None) if not r.abandoned]
        best = self.best()
        targets = {"latest": max(alive, default=None), "best": best.step if best else None}
        for name, step in targets.items():
            link = self.run.path / name
            if link.exists() and not link.is_symlink():
                continue  # a user's own file
            if step is not None:
                self.storage.point(link, folder_name(step))
            elif link.is_symlink():
                self.storage.remove(link)

    def record(self, event: str, **facts: Any) -> None:
        """Add one line to events.jsonl."""
        line = {"time": now(), "attempt": self.attempt, "event": event, **facts}
        self.storage.append_line(self.run.events, json.dumps(line))

    def record_resume(self, request: str, chosen: Committed | None, choice: Choice) -> None:
        """Write down what this attempt grows from."""
        step = chosen.step if chosen and not choice.weights_only else None
        passed_by = {str(step): why for step, why in choice.passed_by.items()}
        request = _stored(request, self.run)
        self.record("resume", request=request, step=step, passed_by=passed_by)

    def end(self, status: dict[str, Any]) -> None:
        """Say how this attempt ended: status.json for shells, a line in events.jsonl."""
        self.storage.replace(self.run.status, _json(status))
        self.record("end", **status)

    def pin(self, step: int) -> None:
        """Keep a checkpoint whatever the policy says."""
        self.storage.make_folder(self.run.pins)
        self.storage.write(self.run.pins / str(step), b"")

    def unpin(self, step: int) -> None:
        """Leave a checkpoint to the policy again."""
        self.storage.remove(self.run.pins / str(step))

    def _own_step(self, request: str) -> str | None:
        """The step that a path to one of this run's own checkpoints means."""
        path = Path(request).expanduser().resolve()
        step = step_of(path.name)
        return str(step) if step and path.parent == self.run.path.resolve() else None

    def _discard(self, folder: Path, reason: str) -> None:
        """Out of the way in one rename; then its files are removed."""
        discarded = self.run.trash / f"{folder.name}-{secrets.token_hex(3)}"
        self.storage.make_folder(self.run.trash)
        try:
            self.storage.rename(folder, discarded)
        except FileNotFoundError:
            return  # somebody else (`keepstep prune`) was faster
        self.record("prune", step=step_of(folder.name), reason=reason)
        self.storage.remove(discarded)


def now() -> str:
    """UTC, ISO 8601, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _json(values: dict[str, Any]) -> bytes:
    return json.dumps(values, indent=1).encode() + b"\n"


def _stored(request: str, run: RunFolder) -> str:
    """A request as events.jsonl holds it: a path relative to the run folder, never absolute."""
    if request in WORDS or request.isdecimal():
        return request
    return os.path.relpath(Path(request).expanduser(), run.path)


def _read_foreign(path: Path) -> Committed:
    try:
        return read_checkpoint(path.expanduser().resolve())
    except ManifestError as error:
        raise SelectionError(f"resume_from_checkpoint: {error}") from error
