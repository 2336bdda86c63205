"""Deadlines met in simulated runs, and clocks that are set; the pacer is real, time is not."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from keepstep.policy.auto_interval import AutoInterval
from keepstep.policy.schedule import STOPS, Moment, Reason, Schedule
from keepstep.run_folder.reader import RunFolder
from keepstep.trainer.pacer import Pacer
from tests.helpers.folders import commit

LONG = [1.0, 20.0, 300.0]  # seconds that a step, a save, an evaluation may take
HOURS = 3600.0


class Asked:
    """What somebody asks for in the run folder."""

    def __init__(self) -> None:
        self.requests: tuple[str, ...] = ()

    def take_up(self, names: tuple[str, ...]) -> None:
        self.requests = tuple(name for name in self.requests if name not in names)


@dataclass
class Simulated:
    """A run whose steps, saves and evaluations take as long as they are said to, and up to
    `spread` times as long."""

    seed: int
    step: float
    save: float
    evaluation: float
    save_steps: int
    eval_steps: int
    interval: float | AutoInterval | None
    background: bool
    deadline: float
    margin: float = 30.0
    batches: int = 40
    spread: float = 1.15
    max_steps: int = 10**6
    now: float = 0.0
    arrives: float | None = None
    reason: Reason | None = None
    saved: list[tuple[float, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._dice = random.Random(self.seed)
        self._evaluated, self._begun = -1, (-1, False)
        self._asked: Any = None
        schedule = Schedule(self.interval, self.deadline, self.margin, self.deadline)
        self.pacer = Pacer(schedule, Asked(), lambda: self.now, lambda: self.now)
        self.pacer.save_seconds = [self._lasts(self.save)]  # of the attempt before

    def _lasts(self, seconds: float) -> float:
        return seconds * self._dice.uniform(1, self.spread)

    def go(self) -> Simulated:
        for number in range(1, self.max_steps + 1):
            self._number, last = number, number == self.max_steps
            self._ask()  # at its last micro-batch, which may be all of it
            self.now += self._lasts(self.step)
            self.pacer.step_ended()
            evaluates = number % self.eval_steps == 0
            due = number % self.save_steps == 0
            stops, saves = self._decide(due, evaluates, last)
            if not stops and evaluates:
                stops = self._evaluate(due, last)
            if stops or saves or due:
                self._save(number)
            if stops:
                break
        self._arrive()
        return self

    def _evaluate(self, due: bool, last: bool) -> bool:
        length = self._lasts(self.evaluation)
        try:
            with self.pacer.evaluation():
                for _ in range(self.batches):
                    self.now += length / self.batches
                    self.pacer.batch_ended()
                    stops, saves = self._decide(due, False, last)
                    if stops:
                        raise InterruptedError
                    if saves:
                        self._save(self._number)
                    self._ask()
        except InterruptedError:
            return True
        self._asked = None
        self._evaluated = self._number
        return False

    def _ask(self) -> None:
        self._asked = self._asked or self.pacer.look_ahead(self.arrives is not None)

    def _decide(self, due: bool, evaluates: bool, last: bool) -> tuple[bool, bool]:
        """As EveryStep does, the news heard afterwards."""
        self._ask()
        (reason, close), self._asked = self._asked, None
        moment = Moment(
            *(0, 0),
            in_flight=self.arrives is not None,
            save_due=due,
            evaluation_due=evaluates,
            last_step=last,
        )
        reason = self.pacer.decide(moment) if close else reason
        if self.arrives is not None and self.now >= self.arrives:
            self._arrive()
        self.reason = reason if reason in STOPS else self.reason
        return reason in STOPS, reason is not None

    def _save(self, number: int) -> None:
        self.pacer.save_begins()
        step = (number, self._evaluated == number)
        if self._begun == step:
            return
        self._begun = step
        self._arrive()
        length = self._lasts(self.save)
        self.arrives, self._length = self.now + length, length
        self.saved.append((self.arrives, number))
        if not self.background:
            self._arrive()
        self.pacer.save_begun()

    def _arrive(self) -> None:
        """Wait for the save in flight."""
        if self.arrives is not None:
            self.now = max(self.now, self.arrives)
            self.pacer.save_ended({"write": self._length})
            self.arrives = None

    @property
    def unforeseen(self) -> float:
        """What estimates may lack: half of the longest ones is not in what was seen so far."""
        more = self.spread - 1
        return more * (self.step + 3 * self.save) + max(0.0, self.evaluation / self.batches)

    @property
    def earliest(self) -> float:
        """No reason to stop is older than this."""
        evaluation = max(self.evaluation, self.step)  # for which the first one is taken
        asks = self.step + evaluation + evaluation / self.batches + 3 * self.save
        return self.deadline - self.margin - self.spread * asks


def simulated(seed: int, **given: float) -> Simulated:
    dice = random.Random(seed)
    step, save, evaluation = (dice.choice(LONG) for _ in range(3))
    facts = {
        "step": step,
        "save": save,
        "evaluation": evaluation,
        "save_steps": dice.choice([1, 2, 7, 25, 100, 10**9]),
        "eval_steps": dice.choice([1, 3, 25, 100, 10**9]),
        "interval": dice.choice([None, None, 60.0, 900.0, AutoInterval(0.05)]),
        "background": dice.random() < 0.6,
    }
    run = Simulated(seed, **{**facts, "deadline": 1.0, **given})  # type: ignore[arg-type]
    # Long enough for a few of what takes longest, so that it is known, and no longer.
    of_each = step + save + evaluation
    run.deadline = dice.uniform(5, 15) * of_each + run.margin
    run.margin = max(run.margin, run.unforeseen)
    run.__post_init__()
    return run


@pytest.mark.parametrize(
    "seeds", [range(60), pytest.param(range(60, 2000), marks=pytest.mark.long)], ids=str
)
def test_simulated_runs_end_before_their_deadlines(seeds: range) -> None:
    """Whatever takes long, and is due when; and none ends much too early."""
    for seed in seeds:
        run = simulated(seed).go()
        assert run.reason == "deadline", run
        assert run.now <= run.deadline, run
        assert run.saved[-1][0] >= run.earliest, run
        assert all(a <= b for (a, _), (b, _) in pairwise(run.saved)), run


def test_the_runs_that_missed_their_deadlines() -> None:
    """Steps of a second, saves of twenty, evaluations of ten minutes that no percentile holds."""
    for seed in range(20):
        dice = random.Random(seed)
        facts: dict[str, Any] = {"step": 1.0, "save": 20.0, "evaluation": 600.0, "interval": None}
        facts |= {"save_steps": dice.choice([25, 50, 100]), "eval_steps": dice.choice([50, 100])}
        run = simulated(seed, **facts).go()
        assert run.now <= run.deadline, run
        assert run.saved[-1][0] >= run.earliest, run


@pytest.mark.parametrize("limit", [25.0, 60.0, 130.0])
def test_the_first_evaluation_is_broken_off_in_time(limit: float) -> None:
    run = Simulated(1, 1.0, 5.0, 600.0, 10**9, 3, None, True, limit, margin=16.0).go()
    assert run.now <= limit
    assert run.pacer.evaluation_seconds == []
    assert run.saved[-1][1] == 3


def test_an_evaluation_that_would_be_broken_off_is_not_begun() -> None:
    run = Simulated(1, 1.0, 5.0, 100.0, 10**9, 10, None, True, 250.0, margin=20.0)
    run.pacer.evaluation_seconds.append(100.0)  # of the attempt before
    run.go()
    assert run.now < 250
    assert run.saved[-1][1] == 20, "the one of step 10 was made"
    assert len(run.pacer.evaluation_seconds) == 2


def test_a_last_step_is_followed_by_none() -> None:
    """So the time of one is not kept back, and an evaluation that fits is made."""
    run = Simulated(1, 100.0, 10.0, 50.0, 3, 3, None, True, 400.0, spread=1.0, max_steps=3)
    run.pacer.evaluation_seconds.append(50.0)
    run.go()
    assert run.reason is None
    assert run.now == 360


def moment_of(pacer: Pacer) -> Reason | None:
    pacer.step_ended()
    return pacer.decide(Moment(0, 0))


@pytest.mark.parametrize("jump", [-HOURS, HOURS])
def test_a_clock_that_is_set(jump: float) -> None:
    """Saves by the clock and a time limit do not see it; a deadline is what comes first."""
    steady, wall = 1000.0, 1.8e9
    limit = Schedule(interval=50, deadline=steady + 500)
    moment = Schedule(deadline=steady + 500, moment=wall + 500)
    pacers = [Pacer(s, Asked(), lambda: steady, lambda: wall) for s in (limit, moment)]
    for pacer in pacers:
        pacer.save_seconds = [1.0]
    assert [moment_of(pacer) for pacer in pacers] == [None, None]
    steady, wall = steady + 60, wall + 60 + jump
    assert [moment_of(p) for p in pacers] == ["interval", "deadline" if jump > 0 else None]
    pacers[0].save_begins()
    assert moment_of(pacers[0]) is None
    steady, wall = steady + 405, wall + 405
    assert [moment_of(pacer) for pacer in pacers] == ["deadline", "deadline"]


def test_a_machine_that_slept_through_its_deadline() -> None:
    """The steady clock goes on meanwhile."""
    steady = 0.0
    pacer = Pacer(Schedule(600.0, math.inf), Asked(), lambda: steady, lambda: steady)
    steady = 8 * HOURS
    assert moment_of(pacer) == "interval"


def test_requests_are_taken_up_by_the_save_that_heard_of_them() -> None:
    asked = Asked()
    pacer = Pacer(Schedule(), asked, lambda: 0.0, lambda: 0.0)
    asked.requests = ("save-now",)
    assert moment_of(pacer) == "save-now"
    asked.requests = ("stop", "save-now")  # since then
    pacer.save_begins()
    assert list(asked.requests) == ["stop"]
    assert moment_of(pacer) == "stop"


class Auto:
    """A pacer under `save_interval_seconds: auto`, and its clock."""

    def __init__(self, *, least: float = 10.0) -> None:
        self.now, self.due_in, self.in_flight = 1000.0, math.inf, False
        schedule = Schedule(AutoInterval(0.01, least))
        self.pacer = Pacer(schedule, Asked(), self.clock, self.clock, lambda: self.due_in)

    def clock(self) -> float:
        return self.now

    def step(self, seconds: float) -> Reason | None:
        """Why it is to be saved at its end."""
        self.now += seconds
        self.pacer.step_ended()
        reason = self.pacer.decide(Moment(0, 0, in_flight=self.in_flight))
        self.pacer.reason = reason
        return reason

    def save(self, stall: float, hold: float = 0.0) -> dict[str, object]:
        """What the log is told of it; it is copied until the next optimizer step."""
        told = dict(self.pacer.save_begins())
        self.now += stall
        self.pacer.save_begun()
        self.now += hold
        self.pacer.save_ended({"stall": stall + hold, "hold": hold, "write": 0.1})
        return told


def test_what_training_stood_still_for() -> None:
    """Waits and copies count, and a save that failed; evaluations do not."""
    run = Auto()
    assert run.pacer.told() == (
        "save_interval_seconds: auto: the first save comes after 10 s; then as often as training "
        "stands still for saves at most 1 % of the time"
    )
    assert run.step(9.0) is None
    assert run.step(1.0) == "interval"
    known = {"why": "interval", "interval": 10.0, "overhead": 0.0}
    assert run.save(0.3, hold=0.2) == known | {"longest_step": 9.0}
    assert run.pacer.told() is not None
    assert run.pacer.told() is None, "once"
    assert run.pacer.costs.stood_still == pytest.approx(0.5)
    assert run.pacer.interval == pytest.approx(90.0, abs=1), "100 s since the start, for 1 s"
    with run.pacer.evaluation():
        run.now += 20
    assert run.pacer.costs.stood_still == pytest.approx(0.5)
    run.pacer.save_begins()  # the strategy's
    run.now += 5
    run.pacer.save_begun()
    run.pacer.save_failed()
    assert run.pacer.costs.stood_still == pytest.approx(5.5)
    assert run.step(500.0) is None, "5.5 s are 1 % of 550 s, and one that costs 0.5 more"
    assert run.step(70.0) == "interval"
    assert run.save(0.3)["overhead"] == pytest.approx(5.5 / 605.5, rel=1e-3)


def test_no_evaluation_is_interrupted() -> None:
    """Nothing changes meanwhile, and the checkpoint would have no metric."""
    run = Auto()
    run.step(9.0)
    with run.pacer.evaluation():
        run.now += 600
        assert run.pacer.decide(Moment(0, 0)) is None
    assert run.step(1.0) == "interval"


def test_what_is_ahead() -> None:
    run = Auto()
    run.in_flight = True
    assert run.step(500.0) is None, "one is in flight"
    run.in_flight, run.due_in = False, 0
    for _ in range(3):
        assert run.step(1.0) is None, "this one is saved anyway"
    run.due_in = 5
    assert run.step(1.0) is None, "in 5 s there is one anyway"
    run.due_in = 6
    assert run.step(1.0) == "interval"


def test_what_saves_of_earlier_attempts_cost(tmp_path: Path) -> None:
    commit(tmp_path, 10)
    line = {"time": "2026-11-27T04:00:00.000+00:00", "attempt": 1, "event": "commit", "step": 10}
    line |= {"stall": 2.0, "write": 5.0, "commit": 0.5}
    (tmp_path / ".keepstep").mkdir(exist_ok=True)
    (tmp_path / ".keepstep/events.jsonl").write_text(json.dumps(line) + "\n")
    run = Auto()
    run.pacer.remember(RunFolder(tmp_path))
    told = run.pacer.told()
    assert told is not None
    assert "a save about every 200 s: it stops training for 2.000 s" in told
    assert run.step(199.0) is None
    assert run.step(1.0) == "interval"
    assert run.pacer.costs.stood_still == 0, "this attempt's share of the time"
