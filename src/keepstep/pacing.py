"""What happens at every step's end: news of saves, requests to save or to stop, the clock.

A signal to any rank, `keepstep stop`, `keepstep save-now`, the deadline and the time since the last
save: the main process decides, every rank hears of it in the same few bytes, and all save the same
step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from . import distributed, preemption
from .checkpoint.runfolder import RunFolder
from .checkpoint.schedule import STOPS, Moment, Reason, Schedule, lost_minutes, next_save
from .checkpoint.storage import Storage

if TYPE_CHECKING:
    from .trainer import KeepstepTrainer
    from .watchdog import Watchdog

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0  # between looks at the run folder: it may be a network filesystem
SPOKEN = {"deadline": "the deadline", "stop": "keepstep stop"}


class EvaluationStoppedError(Exception):
    """An evaluation is broken off, on every rank at the same batch: somebody asked for a stop."""


class Pacer:
    """The main process's measurements and its reasons to save."""

    def __init__(
        self,
        run: RunFolder,
        schedule: Schedule,
        clock: Callable[[], float] = time.time,
        owned: Callable[[], bool] = lambda: True,
    ) -> None:
        """
        Args:
            owned: whether the run is still this attempt's.
        """
        self.run, self.schedule, self._clock, self._owned = run, schedule, clock, owned
        self.lost = False
        self.save_seconds = [seconds_of(save) for save in run.saves().values()]
        self.step_seconds: list[float] = []
        self.last_save = self._last_step = self._last_look = clock()
        self._requests: tuple[str, ...] = ()

    def step_ended(self, in_flight: bool) -> Reason | None:
        """Why to save after this step."""
        now = self._clock()
        self.step_seconds.append(now - self._last_step)
        self._last_step = now
        if now - self._last_look >= LOOK_SECONDS:
            self._last_look = now
            self._requests = self.run.requests()
            self.lost = not self._owned()
        moment = Moment(
            now, self.last_save, self.save_seconds, self.step_seconds, in_flight, self._requests
        )
        return next_save(self.schedule, moment)

    def save_begins(self, storage: Storage) -> None:
        """What was asked for is under way."""
        self.last_save = self._clock()
        for name in self._requests:
            storage.remove(self.run.request(name))
        self._requests = ()

    def save_ended(self, facts: dict[str, Any]) -> None:
        self.save_seconds.append(seconds_of(facts))


def seconds_of(facts: dict[str, Any]) -> float:
    """From a save's beginning to its commit; see `Saved.facts`."""
    return sum(float(facts.get(name, 0.0)) for name in ("stall", "write", "read_back", "commit"))


class EveryStep(TrainerCallback):
    """Asks at every step's end (and in evaluations) whether to save or to stop."""

    def __init__(self, trainer: KeepstepTrainer) -> None:
        self.trainer = trainer
        self.pacer: Pacer | None = None
        self.watchdog: Watchdog | None = None
        self._told_lost = False

    def progress(self) -> None:
        self.trainer.manager.beat()
        if self.watchdog is not None:
            self.watchdog.progress()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if distributed.is_main():
            manager = self.trainer.manager
            if self._saves_at_its_end_only(args, state):
                logger.warning("there is no checkpoint inside of these %s steps", state.max_steps)
            self.pacer = Pacer(manager.run, args.schedule(), owned=manager.owned)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress()
        trainer, asked = self.trainer, preemption.requested()
        saver = trainer.manager.saver
        reason = self.pacer.step_ended(saver.in_flight) if self.pacer else None
        news, stop, save, lost = distributed.any_rank(
            saver.has_news(),
            asked is not None or reason in STOPS,
            reason is not None,
            self.pacer is not None and self.pacer.lost,
        )
        if lost:
            trainer.manager.confirm()
        if self.pacer is not None and not self._told_lost:
            self._tell_lost(args, state, self.pacer)
        if news:
            trainer.hear()
        save = save or trainer.try_again
        if stop and state.global_step < state.max_steps:
            self._stop(control, asked, reason)
        elif save:
            control.should_save = True

    def _tell_lost(self, args: Any, state: Any, pacer: Pacer) -> None:
        """Once the pace is known: does a failure lose more than `max_lost_minutes`?"""
        apart = self._save_steps(args, state)
        minutes = lost_minutes(apart, args.save_interval_seconds, pacer.step_seconds)
        self._told_lost = minutes is not None
        if minutes is not None and args.max_lost_minutes < minutes < float("inf"):
            logger.warning(
                "a failure would lose up to %.0f minutes (max_lost_minutes: %g)\n"
                "    Hint: save_interval_seconds: %.0f",
                *(minutes, args.max_lost_minutes, 60 * args.max_lost_minutes),
            )

    def _saves_at_its_end_only(self, args: Any, state: Any) -> bool:
        """What preflight tells of `max_steps`, of epochs, whose steps are known by now."""
        by_epochs = args.max_steps <= 0 and args.save_interval_seconds is None
        return by_epochs and state.max_steps <= self._save_steps(args, state) < float("inf")

    def _save_steps(self, args: Any, state: Any) -> float:
        """Steps between two saves; infinite where steps do not decide."""
        return float(state.save_steps) if args.save_strategy == "steps" else float("inf")

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A stop does not wait for the end of an evaluation, which may take an hour."""
        self.progress()
        asked = preemption.requested()
        if not self.trainer.is_in_train or not 0 < state.global_step < state.max_steps:
            return
        (stop,) = distributed.any_rank(asked is not None)
        if stop:
            self._stop(control, asked, None)
            raise EvaluationStoppedError

    def _stop(self, control: Any, asked: str | None, reason: Reason | None) -> None:
        """Agree on why, then save and stop. Ranks: all (collective)."""
        told = [SPOKEN.get(reason or ""), asked]
        self.trainer.preempted = ", ".join(
            text
            for rank, (general, signal) in enumerate(distributed.gather(told))
            for text in (general, f"{signal} to rank {rank}" if signal else None)
            if text
        )
        control.should_save = control.should_training_stop = True
        control.should_evaluate = False
