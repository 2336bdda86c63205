"""A trainer's saves: begun at a step, heard of later, and tried again where they failed."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any

from keepstep.policy.schedule import left as seconds_left
from keepstep.ranks import collectives, signals
from keepstep.recipe.trajectory import word
from keepstep.run_folder.ownership import NotOwnerError
from keepstep.run_folder.writer import Saved
from keepstep.save.failure import SaveError
from keepstep.trainer.protocol import CheckpointedTrainer

logger = logging.getLogger(__name__)

GO_ON = "Training goes on without it; the next save tries again."
AT_THE_END = "Training is over: it is tried again."
LONGEST_PAUSE = 30.0  # seconds between two tries of the last save
LOOK_SECONDS = 5.0  # between looks at a writer that is stuck


class Saving:
    """Every method but the properties is for all ranks (collective): they decide alike.

    Attributes:
        last_saved: the newest commit of this attempt, None before the first.
        try_again: a save found no room, and there is some now.
        taken: a step whose checkpoint's name belongs to something else: the next step is saved.
        due: the newest step at which a save was due, None before the first.
        error: why the newest save that failed did; None before the first.
    """

    def __init__(self, trainer: CheckpointedTrainer) -> None:
        self.last_saved: Saved | None = None
        self.try_again = self._trying_again = False
        self.taken: int | None = None
        self.due: int | None = None
        self.error: SaveError | None = None
        self._trainer = trainer
        self._saver = trainer.manager.saver
        self._begun: tuple[int, bool] | None = None
        self._steps_made: float | None = None  # by the optimizer, as it counts them, at `before`
        self._failed_since: set[int | None] = set()  # the newest commit: steps

    @property
    def complete(self) -> bool:
        """Whether the newest save that was due, or a later one, is committed."""
        saved = -1 if self.last_saved is None else self.last_saved.checkpoint.step
        return self.due is None or saved >= self.due

    @property
    def reason(self) -> str:
        """Why it is not."""
        if self.error is None or self.error.step != self.due:
            return f"checkpoint-{self.due} was not saved: its commit has not arrived"
        return str(self.error)

    def begin(self) -> None:
        """Begin to save this step, once (and once more when it has been evaluated since)."""
        trainer = self._trainer
        step = trainer.state.global_step
        told = self._told()
        if self._begun == (step, trainer.is_evaluated):
            return  # stopped in the middle of an epoch, Trainer comes here once more
        self.hear()
        trainer.every_step.health.settle()  # what is not finite is not saved
        # In the foreground it takes as long as the disk likes.
        trainer.every_step.progress("save" if self._saver.in_background else "write")
        self._trying_again, self.try_again, self.taken = self.try_again, False, None
        self.due = step
        trainer.store_flos()
        trainer.state.best_model_checkpoint = None  # an absolute path: not for trainer_state.json
        try:
            moved = self.note_steps()
            self._saver.save(trainer.describe(), trainer.contents.store, told, moved)
            self._begun = step, trainer.is_evaluated
        except SaveError as error:
            self._failed(error)
        if not self._saver.in_background:
            self.hear()
            if self.try_again:
                self.begin()

    def note_steps(self) -> bool:
        """Whether the optimizer has made a step since this was asked last, by its own count: of a
        step that a loss scaler skips it makes none, and some optimizers do not count."""
        before, self._steps_made = self._steps_made, self._trainer.contents.steps_made()
        return None not in (before, self._steps_made) and before != self._steps_made

    def _told(self) -> dict[str, Any]:
        """Main process: what the log is to tell of the save that begins: why it is made."""
        trainer, pacer = self._trainer, self._trainer.every_step.pacer
        if pacer is None:
            return {}
        why = word(trainer.args.save_strategy)
        why = "callback" if why == "no" else why
        if trainer.preempted is not None:
            why = "stop"
        elif self.error is not None and self.error.step == self.due:
            why = "again"
        spent = trainer.manager.time_sheet.told()
        return {"why": why, "spent": spent, **pacer.save_begins()}

    def hear(self) -> None:
        """Wait for the save in flight, and for what came of it."""
        if self._saver.in_flight:
            self._trainer.every_step.progress("write")
        try:
            saved = self._saver.settle()
        except SaveError as error:
            self._failed(error)
            return
        if saved is None:
            return
        self.last_saved = saved
        self._failed_since.clear()
        self._trainer.manager.time_sheet.move(saved.facts["hold"], "step", "save")
        pacer = self._trainer.every_step.pacer
        if pacer is not None:
            pacer.save_ended(saved.facts)
        self._trainer.tell_committed(saved.checkpoint)

    def finish(self) -> None:
        """Training is over: the last save that was due arrives, or has been tried several times.

        There is no training to hold back: a writer that is stuck gets as long again as a save may
        take, and what failed is tried at once and after pauses (`last_save_retry_seconds`), up to
        the deadline if there is one.
        """
        self.hear()
        self._trainer.every_step.health.settle()
        args = self._trainer.args
        left = float(args.save_timeout_seconds)
        for pause in pauses(args.last_save_retry_seconds):
            left = self._wait_for_writer(left)
            if self.complete or self._saver.in_flight or self._is_past():
                return
            if not self._rest(pause):
                return
            self.begin()
            self.hear()
        self._wait_for_writer(left)

    def _failed(self, error: SaveError) -> None:
        """Save once more where room can be made, else go on without it.

        Raises:
            SaveError: going on would not help: a mistake in a program, or failures in a row.
            NotOwnerError: the run has a newer owner.
        """
        if any(cause.kind == NotOwnerError.__name__ for cause in error.causes):
            self._trainer.manager.confirm()
        if not error.environment:
            raise error
        args, over = self._trainer.args, self._trainer.control.should_training_stop
        room = self._make_room() if error.disk_full and not self._trying_again else []
        self.try_again = bool(room)
        self.taken = error.step if error.in_the_way and not over else None
        later = bool(room) or self.taken is not None
        if args.on_save_error == "stop" and not later:
            raise error
        self._begun, self.error = None, error
        pacer = self._trainer.every_step.pacer
        if pacer is not None:
            pacer.save_failed()
        self._failed_since.add(error.step)
        count = len(self._failed_since)
        if not (later or over) and args.max_failed_saves and count >= args.max_failed_saves:
            told = "1 save has" if count == 1 else f"{count} saves in a row have"
            error.add_note(f"{told} failed (max_failed_saves)")
            raise error
        then = AT_THE_END if over else GO_ON
        if room:
            then = f"Pruned {', '.join(map(str, room))}: it is tried once more."
        if self.taken is not None:
            then = "The step after it is saved instead."
        if not over or collectives.is_main():
            logger.error("%s\n%s", error, then)

    def _make_room(self) -> list[int]:
        """What has gone for a checkpoint of this step."""
        self._trainer.every_step.progress("write")  # to remove files, too, may take long
        try:
            step = self._trainer.state.global_step
            return self._saver.make_room(step)
        except SaveError as error:
            if not error.environment:
                raise
            logger.error("%s", error)
            return []

    def _is_past(self) -> bool:
        """Whether what was due cannot be made up: the best state, which training has left since.

        (By steps, what comes later is as good to carry on from.) Launched again, the run makes it
        again, from the checkpoint before.
        """
        state = self._trainer.state
        best_only = self._trainer.args.save_strategy == "best"
        return bool(best_only and self.due == state.best_global_step != state.global_step)

    def _wait_for_writer(self, patience: float) -> float:
        """A writer that is stuck may come back, a slow commit arrive; returns what is left of
        `patience`, in seconds."""
        while self._saver.in_flight and patience > 0 and self._may_take(LOOK_SECONDS):
            self._saver.wait_longer(min(LOOK_SECONDS, patience))
            patience -= LOOK_SECONDS
            self._trainer.every_step.progress()
            self.hear()
        return patience

    def _rest(self, seconds: float) -> bool:
        """Let the cause pass; returns whether there is time for that."""
        if not self._may_take(seconds):
            return False
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._trainer.every_step.progress()
            time.sleep(min(1.0, left))
        return True

    def _may_take(self, seconds: float) -> bool:
        """Whether the deadline, on the main process's clocks, is later than that."""

        def is_later() -> bool:
            schedule = self._trainer.args.schedule()
            return seconds < seconds_left(schedule, signals.steady(), time.time())

        return collectives.on_main("looking at the clock", is_later)


def pauses(total: float) -> Iterator[float]:
    """Seconds before each try: none before the first, then longer ones, `total` together."""
    pause = 0.0
    while total >= pause:
        yield pause
        total -= pause
        pause = min(LONGEST_PAUSE, 2 * pause or 1.0)
