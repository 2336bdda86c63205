"""What the main process measures of steps, saves and evaluations, and its reasons to save."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Protocol

from keepstep.policy.schedule import Moment, Reason, Schedule, next_save
from keepstep.ranks import signals
from keepstep.run_folder.reader import RunFolder


class Requests(Protocol):
    """What the pacer asks of a `Lookout`."""

    @property
    def requests(self) -> tuple[str, ...]: ...

    def take_up(self, names: tuple[str, ...]) -> None: ...


class Pacer:
    """The main process's measurements and its reasons to save. Neither looks at the disk: what was
    asked for there, the lookout has seen."""

    def __init__(
        self,
        schedule: Schedule,
        lookout: Requests,
        clock: Callable[[], float] = signals.steady,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.schedule, self.lookout, self._clock, self._wall = schedule, lookout, clock, wall
        self.save_seconds: list[float] = []
        self.step_seconds: list[float] = []
        self.evaluation_seconds: list[float] = []
        self._batch_seconds: list[float] = []
        self._stalls = 0.0
        self.last_save = self._since = clock()
        self._heard: tuple[str, ...] = ()

    def remember(self, run: RunFolder) -> None:
        """How long saves and evaluations of earlier attempts took."""
        self.save_seconds += [seconds_of(save) for save in run.saves().values()]
        for checkpoint in run.checkpoints():
            metrics = checkpoint.manifest.metrics
            seconds = [value for name, value in metrics.items() if name.endswith("_runtime")]
            self.evaluation_seconds += [sum(seconds)] if seconds else []

    def step_ended(self) -> None:
        self.step_seconds.append(self._lap())

    def batch_ended(self) -> None:
        """Of an evaluation."""
        self._batch_seconds.append(self._lap())

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Its time is none of the step that follows; what breaks it off tells no time."""
        began, stalls = self._clock(), self._stalls
        try:
            yield
            self.evaluation_seconds.append(self._clock() - began - (self._stalls - stalls))
        finally:
            self._batch_seconds.clear()
            self._lap()

    def decide(self, now: Moment) -> Reason | None:
        """Why to save now. `now`: what the trainer knows; the measurements are added."""
        self._heard = self.lookout.requests
        return next_save(
            self.schedule,
            replace(
                now,
                now=self._clock(),
                wall=self._wall(),
                last_save=self.last_save,
                requests=self._heard,
                save_seconds=self.save_seconds,
                step_seconds=self.step_seconds,
                evaluation_seconds=self.evaluation_seconds,
                batch_seconds=self._batch_seconds,
            ),
        )

    def save_begins(self) -> None:
        """What was asked for is under way."""
        self.last_save = self._clock()
        self.lookout.take_up(self._heard)

    def save_begun(self) -> None:
        """Training goes on: its stall is none of the step or the batch that follows."""
        self._stalls += self._lap()

    def save_ended(self, facts: dict[str, Any]) -> None:
        self.save_seconds.append(seconds_of(facts))

    def _lap(self) -> float:
        """Seconds since this was asked last."""
        now = self._clock()
        seconds, self._since = now - self._since, now
        return seconds


def seconds_of(facts: dict[str, Any]) -> float:
    """From a save's beginning to its commit; see `Saved.facts`."""
    return sum(float(facts.get(name, 0.0)) for name in ("stall", "write", "read_back", "commit"))
