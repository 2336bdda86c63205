"""What is done to checkpoints that are there: prune, pin, quarantine, point at, write down.

By an attempt, after its commits, and by hand (`keepstep prune`, `pin`). One process.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from keepstep.output.environment import hidden
from keepstep.policy.manifest import folder_name, step_of
from keepstep.policy.retention import Decision, Policy, Record, plan_retention, room_for
from keepstep.policy.strict import with_check
from keepstep.run_folder.reader import Checkpoint, RunFolder
from keepstep.run_folder.safe_read import SMALL, OddFileError, read_bytes
from keepstep.run_folder.setbacks import Setbacks
from keepstep.run_folder.storage import NotOwnerError, Storage
from keepstep.run_folder.trash import Trash, manifest_first

logger = logging.getLogger(__name__)

TEXTS = ("reason", "error")  # facts of an event that errors are quoted in


class Keeper:
    """Keeps a run folder in order. What cannot be removed, renamed or linked stops nothing else.

    Attributes:
        run: the folder.
        run_id: the run's name, made at its first attempt.
        attempt: this launch, counted from 1; by hand, the newest.
        owner: the name under which it owns the folder.
        trash: its own part of that folder. The next owner takes all parts away in one rename:
            whoever still wants to put something there cannot.
        setbacks: what could not be done, and stopped nothing.
        parent: the step that this attempt grew from, until it has committed.
        by: who prunes, where it is no attempt; its events tell.
        heard: is told of each event, written down or not; it raises nothing.
    """

    def __init__(
        self, run: RunFolder, policy: Policy, storage: Storage, owner: str | None = None
    ) -> None:
        self.run = run
        self.policy = policy
        self.storage = storage
        self.owner = owner or f"by-hand-{secrets.token_hex(4)}"
        self.setbacks = Setbacks()
        self.trash = Trash(run, storage, self.owner, self.setbacks)
        self.parent: int | None = None
        self.by: str | None = None
        self.heard: Callable[[Mapping[str, Any]], None] = lambda event: None
        self.run_id = run.run_id() or secrets.token_hex(6)
        self.attempt = max((attempt.number for attempt in run.attempts()), default=0)
        self._recording = threading.Lock()

    def identify(self) -> None:
        """Write down the run's name and its retention policy."""
        self.storage.make_folder(self.run.private)
        identity = {"run_id": self.run_id, "policy": asdict(self.policy)}
        content = with_check(json.dumps(identity)).encode() + b"\n"
        with contextlib.suppress(OSError, OddFileError):  # as when there is none yet
            if read_bytes(self.run.identity, SMALL) == content:
                return
        try:
            self.storage.replace(self.run.identity, content)
        except NotOwnerError:
            raise
        except OSError as error:
            if self.run.run_id() is None:  # nothing else would tell it
                raise
            logger.warning("the retention policy is not written down yet: %s", error)

    def make_room(self, step: int) -> list[int]:
        """The disk is full: prune now what may go for the checkpoint of `step`, which is not there
        yet; returns the steps that went."""
        return self.discard_all(room_for(step, self._records(), self.policy))

    def prune(self, keep_abandoned: bool = True) -> list[int]:
        """Apply the retention plan; returns the steps that went."""
        self.trash.clear()
        plan = plan_retention(self._records(), self.policy, keep_abandoned)
        return self.discard_all([decision for decision in plan if not decision.keep])

    def prune_after_verifying(self, chosen: Checkpoint) -> None:
        """At a start: what a killed prune left goes, once the newest checkpoint has been verified.

        Nothing goes when an older one was chosen: then nobody knows whether the newest is valid.
        """
        alive = [r.step for r in self.run.records(None) if not r.abandoned]
        if chosen.path.parent == self.run.path and chosen.step == max(alive, default=None):
            self.prune()
            self.point()
            self.identify()  # once more: there may not have been any room for it

    def quarantine(self, name: str, reason: str) -> None:
        """Set a damaged checkpoint aside, with the reason beside it. It is never deleted."""
        aside = self.run.quarantine / f"{name}-attempt-{self.attempt}"
        with self.setbacks.allowed(f"{name} is not set aside"):
            self.storage.make_folder(self.run.quarantine)
            self.storage.move(self.run.path / name, aside, manifest_first)
            self.record("quarantine", step=step_of(name), reason=reason)
            self.storage.write(aside.with_name(f"{aside.name}.txt"), f"{reason}\n".encode())

    def best(self) -> Checkpoint | None:
        """The committed checkpoint with the best metric, None when none has one."""
        return self.run.best(self.policy)

    def point(self) -> None:
        """Set the links `latest` and `best`: hints for people; the truth is in the manifests.

        Some file systems have no links: that is told once.
        """
        alive = [r.step for r in self.run.records(None) if not r.abandoned]
        best = self.best()
        targets = {"latest": max(alive, default=None), "best": best.step if best else None}
        for name, step in targets.items():
            link = self.run.path / name
            with self.setbacks.allowed(f"the link {name} is not set"):
                if link.exists() and not link.is_symlink():
                    continue  # a user's own file
                if step is not None:
                    self.storage.point(link, folder_name(step))
                elif link.is_symlink():
                    self.storage.remove(link)

    def pin(self, step: int) -> None:
        """Keep a checkpoint whatever the policy says."""
        self.storage.make_folder(self.run.pins)
        self.storage.write(self.run.pins / str(step), b"")

    def unpin(self, step: int) -> None:
        """Leave a checkpoint to the policy again."""
        self.storage.remove(self.run.pins / str(step))

    def record(self, event: str, **facts: Any) -> None:
        """Add one line to events.jsonl. A full disk may cost the line, never the deed."""
        facts |= {n: without_secrets_of_this(facts[n]) for n in TEXTS if n in facts}
        line = {"time": now(), "attempt": self.attempt, "event": event, **facts}
        told = self._without_paths(json.dumps(line))
        try:
            with self._recording:  # a save's thread, and the main one
                self.storage.append_line(self.run.events, with_check(told))
        except NotOwnerError:
            raise
        except OSError as error:
            logger.warning("the event %r could not be written down: %s", event, error)
        self.heard(json.loads(told))

    def _records(self) -> list[Record]:
        """What retention looks at; what this attempt grew from, known even if no line tells it."""
        records = self.run.records(self.policy.metric)
        return [replace(r, grown_from=r.grown_from or r.step == self.parent) for r in records]

    def discard_all(self, decisions: list[Decision]) -> list[int]:
        """Remove these checkpoints; returns the steps that went. One that cannot be renamed or
        removed does not keep the others."""
        gone = []
        for decision in decisions:
            folder = self.run.path / folder_name(decision.step)
            # (FileNotFoundError: `keepstep prune` was faster.)
            with (
                self.setbacks.allowed(f"{folder.name} is not pruned"),
                contextlib.suppress(FileNotFoundError),
            ):
                aside = self.trash.take(folder)
                gone.append(decision.step)
                self._empty(aside, decision.step, decision.reason)
        return gone

    def _empty(self, aside: Path, step: int, reason: str) -> None:
        self.trash.empty(aside)
        by = {} if self.by is None else {"by": self.by}
        self.record("prune", step=step, reason=reason, **by)

    def _without_paths(self, text: str) -> str:
        """Error texts name files; what is written down does not say where they lie here."""
        for place in (self.run.path.resolve(), self.run.path, Path.cwd(), Path.home()):
            if place.is_absolute() and len(place.parts) > 1:
                # A mirror's address without its folder would be none, for people and `sync`.
                text = re.sub(rf"(?<!file://){re.escape(str(place))}/", "", text)
        return text


def without_secrets_of_this(text: Any) -> Any:
    """An error's text may quote anything."""
    return hidden(text, os.environ) if isinstance(text, str) else text


def now() -> str:
    """UTC, ISO 8601, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
