"""What a run folder holds: list, verify, explain. Nothing is changed; no torch is needed."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from keepstep.output.progress import Tell, added_up
from keepstep.policy.lineage import Attempt, Node, abandoned_steps, fruitless_resumes, is_under_way
from keepstep.policy.manifest import MANIFEST_NAME, folder_name, step_of
from keepstep.policy.metric import value_of
from keepstep.policy.retention import Decision, Policy, Record, best_step, plan_retention
from keepstep.policy.rewind import Rewind
from keepstep.policy.samples import Sample
from keepstep.policy.samples import read_lines as read_samples
from keepstep.policy.selection import (
    PATIENCE,
    WORDS,
    Candidate,
    NewerError,
    SelectionError,
    Situation,
    UnreadableError,
    Verify,
    choose,
)
from keepstep.policy.strict import TextError, build
from keepstep.run_folder.checkpoint import Checkpoint as Checkpoint
from keepstep.run_folder.checkpoint import Listing, Unfit, faults_of, look_at
from keepstep.run_folder.checkpoint import read_checkpoint as read_checkpoint
from keepstep.run_folder.contents import sizes_under
from keepstep.run_folder.evaluations import EVALUATIONS_NAME
from keepstep.run_folder.events import as_asked_now, attempts_of, believed
from keepstep.run_folder.paths import PRIVATE, RunPaths
from keepstep.run_folder.place import read_place
from keepstep.run_folder.safe_read import (
    ABSENT,
    LONGEST_LOG,
    Journal,
    OddFileError,
    read_bytes,
    read_object,
)

PART_ALONE = (
    "this machine has its part of it alone (node_local): it is gone on from on all the machines "
    "that have a part, or from a mirror"
)


class RunFolder(RunPaths):
    """A run's folder (`output_dir`), for reading. No rank, no torch, nothing is changed.

        run = RunFolder("runs/x")
        for checkpoint in run.checkpoints():
            print(checkpoint.step, checkpoint.metrics, checkpoint.path)
        best = run.choose("best")            # as a resume would take it: its files are compared
        AutoModelForCausalLM.from_pretrained(best.path)
        run.best(), run.latest()             # the same without a look at its files; None: there is
        run.best().verify(deep=True)         # none. Raises, where a byte is not what was written
        run.retention()                      # what is kept, what goes next, and why

    A folder that is not there is one of a run that has not begun.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self.journal = Journal(self.events)
        self._listing = Listing(self.path)
        self._held: list[dict[str, Any]] | None = None
        # Told of the bytes that are read to be compared, or brought.
        self.progress: Callable[[int], None] = lambda count: None

    @contextmanager
    def reading(self, total: int, tell: Tell) -> Iterator[None]:
        """Have `tell` told of how many of so many bytes have been read."""
        before, self.progress = self.progress, added_up(tell, total)
        try:
            yield
        finally:
            self.progress = before

    @contextmanager
    def held(self) -> Iterator[None]:
        """Look at its checkpoints and its log once, for all that is asked within.

        What is told of a run that goes on meanwhile then fits together, and thousands of
        checkpoints are listed in a moment.

        Raises:
            OSError: the folder cannot be listed, though it was tried a few times.

        Ranks: one process and thread, which writes nothing there meanwhile.
        """
        with self._listing.held():
            before = self._held
            self._held = self._events()
            try:
                yield
            finally:
                self._held = before

    def run_id(self) -> str | None:
        """The run's name, None in a folder that no run has used.

        Where run.json does not tell it, the log does, or the checkpoints, if all are of one run.

        Raises:
            SelectionError: they are of several, and nothing tells which is this one.
        """
        known = self._identity().get("run_id")
        if isinstance(known, str) and known:
            return known
        told = [event["run_id"] for event in self._events() if "run_id" in event]
        if told:
            return str(told[-1])
        commits = [event for event in self._events() if event["event"] == "commit"]
        logged = {(event["attempt"], event.get("step")) for event in commits}
        there = self.checkpoints(any_run=True)
        own = [c for c in there if (c.manifest.attempt, c.step) in logged] or there
        found = {c.manifest.run_id: c.path.name for c in own}
        if len(found) > 1:
            named = ", ".join(f"{name} of run {run}" for run, name in found.items())
            raise SelectionError(
                f"{self.identity.relative_to(self.path)} does not tell which run this is, and the "
                f"checkpoints are of {len(found)}: {named}\n"
                "    Hint: move those of the other run out of the folder.",
                path=self.identity,
            )
        return next(iter(found), None)

    def policy(self) -> Policy:
        """The retention policy of the newest attempt; nothing is ranked, and all is kept, in a
        folder without one."""
        try:
            policy: Policy = build(Policy, self._identity().get("policy", {}))
        except TextError:  # written by another version
            return Policy()
        return policy if (policy.limit or 1) > 0 and (policy.every_n_steps or 1) > 0 else Policy()

    def checkpoints(self, any_run: bool = False) -> list[Checkpoint]:
        """This run's committed checkpoints.

        Folders without a readable manifest of this run are somebody else's: never listed, never
        touched. A link is not followed.

        Args:
            any_run: whichever run they are of.

        Returns:
            The oldest step first. Only their manifests have been read.

        Ranks: any.
        """
        found = [c for c in self._listing.found().values() if isinstance(c, Checkpoint)]
        if not any_run:
            run_id = self.run_id()
            found = [c for c in found if c.manifest.run_id == run_id]
        return sorted(found, key=lambda c: c.step)

    def folders(self) -> list[str]:
        """What is named like a checkpoint, and is no link."""
        return sorted(name for name, is_link in self._listing.names().items() if not is_link)

    def is_used(self) -> bool:
        """Whether it has a history, that a checkpoint from elsewhere would not be a part of."""
        return bool(self.attempts() or self.checkpoints(any_run=True))

    def checkpoint(self, step: int) -> Checkpoint:
        """The committed checkpoint of a step.

        Args:
            step: optimizer steps completed.

        Returns:
            It, its files unread.

        Raises:
            KeyError: there is none.

        Ranks: any.
        """
        return {c.step: c for c in self.checkpoints()}[step]

    def unreadable(self) -> dict[str, str]:
        """Folders named like checkpoints whose manifest cannot be taken: name → what is wrong."""
        return {name: unfit.reason for name, unfit in self._unfit().items()}

    def damaged(self) -> dict[str, str]:
        """Those among them whose manifest is not what was written."""
        unfit = self._unfit()
        return {name: unfit[name].reason for name in unfit if unfit[name].kind == "damaged"}

    def strangers(self) -> dict[str, str]:
        """Folders named like checkpoints that this run did not commit: name → why not."""
        run_id, lost, strangers = self.run_id(), self.lost_manifests(), {}
        for name, found in self._listing.found().items():
            if found is None and name not in lost:
                strangers[name] = f"it has no {MANIFEST_NAME}: keepstep did not commit it"
            elif isinstance(found, Checkpoint) and found.manifest.run_id != run_id:
                strangers[name] = f"it belongs to another run ({found.manifest.run_id})"
        return strangers

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
            name: f"it has lost its {MANIFEST_NAME}"
            for name, found in self._listing.found().items()
            if found is None
            and (self.path / name).is_dir()
            and (there_were := left.get(step_of(name) or 0)) is not None
            and (
                _bytes_committed(self.path / name) <= there_were
                or any(self.quarantine.glob(f"{name}-attempt-*"))  # killed on the way there
            )
        }

    def odd(self) -> dict[str, str]:
        """All that is named like a checkpoint of this run and is none: name → why not."""
        return self.unreadable() | self.lost_manifests() | self.in_the_way()

    def in_the_way(self) -> dict[str, str]:
        """Names of checkpoints that are taken by what is not this run's: name → what it is."""
        links = [name for name, is_link in self._listing.names().items() if is_link]
        return self.strangers() | dict.fromkeys(links, "it is a link")

    def records(self, metric: str | None) -> list[Record]:
        """What retention looks at, taken from the manifests and the pins."""
        checkpoints = self.checkpoints()
        try:
            pinned = self.pinned()
        except OSError:  # nobody knows which: nothing is pruned meanwhile
            pinned = {c.step for c in checkpoints}
        return self.records_of(checkpoints, pinned, metric)

    def records_of(
        self, checkpoints: Sequence[Checkpoint], pinned: Collection[int], metric: str | None
    ) -> list[Record]:
        """The same of checkpoints of this run wherever they lie, by its history."""
        nodes = [Node(c.step, c.manifest.attempt, c.manifest.parent or 0) for c in checkpoints]
        attempts = self.attempts()
        abandoned, newest = abandoned_steps(nodes, attempts), attempts[-1:]
        grown_from = [a.resumed_from for a in newest if a.request is not None and not a.commits]
        return [
            Record(
                c.step,
                value_of(c.metrics, metric),
                c.manifest.total_bytes,
                c.step in pinned,
                c.step in abandoned,
                c.step in grown_from,
                c.manifest.is_finite,
            )
            for c in checkpoints
        ]

    def best(self, policy: Policy | None = None) -> Checkpoint | None:
        """The committed checkpoint with the best metric on the living branch.

        Args:
            policy: what ranks; None: what the run was last launched with.

        Returns:
            It, its files unread; None: no checkpoint has the metric.

        Ranks: any.
        """
        policy = policy or self.policy()
        step = best_step(self.records(policy.metric), policy)
        return None if step is None else self.checkpoint(step)

    def latest(self) -> Checkpoint | None:
        """The newest committed checkpoint on the living branch.

        Returns:
            It, its files unread; None: there is none. What a resume takes is `choose("auto")`.

        Ranks: any.
        """
        alive = [record.step for record in self.records(None) if not record.abandoned]
        return self.checkpoint(max(alive)) if alive else None

    def choose(self, request: str | int = "auto") -> Checkpoint | None:
        """What a word or a step means, as `resume_from_checkpoint` understands them: intact.

        How earlier resumes of it went is of no account here: `keepstep which` tells what a launch
        would do next.

        Args:
            request: auto (the newest valid one), latest, best, never, or a step.

        Returns:
            The checkpoint, its files compared with its manifest (digests too, if reading every byte
            takes less than a minute); None: the run's beginning.

        Raises:
            SelectionError: it cannot be had, or is damaged; the message lists what exists.
            UnreadableError: it cannot be read now.

        Ranks: any; each looks for itself.
        """
        situation = self.situation(
            str(request),
            self.policy(),
            lambda step: self.faults(self.checkpoint(step), deep=None),
            PATIENCE,
        )
        now = replace(situation, fruitless={}, under_way=False)
        step = choose(str(request), now).step
        return None if step is None else self.checkpoint(step)

    def retention(self) -> list[Decision]:
        """The retention plan, under the policy that the run was last launched with.

        Returns:
            A decision for every committed checkpoint, the oldest step first.

        Ranks: any.
        """
        policy = self.policy()
        return plan_retention(self.records(policy.metric), policy)

    def attempts(self) -> list[Attempt]:
        """Every launch of the run, oldest first, as the manifests and events.jsonl tell it."""
        there = self.checkpoints()  # killed between a commit and the line about it
        nodes = [Node(c.step, c.manifest.attempt, c.manifest.parent or 0) for c in there]
        return attempts_of(self._events(), nodes)

    def samples(self) -> list[Sample]:
        """What the model has answered to `sample_prompts`, by step and prompt. Of a step that was
        done again, the last attempt's answer.

        Raises:
            OddFileError, OSError: it cannot be read.
        """
        try:
            text = read_bytes(self.samples_file, LONGEST_LOG).decode(errors="replace")
        except ABSENT:
            return []
        return read_samples(text)

    def rewinds(self) -> list[Rewind]:
        """How often the run has gone back from a step that had spoilt it, oldest first."""
        return [attempt.rewind for attempt in self.attempts() if attempt.rewind is not None]

    def mirrored(self) -> dict[int, tuple[int, str]]:
        """Step → the attempt that has copied its checkpoint, and where to, as far as the log tells.
        (A branch may have saved the step again since.)"""
        found: dict[int, tuple[int, str]] = {}
        for event in self._events():
            if event["event"] == "mirror" and "error" not in event:
                found[event.get("step", -1)] = event["attempt"], str(event.get("url"))
                for step in (*event.get("pruned", ()), *event.get("lost", ())):
                    found.pop(step, None)
        return found

    def mirror(self) -> str | None:
        """The address that the run was last copied to, or was to be, as far as the log tells."""
        urls = [event.get("url") for event in self._events() if event["event"] == "mirror"]
        return str(urls[-1]) if urls and urls[-1] else None

    def log(self) -> list[dict[str, Any]]:
        """What has happened, in its order, as far as events.jsonl can be believed and read."""
        return list(self._events())

    def commits(self) -> list[dict[str, Any]]:
        """What events.jsonl says of every save, in their order; also of those that are pruned."""
        return [e for e in self._events() if e["event"] == "commit" and e.get("step") is not None]

    def saves(self) -> dict[int, dict[str, Any]]:
        """What events.jsonl says of the save of each committed checkpoint, by step.

        Seconds of `stall`, `wait`, `copy`, `write`, `digest` and `commit`; see `Saved.facts`.
        """
        attempts = {c.step: c.manifest.attempt for c in self.checkpoints()}
        return {
            event["step"]: event
            for event in self.commits()
            if attempts.get(event["step"]) == event["attempt"]
        }

    def situation(
        self,
        request: str,
        policy: Policy,
        verify: Verify,
        patience: int,
        weights_only: bool = False,
        recipe: str | None = None,
        takeable: Collection[int] | None = None,
    ) -> Situation:
        """What `selection.choose` needs to know of this folder.

        Args:
            takeable: the steps that can be had on all machines of the run; None: nobody has asked
                the others.
        """
        self._listing.wait_until_readable()
        names = self.names_of(request, weights_only)
        attempts = as_asked_now(self.attempts(), names)
        records = [r for r in self.records(policy.metric) if takeable is None or r.step in takeable]
        candidates = [Candidate(r.step, r.value, r.abandoned, r.is_finite) for r in records]
        # Folders that cannot be taken are listed too: what is there is never passed by in silence.
        faults = self.unreadable() | self.lost_manifests() | self.strangers()
        odd = {step_of(name) or 0: name for name in faults}

        def look(step: int) -> Sequence[str]:
            if step in odd:
                return self._why_odd(odd[step], faults[odd[step]])
            if takeable is None and self.checkpoint(step).manifest.is_part:
                place = read_place(self)
                where = f" ({place.mirror}/{folder_name(step)})" if place and place.mirror else ""
                raise UnreadableError(PART_ALONE + where, step=step)
            return verify(step)

        return Situation(
            candidates=candidates + [Candidate(step) for step in odd],
            best=best_step(records, policy),
            verify=look,
            fruitless=fruitless_resumes(attempts, names[0], recipe),
            patience=patience,
            under_way=names[0] != "auto" and is_under_way(names[0], attempts),
        )

    def names_of(self, request: str, weights_only: bool = False) -> list[str]:
        """What a request is called in the log: first what it means, then how it is written.

        A path means a run's checkpoint, wherever the folders lie and whatever links lead there. It
        is written relative to this folder, never absolute.
        """
        names = [request]
        if request.isdecimal():
            names.append(f"{self.run_id()}@{request}")
        elif request not in WORDS:
            path = Path(request).expanduser()
            names = [os.path.relpath(path, self.path)]
            found = look_at(path.resolve())
            if isinstance(found, Checkpoint):
                own = [str(found.step)] if found.manifest.run_id == self.run_id() else []
                names = [f"{found.manifest.run_id}@{found.step}", *own, *names]
        return [f"{name} weights_only" if weights_only else name for name in names]

    def faults(self, checkpoint: Checkpoint, deep: bool | None = False) -> list[str]:
        """What differs from the manifest (see `faults_of`). Raises: UnreadableError."""
        return faults_of(checkpoint, deep, self.progress)

    def state_of(self, checkpoint: Checkpoint, deep: bool | None = False) -> list[str]:
        """The same to be shown: that it cannot be read now is said as a fault is."""
        try:
            return faults_of(checkpoint, deep, self.progress)
        except UnreadableError as error:
            return [str(error)]

    def _identity(self) -> dict[str, Any]:
        try:
            return read_object(self.identity)
        except (OSError, OddFileError):
            return {}

    def events_read(self) -> tuple[list[dict[str, Any]], int]:
        """The lines of events.jsonl that are what was written, and how many are not.

        Raises:
            OddFileError, OSError: it cannot be read.
        """
        events, damaged = self.journal.read()
        there = self.checkpoints(any_run=True)
        return believed(events, damaged, (c.manifest.attempt for c in there))

    def _events(self) -> list[dict[str, Any]]:
        """The same lines; none, where it cannot be read."""
        if self._held is not None:
            return self._held
        try:
            return self.events_read()[0]
        except (OSError, OddFileError):
            return []

    def _unfit(self) -> dict[str, Unfit]:
        return {n: found for n, found in self._listing.found().items() if isinstance(found, Unfit)}

    def _why_odd(self, name: str, reason: str) -> list[str]:
        """What is wrong with a folder that is no checkpoint of this run.

        Raises:
            UnreadableError, NewerError: nothing, for all that is known.
        """
        unfit = self._unfit().get(name)
        if unfit is not None and unfit.kind == "unreadable":
            raise UnreadableError(f"{name}: {reason}", path=self.path / name)
        if unfit is not None and unfit.kind == "newer":
            raise NewerError(
                f"{name} was {reason}, or name the step of an older checkpoint.",
                path=self.path / name,
            )
        return [reason]


def _bytes_committed(folder: Path) -> int:
    """Of all that is in it, without what was written there afterwards."""
    return sum(size for name, size in sizes_under(folder).items() if name != EVALUATIONS_NAME)


def run_that_would_prune(path: Path) -> Path | None:
    """The run that would take what is written at `path` for its own: among its checkpoints, in the
    place of one that is to come, or in what is keepstep's; None: there is none."""
    resolved = path.resolve()
    for place in (resolved, *resolved.parents):
        own = place.name == PRIVATE or step_of(place.name) is not None
        if own and (place.parent / PRIVATE).is_dir():
            return place.parent
    return None
