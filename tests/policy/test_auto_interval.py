"""`save_interval_seconds: auto`: simulated runs, whatever their steps and saves take."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstep.policy.auto_interval import (
    RETRY_SECONDS,
    WRITING_SHARE,
    AutoInterval,
    SaveCosts,
    costs_of,
    next_moment,
    seconds_apart,
    told,
    typical,
)
from keepstep.policy.schedule import Moment, Schedule, due_in, lost_minutes, next_save, saves_at

AUTO = AutoInterval(0.01, 10.0)
ADAPTER = costs_of([{"stall": 0.004, "write": 0.03, "commit": 0.02}] * 5)
# A save at the end of a step that took a second, 1000 s after a start; none before it.
READY = Moment(1000.0, 0.0, step_seconds=[1.0] * 9, costs=ADAPTER)
DEARER = st.sampled_from([0.0, 0.001, 0.05, 1.0, 5.0, 100.0])


def asks(moment: Moment, auto: AutoInterval = AUTO, **schedule: float) -> str | None:
    return next_save(Schedule(auto, **schedule), moment)


@dataclass
class Simulated:
    """A run that decides by the real function at each step's end.

    Attributes:
        stalls, lengths: what each save costs, in turn: of training, and then to its commit.
        asked: at these steps somebody else saves, whatever it costs.
    """

    auto: AutoInterval
    steps: list[float]
    stalls: list[float]
    lengths: list[float]
    asked: frozenset[int] = frozenset()
    before: SaveCosts = field(default_factory=SaveCosts)
    now: float = 50.0
    begun: list[tuple[float, str]] = field(default_factory=list)

    def go(self) -> Simulated:
        began = last = self.now
        costs, arrives = replace(self.before, began=began), -math.inf
        for number, seconds in enumerate(self.steps, start=1):
            self.now += seconds
            in_flight = self.now < arrives
            moment = Moment(self.now, last, in_flight=in_flight, costs=costs)
            reason = asks(moment, self.auto)
            if reason == "interval":
                self.at_begin(costs, arrives, last)
            if reason is None and number not in self.asked:
                continue
            self.now = max(self.now, arrives)  # one at a time
            last = self.now
            self.begun.append((self.now, reason or "asked"))
            count = len(self.begun) - 1
            stall = self.stalls[count % len(self.stalls)]
            length = stall + self.lengths[count % len(self.lengths)]
            self.now, arrives = self.now + stall, self.now + length
            costs = replace(
                costs,
                stood_still=costs.stood_still + stall,
                stalls=[*costs.stalls, stall],
                lengths=[*costs.lengths, length],
            )
        return self

    def at_begin(self, costs: SaveCosts, arrives: float, last: float) -> None:
        """What holds whenever `auto` begins a save."""
        auto, now = self.auto, self.now
        assert now >= arrives, "two in flight"
        assert now - last >= auto.least
        spent = costs.stood_still + typical(costs.stalls)
        assert spent <= auto.overhead * (now - costs.began) * (1 + 1e-9)
        assert now - last >= typical(costs.lengths) / WRITING_SHARE * (1 - 1e-9)


@given(
    auto=st.builds(AutoInterval, st.sampled_from([0.001, 0.01, 0.2]), st.sampled_from([0.0, 10.0])),
    steps=st.lists(st.sampled_from([0.01, 0.5, 3.0, 40.0, 1e5]), min_size=1, max_size=150),
    stalls=st.lists(DEARER, min_size=1, max_size=6),
    lengths=st.lists(DEARER, min_size=1, max_size=6),
    asked=st.frozensets(st.integers(1, 150), max_size=20),
    before=st.lists(DEARER, max_size=4),
)
def test_bounds_hold_whatever_saves_cost(
    auto: AutoInterval,
    steps: list[float],
    stalls: list[float],
    lengths: list[float],
    asked: frozenset[int],
    before: list[float],
) -> None:
    """At each save's beginning; steps of a day stand for a clock that jumped (a machine asleep)."""
    earlier = SaveCosts(stalls=before, lengths=before)
    run = Simulated(auto, steps, stalls, lengths, asked, earlier).go()
    assert len([why for _, why in run.begun if why == "asked"]) <= len(asked)


def test_adapters_are_saved_every_few_steps() -> None:
    """Steps of 3 s, saves of milliseconds: every four steps. Not one save is wasted on less."""
    run = Simulated(AUTO, [3.0] * 1000, [0.004], [0.05], before=ADAPTER).go()
    assert len(run.begun) == 250
    assert run.begun[0][0] == 50 + 4 * 3.0, "the first one, too"


def test_seventy_billion_parameters() -> None:
    """64 ranks copy 0.8 s, and 840 GB take 84 s to write: the disk is at rest nine tenths."""
    run = Simulated(AUTO, [30.0] * 2000, [0.8], [84.0]).go()
    assert {round(b - a) for (a, _), (b, _) in pairwise(run.begun[1:])} <= set(range(848, 911))


def test_in_the_foreground_the_whole_save_is_a_stall() -> None:
    """The first, of which nothing is known, costs 60 s: then there is none for 100 minutes."""
    run = Simulated(AUTO, [10.0] * 3000, [60.0], [0.0]).go()
    first, second, *_ = (when for when, _ in run.begun)
    assert first == 60
    assert 12_000 <= second - 50 <= 12_010, "with the second one, too, it stays below 1 %"


def test_one_save_that_is_a_hundred_times_slower() -> None:
    """It is paid back, and then the pace is the old one."""
    steps, usual = [1.0] * 30_000, [0.1] * 50
    run = Simulated(AUTO, steps, [*usual, 10.0, *[0.1] * 10_000], [0.0]).go()
    times = [when for when, _ in run.begun]
    apart = [b - a for a, b in pairwise(times)]
    slow = apart[50]
    assert max(apart[:50]) <= 12
    assert 400 <= slow <= 1100, "10 s are 1 % of 1000 s, of which some had not been used up"
    assert max(apart[60:]) <= 12


def test_saves_that_others_ask_for_count() -> None:
    """`save_steps: 10` has spent more than the bound already: nothing is added."""
    run = Simulated(AUTO, [1.0] * 900, [0.5], [0.1], frozenset(range(5, 900, 10))).go()
    assert {why for _, why in run.begun} == {"asked"}


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"in_flight": True}, "one is on its way"),
        ({"evaluating": True}, "nothing changes meanwhile, and it would have no metric"),
        ({"save_due": True}, "it is saved anyway"),
        ({"due_in": 0}, "likewise"),
        ({"last_save": 990.5}, "a moment ago"),
        ({"now": -1e9}, "a clock that went back"),
        ({"costs": replace(ADAPTER, stood_still=10.1)}, "1 % is spent"),
        ({"costs": replace(ADAPTER, failed=6)}, "the sixth failure in a row"),
        ({"costs": replace(ADAPTER, lengths=[200.0]), "last_save": 1.0}, "a slow disk"),
        ({"due_in": 5}, "in 5 s there is one anyway"),
        ({"costs": replace(ADAPTER, lengths=[5.0]), "due_in": 20}, "it might have to wait"),
    ],
)
def test_what_holds_a_save_back(changed: dict[str, object], why: str) -> None:
    assert asks(READY) == "interval"
    assert asks(replace(READY, **changed)) is None, why  # type: ignore[arg-type]


@pytest.mark.parametrize("request_", ["stop", "save-now"])
def test_requests_are_not_held_back(request_: str) -> None:
    held = replace(READY, last_save=999.0, costs=replace(ADAPTER, stood_still=500.0, failed=9))
    assert asks(held) is None
    assert asks(replace(held, requests=(request_,))) == request_


def test_the_deadline_is_not_held_back_nor_brought_forward() -> None:
    """A save that nobody asked for does not make the run end earlier for want of time."""
    save = replace(READY, save_seconds=[50.0], costs=replace(ADAPTER, lengths=[50.0]))
    assert asks(save, deadline=1000.0 + 200, margin=10) == "interval"
    assert asks(save, deadline=1000.0 + 100, margin=10) is None, "there is time for one save only"
    assert asks(save, deadline=1000.0 + 60, margin=10) == "deadline"
    held = replace(save, last_save=999.0)
    assert asks(held, deadline=1000.0 + 60, margin=10) == "deadline"


def test_failures_are_further_and_further_apart() -> None:
    """So that five of them (`max_failed_saves`) are no disk that was full for a minute."""
    apart = [seconds_apart(AUTO, replace(ADAPTER, failed=count)) for count in range(6)]
    assert apart == [10.0, *(RETRY_SECONDS * 2**power for power in range(5))]
    assert seconds_apart(AUTO, replace(ADAPTER, failed=10**6)) < 10**5


def test_a_resumed_attempt_knows_what_saves_cost() -> None:
    dear = costs_of([{"stall": 2.0, "write": 3.0, "commit": 1.0}])
    assert next_moment(AUTO, replace(dear, began=70.0), last_save=70.0) == 70 + 200
    assert next_moment(AUTO, SaveCosts(began=70.0), last_save=70.0) == 70 + 10
    assert "the first save comes after 10 s" in told(AUTO, SaveCosts())
    assert "a save about every 200 s: it stops training for 2.000 s" in told(AUTO, dear)
    assert lost_minutes(math.inf, seconds_apart(AUTO, dear), [1.0] * 10) == 200 / 60


def test_the_share_of_the_time() -> None:
    assert SaveCosts(began=50.0).share(50.0) == 0
    assert SaveCosts(began=50.0, stood_still=1.0).share(150.0) == 0.01
    assert SaveCosts(began=50.0, stood_still=1.0).share(50.0) == 1, "no time, by a coarse clock"


@given(
    step=st.integers(1, 500),
    planned=st.integers(1, 500),
    save_steps=st.sampled_from([1, 2, 7, 100, 0.1, 0.5]),
)
def test_how_far_the_next_due_save_is(step: int, planned: int, save_steps: float) -> None:
    ahead = due_in(step, planned, 0.5, "steps", save_steps)
    if step <= planned:
        assert ahead == next(
            more for more in range(501) if saves_at(step + more, planned, "steps", save_steps)
        )
    assert due_in(step, planned, 0.0, "no", save_steps) == math.inf
    assert due_in(step, planned, 0.0, "best", save_steps) == math.inf


def test_how_far_an_epochs_end_is() -> None:
    assert due_in(25, 100, 1.25, "epoch", 500) == 15
    assert due_in(20, 100, 1.0, "epoch", 500) == 0
    assert due_in(99, 100, 4.95, "epoch", 500) == 1
    assert due_in(3, 100, 0.0, "epoch", 500) == math.inf, "not told"
