"""What a run folder holds: list, verify, explain. Nothing is changed; no torch is needed."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .lineage import Attempt, Node, abandoned_steps, fruitless_resumes, is_under_way
from .manifest import MANIFEST_NAME, Manifest, ManifestError, differences, folder_name, step_of
from .retention import Decision, Policy, Record, best_step, plan_retention
from .selection import Candidate, Situation, Verify
from .storage import digest_of, sizes_of, sizes_under

PRIVATE = ".keepstep"
JOB = ("job", "nodes", "restarts")  # what an attempt says of its batch job
REQUESTS = ("stop", "save-now")  # files of these names: what somebody asks of a running attempt
# What is read in less than a minute, at a rate that any disk reaches.
DIGEST_ALL_BELOW_BYTES = 60 * 500 * 10**6


@dataclass(frozen=True)
class Committed:
    """One committed checkpoint: where it lies and what its manifest says."""

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        return self.manifest.global_step


class RunFolder:
    """A run's folder (`output_dir`), for reading. No rank, no torch, nothing is changed."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.private = self.path / PRIVATE
        self.staging = self.private / "staging"
        self.trash = self.private / "trash"
        self.quarantine = self.private / "quarantine"
        self.pins = self.private / "pins"
        self.pinned_aside = self.private / "pinned"  # pinned, and their steps saved again
        self.publishing = self.private / "publish"
        self.target = self.publishing / "target.json"
        self.events = self.private / "events.jsonl"
        self.identity = self.private / "run.json"
        self.status = self.private / "status.json"
        self.owner_file = self.private / "owner"
        self.heartbeat = self.private / "heartbeat"
        self.job = self.private / "job"  # what slurm/submit.sh has put there
        self._events_read: tuple[int, list[dict[str, Any]]] = (-1, [])
        self._read: dict[Path, tuple[tuple[int, int, int], Committed | str]] = {}

    def run_id(self) -> str | None:
        """The run's name, None in a folder that no run has used."""
        known = _read_json(self.identity).get("run_id")
        if known is None:
            newest = self.checkpoints(any_run=True)[-1:]
            known = newest[0].manifest.run_id if newest else None
        return known

    def policy(self) -> Policy:
        """The retention policy of the newest attempt; nothing is ranked in a folder without one."""
        try:
            return Policy(**_read_json(self.identity).get("policy", {}))
        except TypeError:  # written by another version
            return Policy()

    def checkpoints(self, any_run: bool = False) -> list[Committed]:
        """This run's committed checkpoints, oldest step first.

        Folders without a readable manifest of this run are somebody else's: never listed, never
        touched. A link is not followed.
        """
        found = [c for c in map(self._manifest_in, self._folders()) if isinstance(c, Committed)]
        if not any_run:
            run_id = self.run_id()
            found = [c for c in found if c.manifest.run_id == run_id]
        return sorted(found, key=lambda c: c.step)

    def is_used(self) -> bool:
        """Whether it has a history, that a checkpoint from elsewhere would not be a part of."""
        return bool(self.attempts() or self.checkpoints(any_run=True))

    def checkpoint(self, step: int) -> Committed:
        """The committed checkpoint of a step.

        Raises:
            KeyError: there is none.
        """
        return {c.step: c for c in self.checkpoints()}[step]

    def unreadable(self) -> dict[str, str]:
        """Folders named like checkpoints whose manifest cannot be read: name → what is wrong."""
        read = ((folder.name, self._manifest_in(folder)) for folder in self._folders())
        return {name: fault for name, fault in read if isinstance(fault, str)}

    def strangers(self) -> dict[str, str]:
        """Folders named like checkpoints that this run did not commit: name → why not."""
        run_id, lost, found = self.run_id(), self.lost_manifests(), {}
        for folder in self._folders():
            read = self._manifest_in(folder)
            if read is None and folder.name not in lost:
                found[folder.name] = f"it has no {MANIFEST_NAME}: keepstep did not commit it"
            elif isinstance(read, Committed) and read.manifest.run_id != run_id:
                found[folder.name] = f"it belongs to another run ({read.manifest.run_id})"
        return found

    def lost_manifests(self) -> dict[str, str]:
        """Folders that this run committed, and whose manifest is gone: name → what is wrong.

        events.jsonl tells them: the step was committed, and has not been removed since; and there
        is no more in the folder than there was.
        """
        left: dict[int, int] = {}  # step → bytes, of what is to be there
        for event in self._events():
            step, size, kind = event.get("step"), event.get("bytes"), event["event"]
            if not isinstance(step, int):
                continue
            if kind == "commit" and isinstance(size, int):
                left[step] = size
            elif kind == "quarantine" or (kind == "prune" and event.get("reason") != "replaced"):
                left.pop(step, None)
        return {
            folder.name: f"it has lost its {MANIFEST_NAME}"
            for folder in self._folders()
            if folder.is_dir()
            and self._manifest_in(folder) is None
            and sum(sizes_under(folder).values()) <= left.get(step_of(folder.name) or 0, -1)
        }

    def odd(self) -> dict[str, str]:
        """All that is named like a checkpoint of this run and is none: name → why not."""
        return self.unreadable() | self.lost_manifests() | self.in_the_way()

    def in_the_way(self) -> dict[str, str]:
        """Names of checkpoints that are taken by what is not this run's: name → what it is."""
        links = [e for e in self._entries() if step_of(e.name) is not None and e.is_symlink()]
        return self.strangers() | {link.name: "it is a link" for link in links}

    def request(self, name: str) -> Path:
        """The file that asks for one of `REQUESTS`."""
        return self.private / name

    def requests(self) -> tuple[str, ...]:
        """What somebody has asked for."""
        return tuple(name for name in REQUESTS if self.request(name).exists())

    def owner(self) -> str | None:
        """The name of the attempt that may change the folder (see ownership.py), None of none."""
        return next(iter(self.owner_words()), None)

    def owner_words(self) -> list[str]:
        """The owner's name, and its process where that is known: host, id, beginning."""
        try:
            return self.owner_file.read_text().split()
        except FileNotFoundError:
            return []

    def pinned(self) -> set[int]:
        """Steps that somebody asked to keep (`keepstep pin`)."""
        if not self.pins.is_dir():
            return set()
        return {int(entry.name) for entry in self.pins.iterdir() if entry.name.isdecimal()}

    def records(self, metric: str | None) -> list[Record]:
        """What retention looks at, taken from the manifests and the pins."""
        checkpoints, pinned = self.checkpoints(), self.pinned()
        nodes = [Node(c.step, c.manifest.attempt, c.manifest.parent or 0) for c in checkpoints]
        attempts = self.attempts()
        abandoned, newest = abandoned_steps(nodes, attempts), attempts[-1:]
        grown_from = [a.resumed_from for a in newest if a.request is not None and not a.commits]
        return [
            Record(
                c.step,
                c.manifest.metrics.get(metric or ""),
                c.manifest.total_bytes,
                c.step in pinned,
                c.step in abandoned,
                c.step in grown_from,
            )
            for c in checkpoints
        ]

    def best(self, policy: Policy) -> Committed | None:
        """The committed checkpoint with the best metric, None when none has one."""
        step = best_step(self.records(policy.metric), policy)
        return None if step is None else self.checkpoint(step)

    def retention(self) -> list[Decision]:
        """The retention plan, under the policy that the run was last launched with."""
        policy = self.policy()
        return plan_retention(self.records(policy.metric), policy)

    def attempts(self) -> list[Attempt]:
        """Every launch of the run, oldest first, from events.jsonl; a torn line is left out."""
        attempts: dict[int, Attempt] = {}
        for event in self._events():
            number, kind = event["attempt"], event["event"]
            attempt = attempts.setdefault(number, Attempt(number))
            if kind == "attempt":
                job: dict[str, Any] = {
                    name: event[name] for name in ("job", "nodes", "restarts") if name in event
                }
                attempt = replace(attempt, began=event.get("time"), job=job)
            elif kind == "resume":
                attempt = replace(
                    attempt, request=event.get("request"), resumed_from=event.get("step") or 0
                )
            elif kind == "reshard":
                written_by = (event.get("from_processes", 0), event.get("from_stage", 0))
                attempt = replace(attempt, resharded=written_by)
            elif kind == "commit":
                attempt = replace(attempt, commits=attempt.commits + 1)
            elif kind == "end":
                attempt = replace(
                    attempt, outcome=event.get("outcome"), reached=event.get("global_step")
                )
            attempts[number] = attempt
        for checkpoint in self.checkpoints():  # killed between its commit and the line about it
            number = checkpoint.manifest.attempt
            attempt = attempts.get(number, Attempt(number, "auto"))
            attempts[number] = replace(attempt, commits=max(1, attempt.commits))
        return [attempts[number] for number in sorted(attempts)]

    def saves(self) -> dict[int, dict[str, Any]]:
        """What events.jsonl says of the save of each committed checkpoint, by step.

        Seconds of `stall`, `wait`, `copy`, `write`, `digest` and `commit`; see `Saved.facts`.
        """
        attempts = {c.step: c.manifest.attempt for c in self.checkpoints()}
        return {
            event["step"]: event
            for event in self._events()
            if event["event"] == "commit"
            and attempts.get(event.get("step", -1)) == event["attempt"]
        }

    def situation(self, request: str, policy: Policy, verify: Verify, patience: int) -> Situation:
        """What `selection.choose` needs to know of this folder; `request` as the events hold it."""
        attempts, records = self.attempts(), self.records(policy.metric)
        candidates = [Candidate(r.step, r.value, r.abandoned) for r in records]
        # Folders that cannot be taken are listed too: what is there is never passed by in silence.
        faults = self.unreadable() | self.lost_manifests() | self.strangers()
        odd = {step_of(name) or 0: why for name, why in faults.items()}
        return Situation(
            candidates=candidates + [Candidate(step) for step in odd],
            best=best_step(records, policy),
            verify=lambda step: [odd[step]] if step in odd else verify(step),
            fruitless=fruitless_resumes(attempts, request),
            patience=patience,
            under_way=request != "auto" and is_under_way(request, attempts),
        )

    def faults(self, checkpoint: Committed, deep: bool | None = False) -> list[str]:
        """What differs from the manifest: ranks, names and sizes; with `deep`, digests too.

        `deep` None: digests when reading every byte takes less than a minute.
        """
        if deep is None:
            deep = checkpoint.manifest.total_bytes < DIGEST_ALL_BELOW_BYTES
        manifest = checkpoint.manifest
        found = differences(manifest, sizes_of(checkpoint.path, manifest.files))
        if deep and not found:
            found = [
                f"{name}: content has changed (xxh3-128 differs)"
                for name, entry in sorted(manifest.files.items())
                if digest_of(checkpoint.path / name) != entry.xxh3_128
            ]
        return found

    def _events(self) -> list[dict[str, Any]]:
        """The lines of events.jsonl, read again only when it has grown."""
        try:
            size = self.events.stat().st_size
        except FileNotFoundError:
            return []
        if size != self._events_read[0]:
            events = []
            for line in self.events.read_text(errors="replace").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    event = json.loads(line)
                    events.append(
                        event | {"attempt": int(event["attempt"]), "event": event["event"]}
                    )
            self._events_read = (size, events)
        return self._events_read[1]

    def _folders(self) -> list[Path]:
        return [e for e in self._entries() if step_of(e.name) is not None and not e.is_symlink()]

    def _entries(self) -> list[Path]:
        try:
            return list(self.path.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _manifest_in(self, folder: Path) -> Committed | str | None:
        """The checkpoint in `folder`; a text when its manifest is bad; None when it has none.

        A manifest is read again only when its file has changed: thousands cost a stat each.
        Another error of the disk (a network filesystem away) is raised: it is no damage.
        """
        path = folder / MANIFEST_NAME
        try:
            stat = path.stat()
            signature = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            known = self._read.get(path)
            if known is None or known[0] != signature:
                known = self._read[path] = (signature, _parse(folder, path.read_text()))
            return known[1]
        except (FileNotFoundError, NotADirectoryError):
            return None
        except UnicodeDecodeError as error:
            return f"{MANIFEST_NAME}: {error}"


def read_checkpoint(folder: Path) -> Committed:
    """The committed checkpoint at a path, of whichever run.

    Raises:
        ManifestError: there is none.
    """
    try:
        read = _parse(folder, (folder / MANIFEST_NAME).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{folder} holds no readable {MANIFEST_NAME}: {error}") from error
    if isinstance(read, str):
        raise ManifestError(f"{folder}: {read}")
    return read


def _parse(folder: Path, text: str) -> Committed | str:
    try:
        manifest = Manifest.from_json(text)
    except ManifestError as error:
        return str(error)
    if folder.name != folder_name(manifest.global_step):
        return f"its manifest is of step {manifest.global_step}"
    return Committed(folder, manifest)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
