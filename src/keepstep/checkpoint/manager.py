"""The life of a checkpoint: stage → write → commit → prune → point.

`CheckpointManager` is collective: every rank holds one and calls it at the same step. What it
decides or changes in the run folder, the main process does (`RunWriter`) and the others hear.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from .. import distributed
from ..outcome import Outcome
from .arena import Arena, free_host_memory
from .flight import Flight, SaveError
from .joint import digest_of_joint
from .lineage import Attempt
from .manifest import FileEntry, Manifest, differences, drift, missing_state
from .retention import Policy
from .runfolder import Committed, RunFolder
from .runwriter import RunWriter, Saved, now
from .selection import Choice, SelectionError
from .storage import Storage, sizes_of
from .writer import Part, Report

logger = logging.getLogger(__name__)

T = TypeVar("T")
Depth = Literal["auto", "digests", "sizes", "off"]
Mode = Literal["lazy", "snapshot", "off"]
MEMORY_SHARE = 0.9  # of the free host memory that snapshots may take
LAST_WAIT_SECONDS = 10.0  # for the other ranks' parts, when an attempt ends in an error


class DriftError(ValueError):
    """The run's settings are not those that its checkpoint was made with."""


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
        world_size: processes of this attempt.
        zero_stage: DeepSpeed's ZeRO stage of this attempt, 0 for DDP or a single process.
    """

    request: str = "auto"
    settings: Mapping[str, Any] | None = None
    allow_drift: Sequence[str] = ()
    verify: Depth = "auto"
    patience: int = 3
    weights_only: bool = False
    world_size: int = 1
    zero_stage: int = 0


class CheckpointManager:
    """One attempt's checkpoints. Ranks: all call each method, at the same step (collective).

    While a save is in flight its thread alone uses the main process's writer.

    Attributes:
        mode: how a save is written: `lazy` and `snapshot` in the background, out of the arena that
            `reserve` has set aside, copied until the next optimizer step or at once; `off` in the
            foreground.
        timeout: seconds that one save may take.
    """

    def __init__(
        self,
        output_dir: str | Path,
        policy: Policy,
        storage: Storage | None = None,
        mode: Mode = "off",
        timeout: float = 600.0,
    ) -> None:
        self.run = RunFolder(output_dir)
        self.storage = storage or Storage()
        self.policy = policy
        self.mode: Mode = mode
        self.timeout = timeout
        self.arena: Arena | None = None
        self.attempt = 0
        self.previous: Attempt | None = None
        self._writer: RunWriter | None = None
        self._parent: int | None = None
        self._flight: Flight | None = None
        self._waited = 0.0

    def start(self) -> None:
        """Begin an attempt. Ranks: all (collective)."""

        def begin() -> tuple[int, Attempt | None]:
            before = [a for a in self.run.attempts() if a.request is not None or a.commits][-1:]
            self._writer = RunWriter(self.run, self.policy, self.storage)
            self._writer.start()
            return self._writer.attempt, before[0] if before else None

        self.attempt, self.previous = distributed.on_main_process("starting the attempt", begin)

    def choose(self, resume: Resume) -> tuple[Committed | None, Choice]:
        """The checkpoint to resume from, None for the beginning. Ranks: all (collective).

        The main process decides and verifies; damaged checkpoints that were passed by go to
        quarantine; then every rank confirms that it sees the same files.

        Raises:
            SelectionError: what is asked for cannot be had (NoProgressError: not any more).
            DriftError: the settings have changed; the message lists them.
        """
        outcome = distributed.on_main_process("choosing", lambda: _caught(self._decide, resume))
        if isinstance(outcome, Exception):
            raise outcome
        chosen, choice = outcome
        self._confirm(chosen, resume.verify)
        self._parent = chosen.step if chosen and not choice.weights_only else None
        if chosen is not None and resume.verify != "off":
            self._on_main("pruning", lambda writer: writer.prune_after_verifying(chosen))
        return chosen, choice

    def reserve(self, size: int) -> str | None:
        """Set host memory for snapshots of `size` bytes aside. Ranks: all (collective).

        Returns: why it cannot be had, the same on every rank. Then saves stay in the foreground.
        """
        wishes = distributed.gather((socket.gethostname(), size, free_host_memory()))
        for host in {host for host, _, _ in wishes}:
            needed = sum(size for other, size, _ in wishes if other == host)
            free = min(free for other, _, free in wishes if other == host)
            if needed > free * MEMORY_SHARE:
                self.mode = "off"
                return (
                    f"{host} has {free / 1e9:.3g} GB of memory left, and snapshots of its ranks "
                    f"take {needed / 1e9:.3g} GB"
                )
        self.arena = Arena(size)
        return None

    def save(self, manifest: Manifest, write: Callable[[Part], None]) -> None:
        """Begin a save: it is on its way when this returns, or (`off`) at its end.

        What came of it, `settle()` tells. Ranks: all (collective).

        Args:
            manifest: what is known of this step; run, attempt, parent, files, times are filled in.
            write: stores this rank's files through the given `Part`; it may be collective.

        Raises:
            SaveError: on every rank: it cannot begin.
        """
        started = time.perf_counter() - self._waited
        waited, self._waited = self._waited, 0.0
        step = manifest.global_step
        if self._flight is not None:
            raise SaveError(
                f"checkpoint-{step} was not saved: the one of step {self._flight.step} is not done"
            )
        staged, reports = self._on_main("staging", lambda w: (w.stage(step), w.reports(step)))
        background = self.arena is not None and self.mode != "off"
        part = Part(staged, distributed.rank(), self.storage, self.arena if background else None)
        write(part)
        part.begin_copy()
        if self.mode == "snapshot":
            part.copy()
        self._flight = Flight(step, part, reports, self.storage, self.timeout)
        part.report.seconds |= {"wait": waited, "stall": time.perf_counter() - started}

        def commit(ranks: list[Report]) -> Saved:
            if not background:
                ranks[0].seconds["stall"] = time.perf_counter() - started
            return self._commit(part, manifest, ranks)

        self._flight.begin(
            distributed.world_size(), commit if distributed.is_main() else None, background
        )

    def has_news(self) -> bool:
        """Whether this rank knows that the save in flight has ended, or should have. Ranks: any."""
        return self._flight is not None and not self._flight.told and self._flight.ended

    def hold(self) -> None:
        """Called before every optimizer step: what is still being copied must not change yet.

        Ranks: any, not collective.
        """
        if self._flight is not None and self.arena is not None and not self.arena.copied.is_set():
            started = time.perf_counter()
            self.arena.hold()
            self._flight.part.report.seconds["stall"] += time.perf_counter() - started

    def settle(self) -> Saved | None:
        """Wait for the save in flight; None when there is none. Ranks: all (collective).

        Raises:
            SaveError: on every rank, when one of them could not write. Nothing of it is left.
        """
        flight = self._flight
        if flight is None:
            return None
        started = time.perf_counter()
        flight.wait_written()
        heard = distributed.gather((flight.failure, flight.running and not flight.written.is_set()))
        failures = [f"rank {r}: {failure}" for r, (failure, _) in enumerate(heard) if failure]
        saved, reason, stuck = self._on_main(
            "waiting for the save", lambda writer: _outcome(writer, flight, failures)
        )
        flight.told = True
        if not (stuck or any(busy for _, busy in heard)):
            self._flight = None
        self._waited = time.perf_counter() - started
        if saved is None:
            raise SaveError(f"checkpoint-{flight.step} was not saved: {reason}")
        return saved

    def best(self) -> Committed | None:
        """The best committed checkpoint. Ranks: all (collective)."""
        return self._on_main("looking up the best checkpoint", lambda writer: writer.best())

    def was_finished_at(self, checkpoint: Committed | None, planned_steps: int) -> bool:
        """Whether the attempt before this one finished at this checkpoint, with the same plan.

        (A run that stopped early is finished before its last planned step.) Ranks: any.
        """
        return (
            checkpoint is not None
            and self.previous is not None
            and self.previous.outcome == "finished"
            and self.previous.reached == checkpoint.step
            and checkpoint.manifest.planned_steps == planned_steps
        )

    def end(self, outcome: Outcome) -> None:
        """Write how the attempt ended, for shells and for the record.

        Ranks: any; the main process writes, and the first of each machine tells its shell. Not
        collective: a failed rank comes alone.
        """
        if self._flight is not None:  # training has failed; what is on its way may still arrive
            self._flight.wait_written()
            self._flight.wait(at_most=LAST_WAIT_SECONDS)
        outcome.tell_shell()
        if self._writer is not None:
            self._writer.end(outcome.as_json())

    @property
    def writer(self) -> RunWriter:
        """The main process's writer."""
        if self._writer is None:
            raise RuntimeError("start() was not called, or this is not the main process")
        return self._writer

    def _on_main(self, what: str, action: Callable[[RunWriter], T]) -> T:
        try:
            return distributed.on_main_process(what, lambda: action(self.writer))
        except Exception as error:  # the other ranks have it as a RankError, whatever it is here
            raise SaveError(f"{what}: {type(error).__name__}: {error}") from error

    def _decide(self, resume: Resume) -> tuple[Committed | None, Choice]:
        """Main process: select, quarantine, check for drift, and write it down."""

        def verify(step: int) -> list[str]:
            return self._faults(self.run.checkpoint(step), resume.verify)

        chosen, choice = self.writer.select(
            resume.request, verify, resume.patience, resume.weights_only
        )
        if chosen is not None and chosen.path.parent != self.run.path:
            faults = self._faults(chosen, resume.verify)
            if faults:
                raise SelectionError(f"{resume.request} is damaged: {'; '.join(faults)}")
        # A run that is under way goes on with its whole state, whatever it began with.
        weights_only = resume.weights_only and not choice.under_way
        if chosen is not None and not weights_only:
            _check_state(chosen, resume)
            changed = drift(chosen.manifest.settings, resume.settings or {}, resume.allow_drift)
            if changed:
                raise DriftError(_drift_report(chosen, changed))
        choice = replace(choice, weights_only=weights_only)
        self.writer.record_resume(resume.request, resume.weights_only, chosen, choice)
        return chosen, choice

    def _faults(self, checkpoint: Committed, depth: Depth) -> list[str]:
        if depth == "off":
            return []
        return self.run.faults(checkpoint, {"auto": None, "digests": True, "sizes": False}[depth])

    def _confirm(self, chosen: Committed | None, depth: Depth) -> None:
        """Every rank sees the files that the main process has verified. Ranks: all (collective)."""
        seen: list[str] = []
        if chosen is not None and depth != "off":
            try:
                seen = differences(chosen.manifest, sizes_of(chosen.path, chosen.manifest.files))
            except OSError as error:
                seen = [str(error)]
        where = f"rank {distributed.rank()} on {socket.gethostname()}"
        found = [
            f"{who}: {faults[0]}" for who, faults in distributed.gather((where, seen)) if faults
        ]
        if found:
            raise SelectionError(
                "the checkpoint is not the same for every rank; is output_dir on a filesystem "
                f"that all nodes share? {'; '.join(found)}"
            )

    def _commit(self, part: Part, manifest: Manifest, reports: Sequence[Report]) -> Saved:
        """Main process: every part is written. Take in what libraries wrote, commit, prune."""
        files = {name: entry for report in reports for name, entry in report.files.items()}
        for name in {name for report in reports for name in report.shares}:
            shares = {r.rank: r.shares[name] for r in reports if name in r.shares}
            size = next(iter(shares.values())).size
            digest = digest_of_joint(part.folder / name, shares)
            files[name] = FileEntry(part.rank, size, digest)
        part.adopt_unclaimed(set(files))
        if part.error:
            raise part.error
        facts = _facts(reports)
        checkpoint = self.writer.commit(
            replace(
                manifest,
                run_id=self.writer.run_id,
                attempt=self.writer.attempt,
                parent=self._parent,
                saved_at=now(),
                save_seconds=facts["stall"],
                files={**files, **part.report.files},
            ),
            **facts,
        )
        return _finish(self.writer, checkpoint, facts)


def _outcome(
    writer: RunWriter, flight: Flight, failures: Sequence[str]
) -> tuple[Saved | None, str, bool]:
    """Main process: the commit, or why there is none; and whether the thread still works on it."""
    if failures:
        flight.cancel()
    elif flight.running:
        flight.wait()
    else:
        flight.finish()
    if flight.saved is not None:
        return flight.saved, "", False
    reason = "; ".join(failures) or flight.error or "the commit is stuck"
    if not flight.running and not flight.told:
        try:
            writer.discard(flight.step, reason)
        except OSError as error:  # a rank that is stuck still writes there; the next start sweeps
            logger.warning("not all of checkpoint-%s could be removed: %s", flight.step, error)
    return None, reason, flight.running


def _facts(reports: Sequence[Report]) -> dict[str, Any]:
    """See `Saved.facts`."""
    names = ("stall", "wait", "copy", "write", "digest")
    seconds = {n: round(max(r.seconds.get(n, 0.0) for r in reports), 4) for n in names}
    slowest = max(reports, key=lambda report: report.seconds.get("write", 0.0))
    rate = sum(r.bytes for r in reports) / max(seconds["write"], 1e-9) / 1e9
    return {**seconds, "gb_per_s": round(rate, 3), "slowest_rank": slowest.rank}


def _finish(writer: RunWriter, checkpoint: Committed, facts: dict[str, Any]) -> Saved:
    """Main process: after a commit the links, then retention, then the links once more.

    The checkpoint is there whatever happens here; what cannot be pruned now goes at the next save.
    """
    pruned: list[int] = []
    try:
        writer.point()
        pruned = writer.prune()
        writer.point()
    except OSError as error:
        logger.warning("%s is saved, but pruning failed: %s", checkpoint.path.name, error)
    return Saved(checkpoint, writer.best(), pruned, facts)


def _check_state(checkpoint: Committed, resume: Resume) -> None:
    manifest, name = checkpoint.manifest, checkpoint.path.name
    missing = missing_state(manifest)
    if missing:
        raise SelectionError(
            f"{name} holds weights, not the state to go on from: it has no {', '.join(missing)}\n"
            "    Hint: resume_weights_only: true starts anew with its weights."
        )
    written = (manifest.world_size, manifest.zero_stage)
    here = (resume.world_size, resume.zero_stage)
    if written != here:
        raise SelectionError(
            f"{name} was written by {written[0]} processes with ZeRO stage {written[1]}; this "
            f"attempt has {here[0]} with stage {here[1]} (0: DDP)\n"
            f"    Hint: launch {written[0]} processes with the config that the run began with."
        )


def _drift_report(checkpoint: Committed, changed: Sequence[str]) -> str:
    names = ", ".join(line.split(":")[0] for line in changed)
    listing = "\n".join(f"    {line}" for line in changed)
    return (
        f"settings have changed since {checkpoint.path.name} was made:\n{listing}\n"
        f"    Hint: set them back, or accept by name: allow_drift: [{names}]"
    )


def _caught(action: Callable[[Resume], T], resume: Resume) -> T | Exception:
    """The value, or the error that every rank is to raise."""
    try:
        return action(resume)
    except (SelectionError, DriftError) as error:
        return error
