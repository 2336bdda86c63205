"""Saving: stage → snapshot → write → commit → prune → point, with training going on.

Collective: every rank holds a `Saver` and calls it at the same step. See `flight.py` for what
happens between the snapshot and the commit.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

from keepstep.policy.completeness import stale_files
from keepstep.policy.manifest import FileEntry, Manifest
from keepstep.policy.save_states import SaveState
from keepstep.ranks import collectives
from keepstep.run_folder.keeping import now
from keepstep.run_folder.storage import Storage
from keepstep.run_folder.writer import RunWriter, Saved
from keepstep.save.failure import Cause, SaveError, StaleError
from keepstep.save.in_flight import Flight
from keepstep.save.node_parts import NodeParts, commit_part
from keepstep.save.on_main import Draft, after_commit, facts_of, not_saved, outcome, stage
from keepstep.save.rank_part import Part, Report
from keepstep.save.shared_file import digest_of_joint
from keepstep.save.snapshot_memory import Arena, free_host_memory

logger = logging.getLogger(__name__)

T = TypeVar("T")
Mode = Literal["lazy", "snapshot", "off"]
MEMORY_SHARE = 0.8  # of the free host memory that snapshots may take; training wants some too
TOLD = (SaveState.OVERDUE, SaveState.TIMED_OUT)  # what came of it so far has been collected
LAST_WAIT_SECONDS = 10.0  # for the other ranks' parts, when an attempt ends in an error


class Saver:
    """Makes checkpoints, one at a time. Ranks: all call each method, at the same step (collective).

    While a save is in flight its thread alone uses the main process's writer.

    Attributes:
        mode: how a save is written: `lazy` and `snapshot` in the background, out of the arena that
            `reserve` has set aside, copied until the next optimizer step or at once; `off` in the
            foreground.
        timeout: seconds that one save may take.
        arena: this rank's memory for snapshots; without it saves are written in the foreground.
        parent: the step that this attempt grew from, None for the beginning.
        before: on the main process, the manifest of this attempt's newest commit, or of what it
            grew from; None: there is none.
        parts: the machines' disks, where the run folder is each machine's own; None: all see one.
    """

    def __init__(
        self, writer: Callable[[], RunWriter], storage: Storage, mode: Mode, timeout: float
    ) -> None:
        self.mode: Mode = mode
        self.timeout = timeout
        self.arena: Arena | None = None
        self.parent: int | None = None
        self.before: Manifest | None = None
        self.parts: NodeParts | None = None
        self._writer = writer
        self._storage = storage
        self._flight: Flight | None = None
        self._draft: Draft
        self._waited = 0.0

    def reserve(self, size: int) -> str | None:
        """Set host memory for snapshots of `size` bytes aside. Ranks: all (collective).

        Returns: why it cannot be had, the same on every rank. Then saves stay in the foreground.
        """
        wishes = collectives.gather((socket.gethostname(), size, free_host_memory()))
        for host in sorted({host for host, _, _ in wishes}):
            needed = sum(size for other, size, _ in wishes if other == host)
            free = min(free for other, _, free in wishes if other == host)
            if needed > free * MEMORY_SHARE:
                self.mode = "off"
                return (
                    f"{host} has {free / 1e9:.3g} GB of memory left, and snapshots of its ranks "
                    f"take {needed / 1e9:.3g} GB"
                )
        try:
            arena = Arena(size)
        except OSError:  # as when memory must not be promised twice (vm.overcommit_memory)
            arena = None
        (refused,) = collectives.any_of(arena is None)
        self.arena = None if refused else arena
        if refused:
            self.mode = "off"
        return "a rank was refused memory for snapshots" if refused else None

    @property
    def in_background(self) -> bool:
        """Whether a save that begins now goes on behind training. The same on every rank."""
        return self.arena is not None and self.mode != "off"

    def save(
        self,
        manifest: Manifest,
        write: Callable[[Part], None],
        told: Mapping[str, Any] | None = None,
        moved: bool = False,
    ) -> None:
        """Begin a save: when this returns, it is on its way or (in the foreground) written.

        `settle()` tells what came of it; in the foreground it also commits. Ranks: all
        (collective).

        Args:
            manifest: what is known of this step; run, attempt, parent, files, times are filled in.
            write: stores this rank's files through the given `Part`; it may be collective.
            told: on the main process, what the log is to tell of it beside what it costs.
            moved: on the main process, whether the optimizer has made a step since the checkpoint
                before: its files cannot all be the same then.

        Raises:
            SaveError: on every rank: it cannot begin.
        """
        started = time.perf_counter() - self._waited
        waited, self._waited = self._waited, 0.0
        step = manifest.global_step
        if self._flight is not None:
            busy = Cause(0, f"the one of step {self._flight.step} is not done")
            raise SaveError(not_saved(step), [busy], step)
        staged, reports = self.on_main(not_saved(step), lambda writer: stage(writer, step), step)
        if self.parts is not None:
            parts = self.parts
            self.on_all(not_saved(step), lambda: parts.stage(step), step)
        background = self.in_background
        part = Part(staged, collectives.rank(), self._storage, self.arena if background else None)
        write(part)
        part.begin_copy()
        if self.mode == "snapshot":
            part.copy()
        told_by = reports if self.parts is None else None
        self._flight = Flight(step, part, told_by, self._storage, self.timeout)
        stall = time.perf_counter() - started
        part.report.seconds |= {"wait": waited, "hold": 0.0, "stall": stall}

        def describe(ranks: list[Report]) -> tuple[Manifest, dict[str, Any]]:
            if not background:
                ranks[0].seconds["stall"] = time.perf_counter() - started
            return self._describe(part, manifest, ranks, moved)

        def commit(ranks: list[Report]) -> Saved:
            return self._commit(draft, ranks, told or {})

        draft = self._draft = Draft(describe)
        self._flight.begin(
            collectives.world_size(), commit if collectives.is_main() else None, background
        )

    def is_writing(self) -> bool:
        """Whether nobody should wait for the save in flight yet: this rank's part is being written,
        and the main process cannot see that. Ranks: any."""
        flight = self._flight
        if flight is None or self.parts is None:
            return False
        return not flight.written.is_set() and time.monotonic() < flight.deadline

    @property
    def in_flight(self) -> bool:
        """Whether a save is on its way to the disk. Ranks: any."""
        return self._flight is not None

    def has_news(self) -> bool:
        """Whether this rank knows that the save in flight has ended, or should have. Ranks: any."""
        flight = self._flight
        return flight is not None and flight.state not in TOLD and flight.ended

    def hold(self) -> None:
        """Called before every optimizer step: what is still being copied must not change yet.

        Ranks: any, not collective.
        """
        if self._flight is not None and self.arena is not None and not self.arena.copied.is_set():
            started = time.perf_counter()
            self.arena.hold()
            seconds, held = self._flight.part.report.seconds, time.perf_counter() - started
            seconds["stall"] += held
            seconds["hold"] += held

    def settle(self) -> Saved | None:
        """Wait for the save in flight. Ranks: all (collective).

        Returns: the commit; None when there is nothing in flight, when only the commit itself
            takes longer than `timeout` (it may still arrive; until then no other save begins), or
            when it has been said to have failed, and its writer is stuck.

        Raises:
            SaveError: on every rank, once, when one of them could not write. Nothing of it is left,
                but for what a writer that is stuck goes on with; that is removed once it comes
                back.
        """
        flight = self._flight
        if flight is None:
            return None
        started = time.perf_counter()
        flight.wait_written()
        failures = list(collectives.gather_some(flight.failure).values())
        (stuck,) = collectives.any_of(not flight.written.is_set())
        if self.parts is not None and not (failures or stuck or flight.state.is_given_up):
            failures = self._commit_parts(flight, self.parts)
        state, saved, causes = self.on_main(
            not_saved(flight.step),
            lambda writer: outcome(writer, flight, failures, stuck),
            flight.step,
        )
        if not collectives.is_main():
            flight.hear(state)
        if state.is_terminal:
            self._flight = None
            self._tidy_parts(flight.step)
        self._waited = time.perf_counter() - started
        if causes:
            raise SaveError(not_saved(flight.step), causes, flight.step)
        return saved

    def wait_longer(self, seconds: float) -> None:
        """Give the save in flight so many seconds more, from now on. Ranks: all."""
        if self._flight is not None:
            self._flight.deadline = time.monotonic() + seconds

    def wait_alone(self) -> None:
        """When this rank ends: what is on its way may still arrive. Not collective."""
        if self._flight is not None:
            self._flight.wait_written(at_most=LAST_WAIT_SECONDS)
            self._flight.wait(at_most=LAST_WAIT_SECONDS)
        if self.arena is not None:
            self.arena.close()

    def on_main(self, what: str, action: Callable[[RunWriter], T], step: int | None = None) -> T:
        """Have the main process act. Ranks: all (collective).

        Raises:
            SaveError: the same on every rank: what the main process met.
        """

        def act() -> T:
            try:
                return action(self._writer())
            except Exception as error:
                raise SaveError(what, [Cause.of(error, collectives.rank())], step) from error

        return collectives.on_main(what, act)

    def on_all(self, what: str, action: Callable[[], None], step: int | None = None) -> None:
        """Have every rank act. Ranks: all (collective).

        Raises:
            SaveError: the same on every rank: what the first that failed met.
        """

        def act() -> None:
            try:
                action()
            except Exception as error:
                raise SaveError(what, [Cause.of(error, collectives.rank())], step) from error

        collectives.on_all(what, act)

    def make_room(self, step: int) -> list[int]:
        """A disk is full: prune now what may go for the checkpoint of `step`; returns the steps
        that went. Ranks: all (collective).

        Raises:
            SaveError: the same on every rank: what one of them met.
        """
        gone = self.on_main("making room", lambda writer: writer.make_room(step))
        self._tidy_parts(step)
        return gone

    def _describe(
        self, part: Part, manifest: Manifest, reports: Sequence[Report], moved: bool
    ) -> tuple[Manifest, dict[str, Any]]:
        """Main process: every part is written. Take in what libraries wrote; the manifest of it
        all, and what the log is to tell (see `Saved.facts`).

        Raises:
            StaleError: what was written is the state of another step.
        """
        files = {name: entry for report in reports for name, entry in report.files.items()}
        began = time.perf_counter()
        for name in {name for report in reports for name in report.shares}:
            shares = {r.rank: r.shares[name] for r in reports if name in r.shares}
            size = next(iter(shares.values())).size
            digest = digest_of_joint(part.folder / name, shares)
            files[name] = FileEntry(part.rank, size, digest)
        part.adopt_unclaimed(set(files))
        if part.error:
            raise part.error
        facts = facts_of(reports) | {"read_back": round(time.perf_counter() - began, 4)}
        writer = self._writer()
        manifest = replace(
            manifest,
            run_id=writer.run_id,
            attempt=writer.attempt,
            parent=self.parent,
            saved_at=now(),
            save_seconds=facts["stall"],
            files={**files, **part.report.files},
        )
        if moved and self.before is not None:
            stale = stale_files(self.before, manifest)
            if stale:
                raise StaleError(self.before.global_step, stale)
        return manifest, facts

    def _commit(self, draft: Draft, reports: list[Report], told: Mapping[str, Any]) -> Saved:
        """Main process: commit, prune."""
        manifest, facts = draft.of(reports)
        writer, parts = self._writer(), self.parts
        if parts is None:
            checkpoint = writer.commit(manifest, **facts, **told)
        else:
            names = parts.written_here(manifest)
            checkpoint = commit_part(writer, manifest, names, **facts, **told)
        self.before = manifest
        return after_commit(writer, checkpoint, facts)

    def _tidy_parts(self, step: int) -> None:
        """A save has come to its end: on the other machines goes what the main process has not, and
        what is left of a save that failed. Ranks: all (collective)."""
        parts = self.parts
        if parts is None:
            return
        there = self.on_main("looking at what is kept", lambda writer: writer.steps())
        self.on_all("pruning", lambda: parts.tidy(step, there))

    def _commit_parts(self, flight: Flight, parts: NodeParts) -> list[Cause]:
        """All machines but the main process's commit what they have written; returns why one could
        not. Ranks: all (collective)."""
        what, step = not_saved(flight.step), flight.step
        flight.heard = collectives.gather(flight.part.report)
        if any(report.error for report in flight.heard):
            return []  # the main process tells of it
        try:
            manifest = self.on_main(what, lambda writer: self._draft.of(flight.heard)[0], step)
            self.on_all(what, lambda: parts.commit(manifest), step)
        except SaveError as error:
            return list(error.causes)
        return []
