"""What the main process measures of steps, saves and evaluations, and its reasons to save."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

from keepstep.policy.auto_interval import (
    AutoInterval,
    SaveCosts,
    length_of,
    next_moment,
    seconds_apart,
    told,
)
from keepstep.policy.schedule import Moment, Reason, Schedule, asked_for, is_close, next_save
from keepstep.ranks import signals
from keepstep.run_folder.reader import RunFolder


class Requests(Protocol):
    """What the pacer asks of a `Lookout`."""

    @property
    def requests(self) -> tuple[str, ...]: ...

    def take_up(self, names: tuple[str, ...]) -> None: ...


class Pacer:
    """The main process's measurements and its reasons to save. Neither looks at the disk: what was
    asked for there, the lookout has seen.

    Attributes:
        reason: what all ranks have agreed to save for, None when it is the strategy.
    """

    def __init__(
        self,
        schedule: Schedule,
        lookout: Requests,
        clock: Callable[[], float] = signals.steady,
        wall: Callable[[], float] = time.time,
        due_in: Callable[[], float] = lambda: math.inf,
    ) -> None:
        """
        Args:
            due_in: in how many steps the next save is due.
        """
        self.schedule, self.lookout, self._clock, self._wall = schedule, lookout, clock, wall
        self._due_in = due_in
        self.reason: Reason | None = None
        self.save_seconds: list[float] = []
        self.step_seconds: list[float] = []
        self.evaluation_seconds: list[float] = []
        self._batch_seconds: list[float] = []
        self._stalls = self._longest_step = 0.0  # the step: since the newest save began
        self.last_save = self._since = self._began = clock()
        self._heard: tuple[str, ...] = ()
        self._stall_seconds: list[float] = []
        self._stood_still = 0.0
        self._standing_since: float | None = None
        self._failed, self._evaluating = 0, False
        self._told: bool | None = None  # with what saves cost, or without; None: not yet

    def remember(self, run: RunFolder) -> None:
        """How long saves and evaluations of earlier attempts took, and training stood still."""
        for save in run.saves().values():
            self._remember(save)
        for checkpoint in run.checkpoints():
            metrics = checkpoint.manifest.metrics
            seconds = [value for name, value in metrics.items() if name.endswith("_runtime")]
            self.evaluation_seconds += [sum(seconds)] if seconds else []

    @property
    def costs(self) -> SaveCosts:
        """What saves have cost so far."""
        return SaveCosts(
            began=self._began,
            stood_still=self._stood_still,
            stalls=self._stall_seconds,
            lengths=self.save_seconds,
            failed=self._failed,
        )

    @property
    def is_auto(self) -> bool:
        return isinstance(self.schedule.interval, AutoInterval)

    @property
    def interval(self) -> float | None:
        """Seconds from the newest save to the next one, as things are; None: steps decide."""
        auto = self.schedule.interval
        if not isinstance(auto, AutoInterval):
            return auto
        return next_moment(auto, self.costs, self.last_save) - self.last_save

    def told(self) -> str | None:
        """What `save_interval_seconds: auto` means here, once without and once with what saves
        cost; None: it has been told."""
        auto, known = self.schedule.interval, bool(self._stall_seconds)
        if not isinstance(auto, AutoInterval) or self._told is known:
            return None
        self._told = known
        return told(auto, self.costs)

    def step_ended(self) -> None:
        self.step_seconds.append(self._lap())
        self._longest_step = max(self._longest_step, self.step_seconds[-1])
        self._batch_seconds.clear()  # of an evaluation that a callback has made

    def batch_ended(self) -> None:
        """Of an evaluation."""
        self._batch_seconds.append(self._lap())

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Its time is none of the step that follows; what breaks it off tells no time."""
        began, stalls, self._evaluating = self._clock(), self._stalls, True
        try:
            yield
            self.evaluation_seconds.append(self._clock() - began - (self._stalls - stalls))
        finally:
            self._evaluating = False
            self._batch_seconds.clear()
            self._lap()

    def look_ahead(self, in_flight: bool) -> tuple[Reason | None, bool]:
        """Before a step's end (or a batch's): why it is to be saved, and whether the deadline is so
        close that `decide` has to be asked there, too."""
        moment = self._measured(Moment(now=0, last_save=0, in_flight=in_flight))
        return asked_for(self.schedule, moment), is_close(self.schedule, moment)

    def decide(self, now: Moment) -> Reason | None:
        """Why to save now. `now`: what the trainer knows; the measurements are added."""
        return next_save(self.schedule, self._measured(now))

    def _measured(self, now: Moment) -> Moment:
        self._heard = self.lookout.requests
        return replace(
            now,
            now=self._clock(),
            wall=self._wall(),
            last_save=self.last_save,
            requests=self._heard,
            save_seconds=self.save_seconds,
            step_seconds=self.step_seconds,
            evaluation_seconds=self.evaluation_seconds,
            batch_seconds=self._batch_seconds,
            costs=self.costs,
            evaluating=self._evaluating,
            due_in=self._due_in(),
        )

    def save_begins(self) -> Mapping[str, Any]:
        """What was asked for is under way. Returns what the log is to tell of this save."""
        facts = self._told_of_save()
        self.last_save = self._clock()
        if self._standing_since is None:  # else it is begun once more
            self._standing_since = self.last_save
        self.reason = None
        self.lookout.take_up(self._heard)
        return facts

    def save_begun(self) -> None:
        """Training goes on: its stall is none of the step or the batch that follows."""
        self._stalls += self._lap()
        if self._standing_since is not None:
            self._stood_still += self._clock() - self._standing_since
            self._standing_since = None

    def save_ended(self, facts: dict[str, Any]) -> None:
        """It is committed."""
        self._failed = 0
        self._stood_still += float(facts.get("hold", 0.0))  # in the step after it
        self._remember(facts)

    def save_failed(self) -> None:
        self._failed += 1

    def _remember(self, facts: Mapping[str, Any]) -> None:
        self.save_seconds.append(length_of(facts))
        self._stall_seconds.append(float(facts.get("stall", 0.0)))

    def _told_of_save(self) -> dict[str, Any]:
        """Why it is made, if the strategy is not why; and how things stand for `auto`."""
        facts: dict[str, Any] = {} if self.reason is None else {"why": self.reason}
        if self._longest_step:
            facts["longest_step"] = round(self._longest_step, 3)
            self._longest_step = 0.0
        auto = self.schedule.interval
        if isinstance(auto, AutoInterval):
            share = self.costs.share(self._clock())
            facts |= {"interval": round(seconds_apart(auto, self.costs), 3)}
            facts |= {"overhead": round(share, 6)}
        return facts

    def _lap(self) -> float:
        """Seconds since this was asked last."""
        now = self._clock()
        seconds, self._since = now - self._since, now
        return seconds
