"""The life of a checkpoint: stage → write → commit → prune → point.

`CheckpointManager` is collective: every rank holds one and calls it at the same step. What it
decides or changes in the run folder, the main process does (`RunWriter`) and the others hear.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from keepstep.output.printable import quoted
from keepstep.policy.completeness import has_weights
from keepstep.policy.drift import drift
from keepstep.policy.lineage import Finish, last_finish, newest_hang
from keepstep.policy.manifest import ManifestError
from keepstep.policy.retention import Policy
from keepstep.policy.rewind import decided_since
from keepstep.policy.selection import Choice, SelectionError, UnreadableError
from keepstep.policy.standstill import Bound
from keepstep.ranks import collectives, signals
from keepstep.ranks.console import progress, say
from keepstep.ranks.nodes import Nodes
from keepstep.ranks.outcome import Outcome, is_persons
from keepstep.ranks.time_sheet import TimeSheet
from keepstep.run_folder.heartbeat import Lookout
from keepstep.run_folder.keeping import now
from keepstep.run_folder.metrics import metrics_of, show_metrics
from keepstep.run_folder.ownership import WAIT_SECONDS, NotOwnerError, Owner, claim, job_facts
from keepstep.run_folder.parts import whole_of
from keepstep.run_folder.place import Place
from keepstep.run_folder.progress import Reached
from keepstep.run_folder.reader import Checkpoint, RunFolder, read_checkpoint
from keepstep.run_folder.storage import Storage
from keepstep.run_folder.writer import RunWriter, Saved
from keepstep.save.node_parts import NodeParts
from keepstep.save.reach import Elsewhere, Reach
from keepstep.save.resume_checks import (
    Depth,
    DriftError,
    Resume,
    agreed_batch,
    check_sight,
    check_state,
)
from keepstep.save.saver import Mode, Saver

logger = logging.getLogger(__name__)


class CheckpointManager:
    """One attempt's checkpoints. Ranks: all call each method, at the same step (collective).

    Attributes:
        saver: makes checkpoints.
        chosen: the checkpoint to go on from with its whole state, None for the beginning.
        suspect: on the main process: see `Standstills.suspect`.
        finish: how the run was finished that this attempt goes on with; None: it was not.
        training: everything is built, and what follows depends on what the attempt resumes from.
        time_sheet: what this attempt's time goes into.
        figures: what it shows of itself, on the main process: see `metrics.FIGURES`.
        heard: on the main process, is told of each event, once `start()` is called.
    """

    def __init__(
        self,
        output_dir: str | Path,
        policy: Policy,
        storage: Storage | None = None,
        mode: Mode = "off",
        timeout: float = 600.0,
        min_free: int = 0,
    ) -> None:
        self.run = RunFolder(output_dir)
        self.storage = storage or Storage()
        self.policy = policy
        self.min_free = min_free
        self.saver = Saver(lambda: self.writer, self.storage, mode, timeout)
        self.attempt = 0
        self.chosen: Checkpoint | None = None
        self.finish: Finish | None = None
        self.suspect: int | None = None
        self.training = False
        self._owner: Owner | None = None
        self._writer: RunWriter | None = None
        self._lookout: Lookout | None = None
        self._beats = 0
        self.time_sheet = TimeSheet()
        self.figures: dict[str, float] = {}
        self.heard: Callable[[Mapping[str, Any]], None] = lambda event: None
        self._given_up: str | None = None
        self._reach = Reach(self.run)

    def start(self, elsewhere: Elsewhere | None = None, nodes: Nodes | None = None) -> None:
        """Begin an attempt, as the owner of the run. Ranks: all (collective).

        Args:
            elsewhere: where checkpoints lie beside the run folder.
            nodes: the machines, where the run folder is each machine's own; None: all see one.

        Raises:
            NotOwnerError: another attempt has the run; and whatever `elsewhere` raises.
        """
        parts = None if nodes is None else NodeParts(nodes, self.run, self.storage)
        reach = self._reach = Reach(self.run, parts, elsewhere)
        known: set[str] = set()

        def waits(who: str) -> bool:
            if who not in known:
                known.add(who)
                say(f"{who} trains this run: waiting {WAIT_SECONDS:.0f} s for its end")
            return signals.requested() is None

        def begin() -> tuple[str, int, str]:
            owner = claim(self.run, self.storage, waits=waits)
            self.storage.guard(owner.check)
            with self.time_sheet.within("restore"):
                reach.bring(self.storage, owner.token)
            self._writer = RunWriter(self.run, self.policy, self.storage, owner.token)
            self._writer.min_free = self.min_free
            self._writer.heard = self.heard
            self._writer.start(**job_facts(), spent=self.time_sheet.told())
            if parts is None and self.run.place.exists():  # this machine goes on alone
                place = Place.alone(elsewhere.url if elsewhere is not None else None)
                self.storage.replace(self.run.place, place.as_text())
            return owner.token, self._writer.attempt, self._writer.run_id

        token, self.attempt, run_id = collectives.on_main("starting the attempt", begin)
        self._owner = Owner(self.run, token)
        if parts is not None:
            mirror = elsewhere.url if elsewhere is not None else None
            told = token, self._writer, (run_id, self.attempt - 1), mirror
            collectives.on_all("taking over the other machines", lambda: parts.begin(*told))
            self.saver.parts = parts
        if not collectives.is_main():
            self.storage.guard(self._owner.check)

    def owned(self) -> bool:
        """Whether the run is still this attempt's, as far as can be seen. Ranks: any."""
        return self._given_up is None and self._folder_is_owned()

    def _folder_is_owned(self) -> bool:
        """The same of its folder: a machine that has lost the run on the mirror has that still."""
        try:
            if self._owner is not None:
                self._owner.check()
        except NotOwnerError:
            return False
        except OSError:  # a network filesystem that fails for a moment
            pass
        return True

    def confirm(self) -> None:
        """See to it that the run is still this attempt's. Ranks: all (collective).

        Raises:
            NotOwnerError: on every rank: it has a newer owner, and this attempt ends.
        """
        collectives.on_main("looking up the owner", self._check)

    def give_up(self, reason: str) -> None:
        """The run is another machine's: every rank ends as soon as it hears. Main process."""
        self._given_up = reason
        self.lookout().given_up = True

    def _check(self) -> None:
        if self._given_up is not None:
            raise NotOwnerError(self._given_up, path=self.run.path)
        if self._owner is not None:
            self._owner.check()

    def beat(self) -> None:
        """The attempt gets on; its lookout shows that outside. Ranks: any."""
        self._beats += 1

    def lookout(self) -> Lookout:
        """Who looks at the run folder beside this thread, until the attempt ends. Main process."""
        if self._lookout is None:
            if self._owner is None:
                raise RuntimeError("start() was not called")
            told = self._progress, self._show, self.time_sheet.stopped
            self._lookout = Lookout(self.run, self.storage, self._owner, lambda: self._beats, *told)
            self._lookout.start()
        return self._lookout

    def _progress(self) -> Reached:
        step, spent = self.time_sheet.now()
        return Reached(now(), self.attempt, step, spent, dict(self.figures))

    def _show(self, reached: Reached, end: Outcome | None = None) -> None:
        ended = (None, 0) if end is None else (end.outcome, end.exit)
        name = self.run.path.resolve().name
        show_metrics(self.run, self.storage, metrics_of(reached, name, self.writer.run_id, *ended))

    def choose(self, resume: Resume) -> tuple[Checkpoint | None, Choice]:
        """The checkpoint to resume from, None for the beginning. Ranks: all (collective).

        The main process decides and verifies; damaged checkpoints that were passed by go to
        quarantine, what cannot be read now stays; then every rank confirms that it sees the files.

        Raises:
            SelectionError: what is asked for cannot be had (NoProgressError: not any more).
            DriftError: the settings have changed; the message lists them.
            UnreadableError: no checkpoint can be read now.
        """
        with self.time_sheet.within("restore"):
            chosen, choice, self.finish = collectives.on_main(
                "choosing the checkpoint", lambda: self._decide(resume)
            )
            self._reach.complete(chosen, at_start=resume.parallel_layout)
            collectives.on_all(
                "looking at the checkpoint", lambda: check_sight(chosen, resume.verify)
            )
        self.chosen = None if choice.weights_only else chosen
        self.saver.parent = self.chosen.step if self.chosen else None
        self.saver.before = self.chosen.manifest if self.chosen else None
        if chosen is not None and resume.verify != "off":
            self.saver.on_main("pruning", lambda writer: self._prune_after(writer, chosen))
        return chosen, choice

    def _prune_after(self, writer: RunWriter, chosen: Checkpoint) -> None:
        writer.prune_after_verifying(chosen)
        self._reach.discard_lost(writer, chosen.step)

    def compare(
        self,
        start: Checkpoint,
        settings: Mapping[str, Any],
        accepted: Sequence[str],
        why: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Compare settings that are known once the model is built. Ranks: all (collective).

        Args:
            start: what the attempt goes on from.
            settings: as this attempt has them.
            accepted: names of those that may differ.
            why: name → why it is what it is, where that is known.

        Raises:
            DriftError: on every rank: on one of them they are not those of the checkpoint.
        """

        def check() -> None:
            changed = drift(start.manifest.settings, settings, accepted)
            names = [line.split(":")[0] for line in changed]
            told = [f" ({why[name]})" if why.get(name) else "" for name in names]
            if changed:
                raise DriftError(start, [a + b for a, b in zip(changed, told, strict=True)])

        collectives.on_all("comparing the model's settings", check)

    def best(self) -> Checkpoint | None:
        """The best committed checkpoint. Ranks: all (collective)."""
        return self.saver.on_main("looking up the best checkpoint", lambda writer: writer.best())

    def best_to_load(self) -> Checkpoint | None:
        """The same, with all that this machine's ranks will load of it. Ranks: all (collective)."""

        def find(writer: RunWriter) -> Checkpoint | None:
            best = writer.best()
            return None if best is None else whole_of(best)

        best = self.saver.on_main("looking up the best checkpoint", find)
        self._reach.complete(best)
        return best

    def fault_of(self, saved: Saved | None) -> str | None:
        """Why a commit is not what was told of it: looked at on the disk. None: nothing is wrong,
        or nothing was committed. Ranks: all (collective)."""

        def look() -> str | None:
            if saved is None:
                return None
            try:
                faults = self.run.state_of(read_checkpoint(saved.checkpoint.path))
            except (ManifestError, UnreadableError) as error:
                return str(error)
            return f"{saved.checkpoint.path.name}: {faults[0]}" if faults else None

        return collectives.on_main("looking at the newest checkpoint", look)

    def record_finish(self, step: int, plan: Mapping[str, Any]) -> None:
        """The run is finished at this step. Ranks: all (collective)."""
        self.saver.on_main("recording", lambda writer: writer.record_finish(step, dict(plan)))

    def begin_training(self) -> None:
        """From here on the attempt loads what it resumes from: if it dies, that may be why.

        Ranks: all (collective).
        """
        if not self.training:
            self.training = True
            self.saver.on_main("recording", lambda writer: writer.record("training"))

    def first_step(self, step: int, seconds: Mapping[str, float]) -> None:
        """Write down how long it took to come to the attempt's first step. Ranks: any; the main
        process writes."""
        if self._writer is not None and self.owned():
            with contextlib.suppress(NotOwnerError):  # since then; all ranks will hear of it
                self._writer.record("first_step", step=step, seconds=dict(seconds))

    def stop_asked(self, by: str) -> None:
        """Write down that somebody wants a stop: a kill that follows is not the checkpoint's fault.

        Ranks: any, any thread; the main process writes.
        """
        if self._writer is not None and is_persons(by) and self.owned():
            self._writer.record("stop_asked", signal=by)

    def record_hang(self, step: int, bound: Bound) -> None:
        """Write down that a rank was pronounced stuck, by a learnt bound: the next attempt gives it
        longer there. Ranks: any, any thread; the main process writes."""
        if self._writer is not None and self.owned():
            seconds = round(bound.seconds, 1)
            self._writer.record("hang", step=step, phase=bound.phase, seconds=seconds)

    def end(self, outcome: Outcome) -> None:
        """Write how the attempt ended, for shells and for the record.

        Ranks: any; the main process writes, and the first of each machine tells its shell. Not
        collective: a failed rank comes alone.
        """
        self.saver.wait_alone()
        if self._lookout is not None:
            self._lookout.stop()
        outcome.tell_shell()
        if self._writer is not None and self._folder_is_owned():
            self._writer.end(outcome.as_json(), spent=self.time_sheet.told())
            with self._writer.setbacks.allowed("metrics.prom does not tell of the end"):
                self._show(self._progress(), outcome)
        if self.saver.parts is not None and self.owned():
            self.saver.parts.end(outcome.as_json())

    @property
    def writer(self) -> RunWriter:
        """The main process's writer."""
        if self._writer is None:
            raise RuntimeError("start() was not called, or this is not the main process")
        return self._writer

    def _decide(self, resume: Resume) -> tuple[Checkpoint | None, Choice, Finish | None]:
        """Main process: select, quarantine, check for drift, and write it down."""

        def verify(step: int) -> list[str]:
            found = self.run.checkpoint(step)
            faults = self._faults(found, resume.verify)
            if faults and self._reach.mended(found, self.writer):
                told = "%s was damaged here, and is brought once more: %s"
                logger.warning(told, found.path.name, faults[0])
                return self._faults(self.run.checkpoint(step), resume.verify)
            return faults

        attempts = self.run.attempts()
        finish, self.suspect = last_finish(attempts, resume.recipe), newest_hang(attempts)
        chosen, choice = self.writer.select(
            *(resume.request, verify, resume.patience, resume.weights_only, resume.recipe),
            takeable=self._reach.takeable(),
        )
        if chosen is None:
            self._reach.check_beginning(choice, resume.request)
        choice = replace(choice, passed_by={**self._reach.lost(choice), **choice.passed_by})
        chosen = None if chosen is None else whole_of(chosen)
        if chosen is not None and chosen.path.parent != self.run.path:
            faults = self._faults(chosen, resume.verify)
            if faults:
                raise SelectionError(
                    f"{resume.request} is damaged: {'; '.join(faults)}",
                    step=chosen.step,
                    path=chosen.path,
                )
        # A run that is under way goes on with its whole state, whatever it began with.
        weights_only = resume.weights_only and not choice.under_way
        if chosen is not None and not weights_only:
            check_state(chosen, resume)
            choice = replace(choice, batch=agreed_batch(chosen, resume))
        elif chosen is not None and not has_weights(chosen.manifest):
            raise SelectionError(
                f"{chosen.path.name} holds no weights file (save_weights)\n"
                f"    Hint: keepstep export {quoted(chosen.path)} --to DIR, and "
                "model_name_or_path: DIR",
                step=chosen.step,
                path=chosen.path,
            )
        of_this_run = self._start_of(chosen, weights_only)
        rewinds = decided_since(self.run.rewinds(), of_this_run)
        choice = replace(choice, weights_only=weights_only, rewinds=rewinds)
        self.writer.record_resume(
            resume.request, resume.weights_only, chosen, choice, resume.recipe
        )
        if weights_only or not self._goes_on(finish, chosen, resume.request, choice):
            finish = None
        return chosen, choice, finish

    def _start_of(self, chosen: Checkpoint | None, weights_only: bool) -> int | None:
        """The attempt that wrote what is gone on from; None: it is no state of this run."""
        if chosen is None or weights_only or chosen.path.parent != self.run.path:
            return None
        return chosen.manifest.attempt

    def _goes_on(
        self, finish: Finish | None, chosen: Checkpoint | None, request: str, choice: Choice
    ) -> bool:
        """Whether an attempt goes on where the run was finished, and has not been sent back."""
        if finish is None or (chosen is not None and chosen.path.parent != self.run.path):
            return False
        step = chosen.step if chosen else None
        onward = request in ("auto", "latest") or choice.under_way or step == finish.step
        return onward and step == finish.newest

    def _faults(self, checkpoint: Checkpoint, depth: Depth) -> list[str]:
        if depth == "off":
            return []
        total = checkpoint.manifest.total_bytes
        with progress(f"verifying {checkpoint.path.name}") as tell, self.run.reading(total, tell):
            deep = {"auto": None, "digests": True, "sizes": False}[depth]
            return self.run.faults(checkpoint, deep)
