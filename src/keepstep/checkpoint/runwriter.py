"""Changes a run folder: stage, commit, prune, quarantine, point. One process: the main one.

The order of the disk operations is the promise: at every instant a valid checkpoint is there, and
nothing is removed before its successor is durable.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import threading
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .manifest import MANIFEST_NAME, Manifest, ManifestError, differences, folder_name, step_of
from .retention import Decision, Policy, plan_retention, room_for
from .runfolder import Committed, RunFolder, read_checkpoint
from .selection import WORDS, Choice, SelectionError, Verify, choose
from .storage import Storage, sizes_of
from .trash import Trash

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """A commit, as every rank hears of it.

    Attributes:
        checkpoint: what was committed.
        best: the best checkpoint now.
        pruned: the steps that went for it.
        free: bytes left on the disk; None: not known.
        facts: `stall`, `wait` (for the save before; part of the stall), `copy`, `write` and
            `digest` (part of the write), in seconds, of the slowest rank each; `slowest_rank` to
            write; `gb_per_s`: of all ranks together; `read_back`: seconds to check the files that
            several ranks wrote, and to take in those that libraries wrote.
    """

    checkpoint: Committed
    best: Committed | None
    pruned: list[int]
    facts: dict[str, Any]
    free: int | None = None


class RunWriter:
    """Changes a run folder. Raises OSError as the disk does.

    Attributes:
        run: the folder.
        run_id: the run's name, made at its first attempt.
        attempt: this launch, counted from 1.
        owner: the name under which it owns the folder.
        min_free: bytes that a save is to leave on the disk.
        staging: its own part of that folder. The next owner takes all parts away in one rename:
            whoever still wants to rename something out of it cannot.
        trash: its own part of that one.
    """

    def __init__(
        self, run: RunFolder, policy: Policy, storage: Storage, owner: str | None = None
    ) -> None:
        self.run = run
        self.policy = policy
        self.storage = storage
        self.owner = owner or f"by-hand-{secrets.token_hex(4)}"
        self.staging, self.trash = run.staging / self.owner, Trash(run, storage, self.owner)
        self.run_id = run.run_id() or secrets.token_hex(6)
        self.min_free = 0
        self._recording = threading.Lock()
        self.attempt = max((attempt.number for attempt in run.attempts()), default=0)

    def start(self, **facts: Any) -> None:
        """Begin an attempt: sweep what a killed one left behind, and set the links right.

        `facts` go into events.jsonl.
        """
        self.attempt += 1
        self.storage.make_folder(self.run.private)
        self.trash.sweep()
        for place in (self.staging, self.trash.folder):
            self.storage.make_folder(place)
        self.identify()
        # Requests were meant for an earlier attempt; but those of a job for all that it makes.
        meant = {self.owner, ""} if "job" in facts else {self.owner}
        for name in self.run.requests():
            if self.run.request(name).read_text() not in meant:
                self.storage.remove(self.run.request(name))
        self.storage.remove(self.run.status)  # it told how the attempt before this one ended
        self.record("attempt", **facts)
        self.point()

    def identify(self) -> None:
        """Write down the run's name and its retention policy."""
        self.storage.make_folder(self.run.private)
        identity = {"run_id": self.run_id, "policy": asdict(self.policy)}
        self.storage.replace(self.run.identity, _json(identity))

    def select(
        self, request: str, verify: Verify, patience: int, weights_only: bool = False
    ) -> tuple[Committed | None, Choice]:
        """Choose the checkpoint to resume from; put damaged ones that were passed by aside.

        Raises:
            SelectionError: `request` cannot be had.
        """
        own = self._own_step(request)
        asked = self._stored(request, weights_only)
        situation = self.run.situation(asked, self.policy, verify, patience)
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
        """An empty staging folder for the checkpoint of `step`, and one for its reports."""
        self.discard(step)
        self._leave_room()
        folder = self.staging / folder_name(step)
        for place in (self.reports(step), folder):
            self.storage.make_folder(place)
        return folder

    def reports(self, step: int) -> Path:
        """The folder in which the ranks say that their parts of a staged checkpoint are written."""
        return self.staging / f"{folder_name(step)}-reports"

    def commit(self, manifest: Manifest, **facts: Any) -> Committed:
        """Make the staged folder of `manifest` a checkpoint: the manifest first, then one rename.

        `facts` go into events.jsonl, beside what the manifest says.

        Raises:
            OSError: of the disk.
            ManifestError: the folder does not hold what the manifest says.
        """
        started = time.perf_counter()
        staged = self.staging / folder_name(manifest.global_step)
        missing = differences(manifest, sizes_of(staged, manifest.files))
        if missing:
            raise ManifestError(f"the staged checkpoint is incomplete: {'; '.join(missing)}")
        text = manifest.to_json()
        Manifest.from_json(text)  # what could not be read again must not be committed
        self.storage.write(staged / MANIFEST_NAME, text.encode())
        for folder in sorted({staged, *((staged / name).parent for name in manifest.files)}):
            self.storage.sync_folder(folder)
        target = self.run.path / staged.name
        replaced = self.trash.make_way(target)
        try:
            self.storage.rename(staged, target)
        except OSError as error:
            if not _stands(target, manifest):
                raise
            logger.warning("%s stands, but its folder could not be synced: %s", target.name, error)
        self.record(
            "commit",
            step=manifest.global_step,
            bytes=manifest.total_bytes,
            metrics=manifest.metrics,
            commit=round(time.perf_counter() - started, 4),
            **facts,
        )
        try:  # from here on it is saved, whatever happens
            if replaced is not None:
                self._empty(replaced, manifest.global_step, "replaced")
            self.storage.remove(self.reports(manifest.global_step))
        except OSError as error:
            logger.warning("what %s leaves behind stays: %s", target.name, error)
        return Committed(target, manifest)

    def discard(self, step: int) -> None:
        """Remove the staging folder of a checkpoint that will not be committed, and its reports."""
        for place in (self.staging / folder_name(step), self.reports(step)):
            if place.exists():
                self.storage.remove(place)

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

    def make_room(self, step: int) -> list[int]:
        """The disk is full: prune now what may go for the checkpoint of `step`, which is not there
        yet; returns the steps that went."""
        return self._discard(room_for(step, self.run.records(self.policy.metric), self.policy))

    def prune(self, keep_abandoned: bool = True) -> list[int]:
        """Apply the retention plan; returns the steps that went."""
        plan = plan_retention(self.run.records(self.policy.metric), self.policy, keep_abandoned)
        return self._discard([decision for decision in plan if not decision.keep])

    def _discard(self, gone: list[Decision]) -> list[int]:
        for decision in gone:
            try:
                aside = self.trash.take(self.run.path / folder_name(decision.step))
            except FileNotFoundError:
                continue  # somebody else (`keepstep prune`) was faster
            self._empty(aside, decision.step, decision.reason)
        return [decision.step for decision in gone]

    def prune_after_verifying(self, chosen: Committed) -> None:
        """At a start: what a killed prune left goes, once the newest checkpoint has been verified.

        Nothing goes when an older one was chosen: then nobody knows whether the newest is valid.
        """
        alive = [r.step for r in self.run.records(None) if not r.abandoned]
        if chosen.path.parent == self.run.path and chosen.step == max(alive):
            self.prune()
            self.point()

    def quarantine(self, step: int, reason: str) -> None:
        """Set a damaged checkpoint aside, with the reason beside it. It is never deleted."""
        self.storage.make_folder(self.run.quarantine)
        name = f"{folder_name(step)}-attempt-{self.attempt}"
        self.storage.write(self.run.quarantine / f"{name}.txt", f"{reason}\n".encode())
        self.storage.rename(self.run.path / folder_name(step), self.run.quarantine / name)
        self.record("quarantine", step=step, reason=reason)

    def best(self) -> Committed | None:
        """The committed checkpoint with the best metric, None when none has one."""
        return self.run.best(self.policy)

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
        """Add one line to events.jsonl. A full disk may cost the line, never the deed."""
        line = {"time": now(), "attempt": self.attempt, "event": event, **facts}
        try:
            with self._recording:  # a save's thread, and the main one
                self.storage.append_line(self.run.events, self._without_paths(json.dumps(line)))
        except OSError as error:
            logger.warning("the event %r could not be written down: %s", event, error)

    def record_resume(
        self, request: str, weights_only: bool, chosen: Committed | None, choice: Choice
    ) -> None:
        """Write down what this attempt grows from."""
        step = chosen.step if chosen and not choice.weights_only else None
        passed_by = {str(step): why for step, why in choice.passed_by.items()}
        asked = self._stored(request, weights_only)
        self.record("resume", request=asked, step=step, passed_by=passed_by)

    def end(self, status: dict[str, Any]) -> None:
        """Say how this attempt ended: status.json for shells, a line in events.jsonl."""
        self.record("end", **status)
        text = self._without_paths(json.dumps({**status, "owner": self.owner}, indent=1))
        try:
            self.storage.replace(self.run.status, text.encode() + b"\n")
        except OSError as error:
            logger.warning("status.json could not be written: %s", error)

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

    def _empty(self, aside: Path, step: int, reason: str) -> None:
        self.trash.empty(aside)
        self.record("prune", step=step, reason=reason)

    def _stored(self, request: str, weights_only: bool) -> str:
        """A request as events.jsonl holds it: a path relative to the run folder, never absolute."""
        if request not in WORDS and not request.isdecimal():
            request = os.path.relpath(Path(request).expanduser(), self.run.path)
        return f"{request} weights_only" if weights_only else request

    def _without_paths(self, text: str) -> str:
        """Error texts name files; what is written down does not say where they lie here."""
        for place in (self.run.path.resolve(), self.run.path, Path.cwd(), Path.home()):
            if place.is_absolute() and len(place.parts) > 1:
                text = text.replace(f"{place}/", "")
        return text


def now() -> str:
    """UTC, ISO 8601, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _json(values: dict[str, Any]) -> bytes:
    return json.dumps(values, indent=1).encode() + b"\n"


def _stands(target: Path, manifest: Manifest) -> bool:
    """Whether `target` is this checkpoint, and not what a successor of this attempt made of it."""
    try:
        return read_checkpoint(target).manifest.to_json() == manifest.to_json()
    except ManifestError:
        return False


def _read_foreign(path: Path) -> Committed:
    try:
        return read_checkpoint(path.expanduser())
    except ManifestError as error:
        raise SelectionError(f"resume_from_checkpoint: {error}") from error
