"""What happens at every step's end: news of saves, requests to save or to stop, the clock.

A signal to any rank, `keepstep stop`, `keepstep save-now`, the deadline and the time since the last
save: the main process decides, every rank hears of it in the same few bytes, and all save the same
step. The same after each batch of an evaluation, which may take an hour.

Nobody waits for these bytes: they go around, from host to host, behind a step's last forward and
backward pass, and are there at its end. What comes later is heard a step later. Only when the
deadline is close is it asked again at the end itself.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

from transformers import TrainerCallback

from keepstep.errors import KeepstepError
from keepstep.policy.schedule import STOPS, Moment, Reason, due_in, lost_minutes
from keepstep.policy.standstill import Phase
from keepstep.ranks import collectives, signals
from keepstep.ranks.console import say
from keepstep.ranks.watchdog import Watchdog
from keepstep.recipe.trajectory import word
from keepstep.trainer.health import Health
from keepstep.trainer.pacer import Pacer
from keepstep.trainer.protocol import CheckpointedTrainer
from keepstep.trainer.speed import Speed

logger = logging.getLogger(__name__)

SPOKEN = {"deadline": "the deadline", "stop": "keepstep stop"}


class EvaluationStoppedError(KeepstepError):
    """An evaluation is broken off, on every rank at the same batch: somebody asked for a stop."""


class EveryStep(TrainerCallback):
    """Asks before every step's end (and in evaluations) whether to save or to stop."""

    def __init__(self, trainer: CheckpointedTrainer) -> None:
        self.trainer = trainer
        self.pacer: Pacer | None = None
        self.watchdog: Watchdog | None = None
        self.health = Health(trainer)
        self.speed = Speed(trainer.manager.time_sheet)
        self._told_lost = False
        self._answer: Callable[[], list[Any]] | None = None  # to what has been asked
        self._reason: Reason | None = None  # the main process's
        self._began_at: int | None = None  # steps completed when the newest micro-batch began
        self._evaluating = False  # the Trainer does; it bears to be broken off
        self._postponed = False  # a save, until the evaluation at the epoch's end is made

    def progress(self, at: Phase | None = None) -> None:
        """This rank has got on; `at`: what it is at from here on, None: as before. Ranks: any."""
        self.trainer.manager.beat()
        if at == "end":
            self.trainer.manager.time_sheet.at("ending")
        if self.watchdog is not None:
            self.watchdog.progress(at, self.trainer.state.global_step)

    def micro_batch_begins(self) -> None:
        """Before its forward pass. Ranks: all (collective)."""
        self.progress()
        self._began_at = self.trainer.state.global_step
        if self.trainer.accelerator.sync_gradients:  # a step's last one
            self._ask_ahead()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.health.begin()
        self.speed.begin(state.global_step, self.trainer.tokens_seen())
        if collectives.is_main():
            manager = self.trainer.manager
            if self._saves_at_its_end_only(args, state):
                logger.warning("there is no checkpoint inside of these %s steps", state.max_steps)
            self.pacer = Pacer(
                args.schedule(), manager.lookout(), due_in=lambda: self._due_in(args)
            )
            try:
                self.pacer.remember(manager.run)
            except OSError as error:
                logger.warning("how long saves took is not known: %s", error)
            self._tell_pace(self.pacer)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress("step")
        self.trainer.manager.time_sheet.at("step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.manager.time_sheet.step_ended(state.global_step)
        self.progress()
        self.health.step_ended(state.global_step)
        if self.pacer is not None:
            self.pacer.step_ended()
            self._tell_pace(self.pacer)
            if not self._told_lost:
                self._tell_lost(args, state, self.pacer)
        if control.should_evaluate:
            self.trainer.evaluation_due_at = state.global_step
        self._decide(args, state, control)
        if self._evaluates_at_epoch_end(args, state):
            # As where steps decide: a step is evaluated, then saved. A run that was killed between
            # would go on with the next epoch, and without this one's evaluation.
            self._postponed, control.should_save = control.should_save, False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Here evaluations by epochs are due; also where training stops inside of an epoch."""
        self.progress("start")  # of the next one, unless something else comes first
        control.should_save |= self._postponed
        self._postponed = False
        if self._evaluates_at_epoch_end(args, state):
            self.trainer.evaluation_due_at = state.global_step
        if self.trainer.preempted is not None:
            control.should_evaluate = False
        elif control.should_evaluate:
            self._decide(args, state, control)

    def _evaluates_at_epoch_end(self, args: Any, state: Any) -> bool:
        """Whether this is the last step of an epoch, or of all, and is to be evaluated as such."""
        over = float(state.epoch).is_integer() or state.global_step >= state.max_steps
        return bool(over and args.eval_strategy == "epoch" and args.eval_delay <= state.epoch)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nothing waits for the end of an evaluation, which may take an hour.

        But for one that a callback makes: whoever has called it would have to bear that it is
        broken off. The step is saved at once; training stops when the callback has come to its end.
        """
        self.progress("evaluation")
        own = self._evaluating
        if not own and (self.trainer.preempted is not None or self._is_inside_of_a_step(state)):
            return
        if self.pacer is not None:
            self.pacer.batch_ended()
        if self._decide(args, state, control, evaluating=True):
            if own:
                raise EvaluationStoppedError("an evaluation was broken off: a stop was asked for")
            self._save(control, evaluating=True)
        elif own:  # a callback's next batch may come after other saves
            self._ask_ahead()

    def _is_inside_of_a_step(self, state: Any) -> bool:
        """Whether what is trained by now is no whole step; or nothing is, in this attempt."""
        begun = self._began_at is not None and self.trainer.is_in_train
        return not begun or state.global_step == self._began_at

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.pacer is not None:
            self.pacer.save_begun()

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Measures an evaluation, which begins. Ranks: all (collective)."""
        self.progress("evaluation")
        self._evaluating = True
        try:
            with contextlib.nullcontext() if self.pacer is None else self.pacer.evaluation():
                yield
        finally:
            self._evaluating = False
        self._hear()  # what its last batch has asked; it is asked again

    def _ask_ahead(self) -> None:
        """For the end of what begins. A rank that is alone asks nobody: it looks at that end."""
        if collectives.world_size() > 1:
            self._ask()

    def _ask(self) -> None:
        """What the next `_hear` tells begins to go around. Ranks: all (collective)."""
        if self._answer is not None:
            return
        saver, close = self.trainer.manager.saver, False
        if self.pacer is not None:
            self._reason, close = self.pacer.look_ahead(saver.in_flight)
        flags, totals = self.health.tell()
        own = (
            saver.has_news(),
            saver.is_writing(),
            self._is_to_stop(),
            self._reason is not None,
            self._has_lost(),
            close,
        )
        self._answer = collectives.ask(*own, *flags, totals=totals)

    def _hear(self) -> list[bool]:
        """What was asked, for all ranks; raises as `Health.hear` does. Ranks: all (collective)."""
        self._ask()
        assert self._answer is not None
        answer, self._answer = self._answer, None
        told = answer()
        self.health.hear(*told[6:])
        return told[:6]

    def _is_to_stop(self) -> bool:
        """Ranks: any; the main process decides on more than signals."""
        return signals.requested() is not None or self._reason in STOPS

    def _decide(self, args: Any, state: Any, control: Any, evaluating: bool = False) -> bool:
        """What to do now; returns whether to stop. Ranks: all (collective)."""
        trainer = self.trainer
        evaluates = evaluating or control.should_evaluate
        last_step = state.global_step >= state.max_steps
        news, writing, stop, save, lost, close = self._hear()
        if close:
            moment = Moment(
                *(0, 0),
                in_flight=trainer.manager.saver.in_flight,
                save_due=control.should_save or (evaluates and args.save_strategy == "best"),
                evaluation_due=control.should_evaluate and not evaluating,
                last_step=last_step,
            )
            self._reason = self.pacer.decide(moment) if self.pacer else None
            stop, save = collectives.any_of(self._is_to_stop(), self._reason is not None)
        if lost:
            trainer.manager.confirm()
        if news and not writing:
            trainer.hear()
        if state.global_step == 0:  # eval_on_start: the first step will be saved
            return stop
        if stop and (evaluates or not last_step) and not self._is_taken(state):
            self._stop(control)
            return True
        if save or trainer.try_again:
            if self.pacer is not None:
                self.pacer.reason = self._reason
            self._save(control, evaluating)
        return False

    def _is_taken(self, state: Any) -> bool:
        """Whether this step cannot be saved: then the stop is a step later. Ranks: all."""
        step = state.global_step
        if step + 1 >= state.max_steps:  # the next one is the last
            return False
        saver = self.trainer.manager.saver
        return saver.on_main("looking for its name", lambda writer: writer.is_taken(step))

    def _has_lost(self) -> bool:
        """Main process: whether the lookout has seen another owner; tell what else it has seen."""
        if self.pacer is None:
            return False
        lookout = self.trainer.manager.lookout()
        for fault in lookout.faults():
            logger.warning("the run folder: %s\n    It is tried again; training goes on.", fault)
        return lookout.lost

    def _save(self, control: Any, evaluating: bool) -> None:
        """At the step's end, or at once: an evaluation may go on for long. Ranks: all."""
        if not evaluating:
            control.should_save = True
            return
        self.trainer._save_checkpoint(self.trainer.model, None)
        if self.pacer is not None:
            self.pacer.save_begun()

    def _tell_pace(self, pacer: Pacer) -> None:
        """At the start, and once more when it is known what a save costs."""
        line = pacer.told()
        if line is not None:
            say(line)

    def lost_work_bound(self) -> float | None:
        """Seconds of work that a failure loses at most, as saves are now; None: not known, or there
        are none. Ranks: any; the main process knows."""
        if self.pacer is None:
            return None
        args, state, pacer = self.trainer.args, self.trainer.state, self.pacer
        apart = self._save_steps(args, state)
        minutes = lost_minutes(apart, pacer.interval, pacer.step_seconds)
        return None if minutes is None or minutes == float("inf") else 60 * minutes

    def _tell_lost(self, args: Any, state: Any, pacer: Pacer) -> None:
        """Once the pace is known: does a failure lose more than `max_lost_minutes`?"""
        seconds, hint = pacer.interval, f"save_interval_seconds: {60 * args.max_lost_minutes:.0f}"
        minutes = lost_minutes(self._save_steps(args, state), seconds, pacer.step_seconds)
        if minutes is not None and args.max_lost_minutes < minutes < float("inf"):
            self._told_lost = True
            hint = f"a higher max_save_overhead, or {hint}" if pacer.is_auto else hint
            logger.warning(
                "a failure would lose up to %.0f minutes (max_lost_minutes: %g)\n    Hint: %s",
                *(minutes, args.max_lost_minutes, hint),
            )
        if minutes is not None and not pacer.is_auto:  # that one grows with what saves cost
            self._told_lost = True

    def _saves_at_its_end_only(self, args: Any, state: Any) -> bool:
        """What preflight tells of `max_steps`, of epochs, whose steps are known by now."""
        by_epochs = args.max_steps <= 0 and args.save_interval_seconds is None
        return by_epochs and state.max_steps <= self._save_steps(args, state) < float("inf")

    def _due_in(self, args: Any) -> float:
        """Steps until the Trainer's next save."""
        state = self.trainer.state
        of_state = state.global_step, state.max_steps, state.epoch or 0.0
        return due_in(*of_state, word(args.save_strategy), state.save_steps)

    def _save_steps(self, args: Any, state: Any) -> float:
        """Steps between two saves; infinite where steps do not decide."""
        return float(state.save_steps) if args.save_strategy == "steps" else float("inf")

    def asked_to_stop(self) -> str:
        """Who asks for a stop, as far as it was seen; empty: nobody. Ranks: all (collective)."""
        told = [SPOKEN.get(self._reason or ""), signals.requested()]
        return ", ".join(
            text
            for rank, (general, signal) in enumerate(collectives.gather(told))
            for text in (general, f"{signal} to rank {rank}" if signal else None)
            if text
        )

    def _stop(self, control: Any) -> None:
        """Agree on why, then save and stop. Ranks: all (collective)."""
        if self.pacer is not None:
            self.pacer.reason = self._reason
        self.trainer.preempted = self.asked_to_stop()
        control.should_save = control.should_training_stop = True
        control.should_evaluate = False
