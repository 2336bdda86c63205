"""One tracker run per run: what trackers (`report_to`) are told, and when.

A tracker that cannot take anything back is told of a step when the checkpoint that contains it is
committed: what a kill undoes, it has never heard of. So a curve has every step once, whatever
happened. What was committed and not told (the process was killed between) the next attempt tells
from the Trainer's history, which is in the checkpoint.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainerCallback, TrainerState

from keepstep.policy.tracking import (
    BEGINNING,
    OWN,
    SUMMARY,
    HeldBack,
    Tracked,
    TrackerRun,
    went_back,
)
from keepstep.ranks import collectives
from keepstep.ranks.console import say
from keepstep.recipe.problems import ConfigError, Problem
from keepstep.run_folder.original import original_of
from keepstep.run_folder.storage import NotOwnerError
from keepstep.run_folder.tracking import show_tracked, tracked_of
from keepstep.trainer.courier import line_of
from keepstep.trainer.own_figures import OwnFigures
from keepstep.trainer.protocol import CheckpointedTrainer
from keepstep.trainer.tracker import Opening, Tracker
from keepstep.trainer.tracker_kinds import KINDS

logger = logging.getLogger(__name__)

EVENTS = ("on_train_begin", "on_log", "on_save", "on_predict", "on_push_begin", "on_train_end")


@dataclass
class Fed:
    """A tracker, and what it has not been given yet."""

    tracker: Tracker
    held: HeldBack = field(default_factory=HeldBack)
    is_away: bool = False  # for this attempt


class Trackers(TrainerCallback):
    """Stands ahead of the trackers' own callbacks, and hands on to them what the Trainer logs. On
    other ranks than the main one it does nothing, as they do."""

    def __init__(self, trainer: CheckpointedTrainer) -> None:
        self.trainer = trainer
        self._fed: list[Fed] = []
        self._tracked = Tracked()
        self._start = BEGINNING
        self._began = self._over = self._is_made_up = False
        self._figures = OwnFigures(trainer)
        self._take_over()

    def _take_over(self) -> None:
        if not collectives.is_main():
            return
        known = [fed.tracker.callback for fed in self._fed]
        for callback in self.trainer.callback_handler.callbacks:
            kind = KINDS.get(type(callback).__name__)
            if kind is not None and not any(callback is one for one in known):
                fed = Fed(kind(callback))
                for event in EVENTS:
                    handle = functools.partial(
                        self._hand_on, fed, getattr(callback, event, _nothing)
                    )
                    setattr(callback, event, handle)
                callback.on_log = functools.partial(self._hear, fed)
                callback.on_train_end = functools.partial(self._end, fed, callback.on_train_end)
                self._fed.append(fed)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        self._take_over()  # what was added since
        collectives.on_main("opening the trackers", lambda: self._open_all(args, state, model))

    def make_up(self) -> None:
        """Of a run that is finished: hand over what its last attempt could not. A tracker that
        fails ends nothing. Ranks: all (collective)."""
        self._take_over()
        if collectives.on_main("looking what trackers lack", self._some_lack):
            collectives.on_main("handing over to trackers", self._make_up)

    def _some_lack(self) -> bool:
        """Whether there are any, which are kept; the others are not even opened."""
        start = self.trainer.start
        if start is None or not self._fed:
            return False
        ended = tracked_of(self.trainer.manager.run).ended
        self._fed = [f for f in self._fed if ended.get(f.tracker.name, BEGINNING) < start.step]
        return bool(self._fed)

    def _make_up(self) -> None:
        trainer = self.trainer
        assert trainer.start is not None
        names = ", ".join(fed.tracker.name for fed in self._fed)
        say(f"trackers: {names} may lack steps of this run: what is missing is told now")
        state = TrainerState.load_from_json(str(trainer.start.path / "trainer_state.json"))
        state.is_world_process_zero = True
        self._is_made_up = True
        self._open_all(trainer.args, state, trainer.model)
        for fed in self._fed:
            if not fed.is_away:
                self._end(fed, fed.tracker.close, trainer.args, state, trainer.control)

    def _open_all(self, args: Any, state: Any, model: Any) -> None:
        if not self._fed:
            return
        manager, start = self.trainer.manager, self.trainer.start
        self._start = start.step if start else BEGINNING
        before, attempts = tracked_of(manager.run), manager.run.attempts()
        place = manager.run.path.resolve()
        original = original_of(manager.run, attempts)
        if original is not None:
            tracked = before.copied_to(str(place), self._start)
        else:
            tracked = before.begun_at(self._start, went_back(attempts))
        self._tracked = tracked
        own = tracked.branch, tracked.origin, tracked.copy
        run = TrackerRun(manager.writer.run_id, args.run_name or place.name, *own)
        if tracked != before:
            told = f"steps after {max(0, self._start)} are told of already"
            if original is not None:
                told = f"this folder is a copy of {original}, whose curve stays as it is"
            say(f"trackers: {told}: this is {run.id}")
        self._figures.begin()
        for fed in self._fed:
            tracker, history = fed.tracker, state.log_history
            reached = tracked.reached.get(tracker.name)
            opening = Opening(
                run,
                start=self._start,
                reached=tracked.origin if reached is None else reached,
                **{"args": args, "state": state, "model": model},
            )
            if not self._open(fed, opening, is_first=reached is None):
                continue
            for line in history:
                if SUMMARY not in line and line["step"] <= self._start:
                    values = {k: v for k, v in line.items() if k != "step"}
                    fed.held.add(line["step"], values)
            self._give(fed, self._start, state, None)
        self._began = True
        if tracked == before:  # a branch is one with its first commit, as in the run folder
            self._note(self._start)

    def _open(self, fed: Fed, opening: Opening, is_first: bool) -> bool:
        """
        Raises:
            ConfigError: it cannot be opened, and never was: what is set is wrong. Later it may be
                away for a while, as the network may.
        """
        tracker = fed.tracker
        try:
            reached = tracker.open(opening)
        except Exception as error:
            if is_first and not self._is_made_up:
                what = f"report_to: {tracker.name}: {line_of(error)}"
                hint = "see that it can be reached, and that you are logged in; or leave it out"
                raise ConfigError([Problem(what, hint, "tracker")]) from error
            self._lose(fed, error)
            return False
        at = [line for line in opening.state.log_history if line["step"] == reached]
        known = {name for line in at for name in line if tracker.has(name)}
        # It may be ahead, of a checkpoint that is lost.
        fed.held.begin(reached, known if reached <= self._start else None)
        return True

    def _lose(self, fed: Fed, error: Exception) -> None:
        """For this attempt. (Training does not end for it.)"""
        fed.is_away = True
        for event in EVENTS:
            setattr(fed.tracker.callback, event, _nothing)
        logger.warning(
            "report_to: %s: %s\n    It is told no more by this attempt; the same command makes up "
            "for what is saved.",
            *(fed.tracker.name, line_of(error)),
        )

    def _hand_on(self, fed: Fed, handle: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """An event of the callback's own: what it closes or uploads there may fail as a log may,
        and on this rank alone."""
        try:
            return handle(*args, **kwargs)
        except Exception as error:
            self._lose(fed, error)

    def _end(self, fed: Fed, handle: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """A tracker closes. What it has then, it keeps: that is noted."""
        handle(*args, **kwargs)
        if not fed.is_away and self._began:
            self._write_down(self._tracked.with_ended(fed.tracker.name))

    def _hear(
        self, fed: Fed, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any
    ) -> None:
        """In the place of the callback's own `on_log`."""
        if not logs or ((self._over or SUMMARY in logs) and not self._has_finished):
            return
        fed.held.add(state.global_step, dict(logs))
        self._tell_live(fed, state, control)

    def _tell_live(self, fed: Fed, state: Any, control: Any) -> None:
        """What nothing can undo: the tracker takes it back, or there is no save to go back to."""
        if not self._began:
            return
        if self._over or not self.trainer.saves_on_its_way():
            self._give(fed, state.global_step, state, control)
            self._note(state.global_step)
        elif fed.tracker.is_live:
            self._give(fed, state.global_step, state, control)

    @property
    def _has_finished(self) -> bool:
        """Whether training has come to its end, and all that was due is saved; and has made a step:
        a run that is looked up again has nothing to tell."""
        trainer = self.trainer
        made = trainer.state.global_step > self._start
        return made and trainer.preempted is None and trainer.saving.complete

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Ahead of the trackers' own."""
        if self._fed and logs and "loss" in logs and self._began and not self._over:
            self._add(state.global_step, self._figures.of_log(logs))

    def on_checkpoint_committed(
        self, args: Any, state: Any, control: Any, *, checkpoint: Any, **kwargs: Any
    ) -> None:
        saved = self.trainer.last_saved
        if not self._fed or not self._began or saved is None:
            return
        self._add(checkpoint.step, self._figures.of_save(saved))
        self._give_all(checkpoint.step, state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ahead of theirs, which close."""
        if not self._fed or not self._began:
            return
        if self._has_finished or self.trainer.saved_step() == state.global_step:
            self._give_all(state.global_step, state, control)
        self._over = True

    def _add(self, step: int, figures: Mapping[str, float]) -> None:
        named = {OWN + name: value for name, value in figures.items() if math.isfinite(value)}
        for fed in self._fed:
            if not fed.tracker.is_live:
                fed.held.add(step, named)
            elif not fed.is_away:
                try:
                    fed.tracker.give_own(step, named)  # it may have heard of later steps
                except Exception as error:
                    self._lose(fed, error)

    def _give_all(self, up_to: int, state: Any, control: Any) -> None:
        if not self.trainer.manager.owned():
            return  # another attempt tells it; this one is about to hear of that
        for fed in self._fed:
            self._give(fed, up_to, state, control)
        self._note(up_to)

    def _give(self, fed: Fed, up_to: int, state: Any, control: Any) -> None:
        if fed.is_away:
            return
        try:
            for step, values in fed.held.take(up_to):
                fed.tracker.give(step, values, state, control)
        except Exception as error:
            self._lose(fed, error)

    def _note(self, step: int) -> None:
        """That they have everything up to here. After they have been given it: a kill between makes
        one of them hear of a step twice, rather than never."""
        names = [fed.tracker.name for fed in self._fed if not fed.is_away]
        if step != BEGINNING:
            self._write_down(self._tracked.with_reached(names, step))

    def _write_down(self, tracked: Tracked) -> None:
        if tracked == self._tracked:
            return
        self._tracked, manager = tracked, self.trainer.manager
        try:
            show_tracked(manager.run, manager.storage, tracked)
        except NotOwnerError:
            pass  # of which all ranks will hear
        except OSError as error:
            logger.warning("what trackers have is not written down: %s", error)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Of a tracker that cannot be reached."""
