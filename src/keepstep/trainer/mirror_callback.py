"""The mirror as a run uses it: brought from at the start, offered at every save, waited for at the
end."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from transformers import TrainerCallback

from keepstep.mirror import download, listing, owners
from keepstep.mirror.best import bring_best
from keepstep.mirror.listing import Listed
from keepstep.mirror.mirroring import Mirroring, Share
from keepstep.mirror.store import Store, StoreError
from keepstep.mirror.stores import open_store
from keepstep.output.progress import phases
from keepstep.output.units import human_bytes
from keepstep.policy.manifest import WHOLE_NAME, Manifest
from keepstep.policy.schedule import left
from keepstep.policy.selection import SelectionError, UnreadableError
from keepstep.policy.strict import TextError
from keepstep.ranks import collectives, signals
from keepstep.ranks.console import progress, say, waiting
from keepstep.ranks.nodes import Nodes, look
from keepstep.ranks.outcome import EXIT_STATUS, Outcome
from keepstep.recipe.config import Recipe
from keepstep.run_folder.reader import Checkpoint, RunFolder
from keepstep.run_folder.storage import NotOwnerError, Storage
from keepstep.run_folder.writer import RunWriter
from keepstep.save.manager import CheckpointManager
from keepstep.save.node_parts import written_on
from keepstep.trainer.protocol import CheckpointedTrainer

# That a stop waits for a copy where nobody has said how long there is: clouds that take a machine
# back leave it half a minute to two minutes.
STOP_SECONDS = 60.0


class Mirrored(TrainerCallback):
    """A run's mirror. Nothing without one, and on other ranks than the first of each machine, which
    sends what the machine's ranks have written.

    Attributes:
        nodes: the machines; None: there is one, or no mirror. Known once `look` has been called.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.nodes: Nodes | None = None
        self._steps: frozenset[int] | None = None
        self._args = recipe.training
        self._url = self._args.mirror_url
        self._owner: owners.Owner | None = None
        self._trainer: CheckpointedTrainer | None = None
        self._mirroring: Mirroring | None = None

    def look(self) -> None:
        """Which machines there are. Ranks: all (collective)."""
        nodes = look() if self._url is not None else None
        self.nodes = nodes if nodes is not None and len(nodes) > 1 else None

    def bring(
        self, run: RunFolder, storage: Storage, token: str, together: Collection[int] | None
    ) -> None:
        """Become the run's owner on the mirror; the newest checkpoint into the run folder, if it is
        newer than what is there. Ranks: the main process.

        Args:
            together: the steps that all machines have together, each a part; None: they see one
                folder.

        Raises:
            SelectionError: there is no such mirror, or it is another run's.
            UnreadableError: it cannot be read now, and nothing else is there to go on from.
            OSError: of the disk.
        """
        if self._url is None:
            return
        try:
            store = open_store(self._url)
            download.check_run(run, store)
            self._owner = owners.claim(store, token)
            with progress("fetching from the mirror") as tell:
                found = download.bring(run, storage, store, run.staging / token, together, tell)
        except StoreError as error:
            if error.fatal:
                raise SelectionError(f"mirror: {error}") from error
            if not (run.is_used() if together is None else together):
                told = (
                    f"mirror: {error}\n    Whether it holds a checkpoint of the run is not known."
                )
                raise UnreadableError(told) from error
            say(f"mirror: {error}\n    The run goes on from its folder; a later save is copied.")
            return
        self._steps = frozenset(found.listed.copies)
        for name, why in found.passed_by.items():
            say(f"mirror: {name} is passed by: {why}")
        self._tell_brought(found.checkpoint, "")
        self._bring_best(run, storage, store, token, found.listed)

    def _bring_best(
        self, run: RunFolder, storage: Storage, store: Store, token: str, listed: Listed
    ) -> None:
        """What a run can go on without is no reason not to."""
        try:
            staging, policy = run.staging / token, self._args.policy()
            with progress("fetching the best from the mirror") as tell:
                best = bring_best(run, storage, store, staging, policy, listed, tell)
            self._tell_brought(best, " (the best)")
        except NotOwnerError:
            raise
        except (OSError, TextError) as error:
            say(f"mirror: the best checkpoint is not brought: {error}")

    def _tell_brought(self, checkpoint: Checkpoint | None, what: str) -> None:
        if checkpoint is not None:
            size = human_bytes(checkpoint.manifest.total_bytes)
            say(f"mirror: {checkpoint.path.name}{what} brought from {self._url}: {size}")

    @property
    def url(self) -> str | None:
        """The run's address there; None: there is no mirror."""
        return self._url

    def run_id(self) -> str | None:
        """Of the run that is there; None: none is, or nobody knows now. Ranks: the main process."""
        if self._url is None:
            return None
        try:
            runs = {c.manifest.run_id for c in listing.look(open_store(self._url)).found.values()}
        except StoreError:
            return None  # to bring something tells why
        return next(iter(runs)) if len(runs) == 1 else None

    @property
    def steps(self) -> frozenset[int] | None:
        """Of the checkpoints that were there at the start; None: that is not known. Ranks: the main
        process."""
        return self._steps

    def complete(self, chosen: Checkpoint, wanted: set[str], writer: RunWriter) -> None:
        """Have these files of what the main process has chosen on this machine. Ranks: the first of
        each machine.

        Raises:
            UnreadableError: it cannot be had now.
            OSError: of the disk.
        """
        assert self._url is not None  # else nothing is there
        try:
            with progress(f"fetching {chosen.path.name}") as tell:
                download.complete(chosen, wanted, writer, open_store(self._url), tell)
        except (StoreError, TextError) as error:
            raise UnreadableError(f"mirror: {error}", step=chosen.step) from error

    def start(self, trainer: CheckpointedTrainer) -> None:
        """Once the attempt has begun. Ranks: all (collective)."""
        self._trainer = trainer
        trainer.add_callback(self)
        if self._url is None:
            return
        if self.nodes is not None:
            self._owner = collectives.on_main("looking up the mirror's owner", lambda: self._owner)
        if collectives.is_main() or (self.nodes is not None and self.nodes.acts):
            args = self._args
            self._mirroring = Mirroring(
                trainer.manager.run,
                self._url,
                self._owner,
                args.mirror_policy(),
                trainer.manager.storage,
                pause=args.mirror_min_seconds,
                timeout=args.mirror_timeout_seconds,
                rate=args.mirror_rate,
                share=self._share(trainer.manager),
                every=args.mirror_every,
            )

    def _share(self, manager: CheckpointManager) -> Share | None:
        """What this machine sends; None: everything."""
        nodes, apart = self.nodes, self._args.node_local
        if nodes is None:
            return None

        def files(manifest: Manifest) -> list[str]:
            """Of a checkpoint of this attempt what this machine has written, and not what it was
            given since; of another one all that is here, where one machine sees all, that one."""
            if manifest.attempt != manager.attempt:
                return list(manifest.files) if apart or nodes.here == 0 else []
            written = written_on(nodes, nodes.here, manifest) | {WHOLE_NAME}
            return [name for name in manifest.files if name in written]

        return Share(nodes.here, len(nodes), apart, files)

    def on_checkpoint_committed(
        self, args: Any, state: Any, control: Any, *, checkpoint: Checkpoint, **kwargs: Any
    ) -> None:
        """Of several machines all begin to copy the same one, if none is at work still.

        Ranks: all (collective); nobody waits for a copy.
        """
        if self.nodes is None or self._trainer is None:
            return
        mirroring = self._mirroring
        if mirroring is not None:
            mirroring.hear()
        failure = mirroring.failure if mirroring is not None else None
        busy, failed = collectives.any_of(
            mirroring is not None and mirroring.is_busy, failure is not None
        )
        if busy and failed:  # what others send is waited for in vain
            failures = collectives.gather_some(_of_this_machine(failure, self.nodes))
            if mirroring is not None:
                mirroring.fail(next(iter(failures.values())))
        if not busy or failed:
            begun = collectives.on_main("choosing what is copied", self._begin)
            if begun is not None and mirroring is not None and not collectives.is_main():
                step, mirroring.owner = begun
                mirroring.begin_step(step)

    def _begin(self) -> tuple[int, owners.Owner] | None:
        """Main process: begin to copy what is to be copied next. Returns its step, and who copies;
        None: nothing."""
        saved, mirroring = self._trainer.last_saved if self._trainer else None, self._mirroring
        if mirroring is None or saved is None:
            return None
        wanted = mirroring.wanted(saved.checkpoint, saved.best)
        if wanted is not None and mirroring.owner is None:  # the store was away at the start
            mirroring.claim()
        elif wanted is not None and mirroring.owner is not None:
            mirroring.begin(wanted)
            if mirroring.is_busy:
                return wanted.step, mirroring.owner
        return None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._offer()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._offer()

    def _offer(self) -> None:
        if self._mirroring is None or self._trainer is None:
            return
        saved = self._trainer.last_saved
        if saved is not None and self.nodes is None:
            self._mirroring.offer(saved.checkpoint, saved.best)
        self._mirroring.hear()
        self._tell(self._mirroring, self._trainer.manager)

    def finish(self, outcome: Outcome, manager: CheckpointManager) -> Outcome:
        """Copy what an attempt leaves, if that has not been done. Ranks: any.

        A run that has finished with its newest or its best checkpoint missing there has not ended
        well: a machine that is taken away now takes it along.
        """
        newest, best = self._last(manager)
        mirroring = self._mirroring
        if mirroring is None:
            return outcome
        if mirroring.owes(newest) or mirroring.owes(best):
            say(f"The newest checkpoint is on its way to {self._url}: Ctrl-C ends this wait alone")
        seconds = self._args.mirror_timeout_seconds
        if outcome.outcome != "finished" and self._left() == float("inf"):
            seconds = min(seconds, STOP_SECONDS)
        shows = (  # one for each phase
            lambda: waiting(f"waiting for {self._url} …"),
            lambda: progress(f"sending to {self._url}"),
        )
        stop = self._why_stop(manager, outcome)
        with phases(shows) as tell:
            faults = mirroring.finish(newest, best, seconds, stop, tell)
        self._note_failures(mirroring, newest, best)
        self._tell(mirroring, manager)
        for fault in faults:
            say(f"Not mirrored: {fault}")
        if faults:
            say(mirroring.lacks())
        if not faults or outcome.outcome != "finished":
            return outcome
        return replace(outcome, reason="; ".join(faults), exit=EXIT_STATUS["failed"])

    def _note_failures(self, mirroring: Mirroring, *last: Checkpoint | None) -> None:
        """The main process would wait for this machine's parts of them. Ranks: any."""
        if self.nodes is None or collectives.is_main():
            return
        for checkpoint in last:
            if checkpoint is None:
                continue
            told = _of_this_machine(mirroring.came_of(checkpoint.step), self.nodes)
            if told is not None:
                collectives.leave_note(_note(checkpoint.step), told["error"])

    def _last(self, manager: CheckpointManager) -> list[Checkpoint | None]:
        """The newest and the best checkpoint, as this machine has them. Ranks: any; all
        (collective) where there are several machines."""

        def wanted() -> tuple[list[int | None], owners.Owner | None, list[int]]:
            found = manager.run.latest(), manager.run.best(manager.policy)
            if self._mirroring is not None:
                self._mirroring.hear()
            failed = self._mirroring.failed if self._mirroring is not None else []
            return [c.step if c else None for c in found], self._own(manager), failed

        if self._trainer is None or self._url is None:
            return [None, None]
        if self.nodes is not None:
            steps, owner, failed = collectives.on_main("looking at what is to be copied", wanted)
            if self._mirroring is not None:
                self._mirroring.owner = owner
                self._mirroring.owe(failed)
        elif self._mirroring is not None:
            steps, _, _ = wanted()
        else:
            return [None, None]
        here = {checkpoint.step: checkpoint for checkpoint in manager.run.checkpoints()}
        return [here.get(step) if step is not None else None for step in steps]

    def _own(self, manager: CheckpointManager) -> owners.Owner | None:
        """Main process, at the end: who copies, as all machines must know; None: the store is still
        away."""
        mirroring = self._mirroring
        if mirroring is None or mirroring.owner is not None or self.nodes is None:
            return mirroring.owner if mirroring else None
        assert self._url is not None
        try:
            return owners.claim(open_store(self._url), manager.run.owner() or "")
        except StoreError as error:
            say(f"mirror: {error}")
            return None

    def close(self) -> None:
        """An attempt that failed copies nothing more. Ranks: any."""
        if self._mirroring is not None:
            self._mirroring.abandon()

    def _why_stop(self, manager: CheckpointManager, outcome: Outcome) -> Callable[[], str | None]:
        """A scheduler that wants the machine back does not wait for a mirror. (One that has said so
        already has waited for the save, and for this copy as long as its time lasts.)"""
        asked_before = signals.requested()

        def why() -> str | None:
            manager.beat()
            if collectives.is_main() and manager.lookout().lost:
                return "the run belongs to a newer attempt"
            if signals.requested() != asked_before:
                return f"the wait was ended on request ({signals.requested()})"
            mirroring = self._mirroring
            if collectives.is_main() and mirroring is not None and mirroring.is_busy:
                note = collectives.note(_note(mirroring.step)) if self.nodes is not None else None
                if note is not None:
                    return note
            seconds = self._left()
            spare = self._args.stop_margin_seconds if outcome.outcome == "finished" else 5.0
            return "the job's time is over" if seconds < spare else None

        return why

    def _left(self) -> float:
        """Seconds of the job's time."""
        return left(self._args.schedule(), signals.steady(), time.time())

    def _tell(self, mirroring: Mirroring, manager: CheckpointManager) -> None:
        """What came of copies, to people and to the log; a run that is another machine's ends."""
        news, mirroring.news = mirroring.news, []
        if not collectives.is_main():  # a part that is not there is missed by the main process
            return
        for one in news:
            manager.writer.record("mirror", url=mirroring.url, **one)
        lines, mirroring.lines = mirroring.lines, []
        for line in lines:
            say(line)
        if mirroring.deposed:
            manager.give_up(mirroring.deposed)


def _note(step: int) -> str:
    return f"not-mirrored-{step}"


def _of_this_machine(failure: dict[str, Any] | None, nodes: Nodes) -> dict[str, Any] | None:
    """What came of a copy that has failed, with the machine's name."""
    if failure is None or "error" not in failure:
        return None
    return {**failure, "error": f"on {nodes.host}: {failure['error']}"}
